"""The data check: reports errors and oddities in the rows, by row number, before training.

Two passes. The first reads every row: its shape, the order of its roles, empty turns, duplicates. The second tokenizes
rows as training does: all of them or, in a large split, a sample that depends only on the number of rows. A new kind of
finding is declared in `findings.py` and collected in one of the passes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.check.findings import ERROR, LISTED_ROWS, SEVERITIES, Collector, Finding, RowList, finding, in_order
from mlx_nb.data.check.read_pass import Overlap, SplitReading, read_splits
from mlx_nb.data.check.template_report import TemplateCheck, probe_template
from mlx_nb.data.check.token_pass import LengthSummary, TokenCounts, count_tokens, length_summary, sampled_rows
from mlx_nb.data.examples.batches import updates_until
from mlx_nb.data.examples.examples import RowView
from mlx_nb.data.examples.limits import UNLIMITED, ModelLimits
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.data.masks.prompt_format import CHAT, FORMAT_WORDS
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.sources.splits import Splits
from mlx_nb.errors import CommandError

SAMPLED_ROWS = 5000
_SPLITS = ("train", "valid", "test")
_LOPSIDED, _ENOUGH_TO_COMPARE = 0.8, 20


@dataclass(frozen=True)
class SplitCheck:
    """The result for one split.

    `rows` were read and `checked` of them tokenized; fields after `checked` are about those.

    shapes         rows by shape: chat, prompt + completion, text; pair of texts, labeled text, prompt as text, ...
    formats        rows by how they are written for the model: "chat template", "raw text"
    labels         for labeled answers, how many are "true" and "false"
    trainable      of the checked rows, those that become `examples`, with `tokens` and `trained_tokens` in all; as many
                   examples as rows, or more with `truncate: split`
    longer_chosen  of the pairs whose answers differ in length, the share in which the chosen one is longer
    near_groups    numbers of near-duplicate rows, each similar to another of its group; the first groups
    """

    split: str
    rows: int
    shapes: dict[str, int]
    formats: dict[str, int]
    labels: dict[str, int]
    unreadable: RowList
    exact_duplicates: int
    near_duplicates: int
    near_groups: tuple[tuple[int, ...], ...]
    checked: int
    lengths: LengthSummary | None
    trainable: int
    examples: int
    tokens: int
    trained_tokens: int
    longer_chosen: float | None
    refused: RowList
    left_out: RowList
    truncated: RowList

    @property
    def trained_share(self) -> float:
        """Share of trained tokens among all tokens, from 0 to 1."""
        return self.trained_tokens / max(1, self.tokens)


@dataclass(frozen=True)
class EpochEstimate:
    """Size of one pass over the training rows with these settings, and of the whole run.

    Counted, or scaled up from the checked rows if `estimated`. `examples` are rows, or pieces of them with `truncate:
    split`.
    """

    rows: int
    examples: int
    updates: int
    tokens: int
    trained_tokens: int
    run_updates: int
    run_epochs: float
    batch_rows: int
    estimated: bool


@dataclass(frozen=True, repr=False)
class DataCheck:
    """The result of a data check. `findings` are ordered: errors, warnings, notes. `kind` is the kind of rows."""

    model: str
    data: str
    kind: str
    loss_on: str
    max_seq_length: int
    truncate: str
    findings: tuple[Finding, ...]
    splits: tuple[SplitCheck, ...]
    overlaps: tuple[Overlap, ...]
    epoch: EpochEstimate | None
    template: TemplateCheck | None
    notes: tuple[str, ...]

    def count(self, severity: str) -> int:
        """Number of findings with this severity."""
        return sum(item.severity == severity for item in self.findings)

    @property
    def ok(self) -> bool:
        """Whether there are no errors: a run will not stop because of these rows."""
        return self.count(ERROR) == 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, with the number of findings of each severity first."""
        return {"counts": {severity: self.count(severity) for severity in SEVERITIES}, **dataclasses.asdict(self)}

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(severity)} {severity}s" for severity in SEVERITIES)
        return f"DataCheck({counts}; {', '.join(f'{split.rows} rows of {split.split}' for split in self.splits)})"


def row_count(rows: int | str | None) -> int | None:
    """Parse a number of rows: `5000`, or None for all. Raises CommandError for anything else."""
    if rows is None or rows == "all":
        return None
    words = str(rows)
    if not words.isdecimal() or int(words) < 1:
        raise CommandError(f"rows={words}: give a whole number of 1 or more, or `all`.")
    return int(words)


def check_data(
    splits: Splits,
    tokenizer: Tokenizer,
    config: RunConfig,
    *,
    rows: int | str | None = SAMPLED_ROWS,
    kind: str = "tokens",
    limits: ModelLimits = UNLIMITED,
) -> DataCheck:
    """Check the rows of all splits as a run with these settings would use them.

    kind    what the training method takes: tokens, pairs, labels or prompts
    limits  what the model can read
    rows    how many rows of each split are tokenized (None or `all` = all); the other checks read every row

    Never raises for a bad row. Raises DataError if the data change while they are read, and for `prompt_format: chat`
    without a chat template.
    """
    count = row_count(rows)
    sources = {name: source for name in _SPLITS if (source := getattr(splits, name)) is not None}
    settings = ExampleSettings.of(config, limits).resolved(tokenizer)
    readings, overlaps = read_splits(sources, settings, kind)
    findings: list[Finding] = []
    checks: list[SplitCheck] = []
    for name, reading in readings.items():
        remarks = Collector(name)
        chosen = sampled_rows(reading.rows, count)
        counts = count_tokens(sources[name], chosen, tokenizer, settings, remarks, kind)
        checks.append(_split_check(reading, counts, config.max_seq_length))
        findings += reading.collector.findings(reading.rows) + remarks.findings(counts.checked)
        findings += _balance_findings(checks[-1])
        if name == "train" and not counts.trainable:
            findings.append(finding("nothing_to_train", name))
    template = probe_template(tokenizer)
    if any(reading.formats[FORMAT_WORDS[CHAT]] for reading in readings.values()):
        findings += _template_findings(template)
    return DataCheck(
        model=config.model,
        data=config.data if isinstance(config.data, str) else type(config.data).__name__,
        kind=kind,
        loss_on=config.loss_on,
        max_seq_length=config.max_seq_length,
        truncate=config.truncate,
        findings=in_order(findings),
        splits=tuple(checks),
        overlaps=tuple(overlaps),
        epoch=_epoch(checks[0], config),
        template=template,
        notes=splits.notes,
    )


def row_record(view: RowView, settings: ExampleSettings) -> dict[str, Any]:
    """A row as JSON values, as training uses it: `row`, `tokens`, `loss_mask`, `spans`, `problems`.

    A span is [start, end, role, message, weight] in characters of the rendered text. For a row that is not trained,
    `tokens` and `loss_mask` are null and `problems` has the reason. A pair has these fields for its chosen answer, and
    those of the other one in `rejected`; a labeled answer also has its `label`.
    """
    problems = view.problems
    if view.dropped_tokens:
        problems.append(f"{view.dropped_tokens} tokens were cut at max_seq_length={settings.max_seq_length}.")
    record = {
        "row": view.row,
        **_sequence_record(view.conversation, view.error is None),
        "problems": problems,
    }
    if view.rejected:
        record["rejected"] = _sequence_record(view.rejected, view.error is None)
    if view.content is not None and "label" in (marks := view.content.ratings()):
        record["label"] = marks["label"]
    return record


def _sequence_record(conversation: TokenizedConversation | None, trained: bool) -> dict[str, Any]:
    spans = [[s.start, s.end, s.role, s.message, _short(s.weight)] for s in conversation.spans] if conversation else []
    if conversation is None or not trained:
        return {"tokens": None, "loss_mask": None, "spans": spans}
    loss_mask = [_short(weight) for weight in conversation.loss_mask.tolist()]
    return {"tokens": conversation.tokens.tolist(), "loss_mask": loss_mask, "spans": spans}


def stops_a_run(view: RowView, settings: ExampleSettings) -> bool:
    """Whether training stops at this row: it cannot be read, or is too long with `truncate: error`."""
    if view.content is None:
        return True
    too_long = any(len(conversation.tokens) > settings.max_seq_length for conversation in view.conversations)
    return settings.truncate == "error" and too_long


def _short(weight: float) -> float | int:
    """A float32 weight without the digits that only come from its binary form."""
    return int(weight) if weight == int(weight) else round(weight, 6)


def _split_check(reading: SplitReading, counts: TokenCounts, max_seq_length: int) -> SplitCheck:
    groups = reading.near.all()
    return SplitCheck(
        split=reading.split,
        rows=reading.rows,
        shapes=dict(reading.shapes.most_common()),
        formats=dict(reading.formats.most_common()),
        labels={str(label).lower(): reading.labels[label] for label in sorted(reading.labels, reverse=True)},
        unreadable=reading.unreadable.listed(),
        exact_duplicates=reading.exact_duplicates,
        near_duplicates=sum(len(group) - 1 for group in groups),
        near_groups=tuple(tuple(group[:LISTED_ROWS]) for group in groups[:LISTED_ROWS]),
        checked=counts.checked,
        lengths=length_summary(counts.lengths, max_seq_length),
        trainable=counts.trainable,
        examples=counts.examples,
        tokens=counts.tokens,
        trained_tokens=counts.trained_tokens,
        longer_chosen=_share(counts.longer_chosen, counts.longer_rejected),
        refused=counts.refused.listed(),
        left_out=counts.left_out.listed(),
        truncated=counts.truncated.listed(),
    )


def _share(these: int, others: int) -> float | None:
    """The share of the first count in both, from 0 to 1; None if there are too few for a statement."""
    return round(these / (these + others), 4) if these + others >= _ENOUGH_TO_COMPARE else None


def _balance_findings(split: SplitCheck) -> list[Finding]:
    """Imbalances: one kind of answer mostly longer, or one label mostly given."""
    found = []
    longer = split.longer_chosen
    if longer is not None and not 1 - _LOPSIDED <= longer <= _LOPSIDED:
        which = f"chosen is longer in {100 * longer:.0f}% of the pairs that differ"
        found.append(finding("answer_length", split.split, which))
    true = _share(split.labels.get("true", 0), split.labels.get("false", 0))
    if true is not None and not 1 - _LOPSIDED <= true <= _LOPSIDED:
        found.append(finding("lopsided_labels", split.split, f"{100 * true:.0f}% are true"))
    return found


def _template_findings(template: TemplateCheck | None) -> list[Finding]:
    if template is None:
        return [finding("no_chat_template")]
    found = []
    if template.end_of_turn == ():
        found.append(finding("no_end_of_turn"))
    elif template.end_of_turn and not template.ends_generation:
        found.append(finding("end_does_not_stop", remark=repr("".join(template.end_of_turn))))
    if template.writes_bos and template.tokenizer_adds_bos:
        found.append(finding("double_bos"))
    return found


def _epoch(train: SplitCheck, config: RunConfig) -> EpochEstimate | None:
    """Batches and updates in a pass, rounded up as in the trainer; an update never crosses passes."""
    if not train.trainable:
        return None
    scale = train.rows / train.checked
    examples = round(train.examples * scale)
    batches = math.ceil(examples / config.batch_size)
    accumulated = config.grad_accumulation_steps
    again = config.updates_per_rollout
    run_updates = config.iters or updates_until(config.epochs or 1.0, batches, accumulated) * again
    passes, rest = divmod(run_updates / again, math.ceil(batches / accumulated))
    return EpochEstimate(
        rows=round(train.trainable * scale),
        examples=examples,
        updates=math.ceil(batches / accumulated),
        tokens=round(train.tokens * scale),
        trained_tokens=round(train.trained_tokens * scale),
        run_updates=run_updates,
        run_epochs=round(passes + rest * accumulated / batches, 3),
        batch_rows=config.batch_size * accumulated,
        estimated=train.checked < train.rows,
    )
