"""The inputs of a run: the model, the tokenizer and the rows, each loaded at first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from inspect import GEN_CLOSED, getgeneratorstate
from typing import TYPE_CHECKING, Any

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.data.examples.effects import refuse_ineffective, refuse_loss_on
from mlx_nb.data.examples.examples import (
    Examples,
    exclude_rows,
    refuse_no_such_row,
    refuse_unreadable,
    trains_plain_text,
)
from mlx_nb.data.examples.limits import ModelLimits
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut
from mlx_nb.data.examples.tokenizing import Outcome, tokenize_split
from mlx_nb.data.masks.prompt_format import CHAT, RAW, Rendering
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.data.sources.splits import Splits, is_local, open_splits, refuse_unknown_data
from mlx_nb.errors import CommandError, DataError, MlxNbError, ModelError, and_more, did_you_mean
from mlx_nb.events import Progress
from mlx_nb.events.history import EVALUATION_COLUMNS
from mlx_nb.export.trackers import refuse_missing_packages
from mlx_nb.process.interruptible import Interruptible
from mlx_nb.process.pieces import finished
from mlx_nb.run.fingerprints import fingerprints, own_code

if TYPE_CHECKING:
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.model.logprobs import TargetScorer
    from mlx_nb.rollouts.rewards.resolve import Reward
    from mlx_nb.train.answer_metrics import AnswerMetrics
    from mlx_nb.train.memory_plan import MemoryPlan
    from mlx_nb.train.reference_logprobs import ReferenceLogprobs
    from mlx_nb.train.state import TrainerExamples

SECONDS_TO_LOOK = 1.0  # time for checking rows before a cell returns
SPLITS = ("train", "valid", "test")
# The settings that tokenized rows depend on: the model's own, how rows are read, and what a method makes of them.
_OF_ROWS = (
    *(name for name, declared in SETTINGS.items() if declared.metadata["group"] in ("model", "rows", "rollouts")),
    *("method", "method_options", "reference_model", "seed", "test"),
)
_COMPARABLE = (str, int, float, tuple, dict, type(None))
ROWS_TO_TRY = 32  # whose columns metrics are checked against before the training


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are the same; rows in memory only if they are the same object."""
    return one is other or (isinstance(one, _COMPARABLE) and bool(one == other))


class RunInputs:
    """The model and rows that a configuration names. `data: name` is looked up as a variable in `namespace`.

    Raises ConfigError, DataError or ModelError, each in one line, at the first use of an invalid input.
    """

    def __init__(self, config: RunConfig, namespace: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.namespace = namespace
        self.left_out: dict[str, list[LeftOut]] = {}
        self.reading = Interruptible()  # rows; their source may run user code
        self.memory_plan: MemoryPlan | None = None  # if it was made before the model was loaded
        self._tokenizing: dict[str, Generator[tuple[int, float], None, Outcome]] = {}
        self._named_as_changed: set[str] = set()

    def for_fork(self, config: RunConfig) -> RunInputs:
        """The inputs of a fork: the same rows, and new modules that share the base model's arrays."""
        from mlx_nb.model.shared_base import shared_copy

        other = RunInputs(config, self.namespace)
        other.loaded, other.splits, other.left_out = shared_copy(self.loaded), self.splits, self.left_out
        other.limits = self.limits
        other.reference = self.reference
        other.examples = self.examples
        if config.test and not self.config.test:
            other.examples = dataclasses.replace(self.examples, test=other.tokenize("test"))
        return other

    def sharing_rows(self, config: RunConfig) -> RunInputs:
        """The inputs of another new run: tokenized rows are shared if these settings give the same ones.

        The base model is shared in any case, where its arrays can be.
        """
        other = RunInputs(config, self.namespace)
        if "examples" in vars(self) and all(_same(getattr(self.config, one), getattr(config, one)) for one in _OF_ROWS):
            other.splits, other.limits, other.left_out = self.splits, self.limits, self.left_out
            other.examples = self.examples
        return other

    def for_settings(self, config: RunConfig) -> RunInputs:
        """The inputs for changed settings before training starts. A loaded model is reused if it still fits."""
        other = RunInputs(config, self.namespace)
        decisive = ("model", "load_in_bits", "chat_template", "fine_tune_type")
        if "loaded" in self.__dict__ and all(getattr(self.config, name) == getattr(config, name) for name in decisive):
            other.loaded = self.loaded
        return other

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, its tokenizer and their source."""
        from mlx_nb.model.shared_base import load_base

        return load_base(self.config)

    def loading(self) -> Generator[Progress, None, LoadedModel]:
        """Load the model in pieces, yielding Progress. If another caller finishes first, its result is used."""
        from mlx_nb.model.shared_base import load_base_in_pieces

        if "loaded" not in self.__dict__:
            loaded = yield from load_base_in_pieces(self.config)
            self.__dict__.setdefault("loaded", loaded)
        return self.loaded

    @cached_property
    def base_model(self) -> Any:
        """The base model without the adapter, as new modules that share its arrays."""
        from mlx_nb.model.shared_base import shared_copy

        return shared_copy(self.loaded).model

    @cached_property
    def _tokenizer_alone(self) -> Any:
        from mlx_nb.model.loading import load_tokenizer
        from mlx_nb.model.model_source import model_folder, model_named

        return load_tokenizer(model_folder(model_named(self.config)), self.config.located("chat_template"))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with its chat template. Loaded without the model if that is not loaded yet."""
        return self.loaded.tokenizer if "loaded" in self.__dict__ else self._tokenizer_alone

    @cached_property
    def limits(self) -> ModelLimits:
        """The vocabulary and length limits of the model and of a reference model. Reads no weights."""
        from mlx_nb.model.limits import limits_by_name
        from mlx_nb.model.model_source import model_named

        found, other = limits_by_name(model_named(self.config)), self.config.reference_model
        return found if other is None else found.within(limits_by_name(model_named(self.config, "reference_model")))

    @cached_property
    def prompt_rendering(self) -> Rendering:
        """How prompts are rendered: in the same way as the training rows.

        Raises DataError for `prompt_format: chat` without a chat template.
        """
        rendering = Rendering.of(self.config)
        if rendering.prompt_format or rendering.is_raw(self.tokenizer):
            return rendering.resolved(self.tokenizer)
        try:
            raw = trains_plain_text(self.split("train"))
        except MlxNbError:  # no readable rows to decide by; generation still works
            raw = False
        return dataclasses.replace(rendering, prompt_format=RAW if raw else CHAT)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The config.json of the model. Reads no weights. Raises ModelError."""
        from mlx_nb.model.model_source import model_named
        from mlx_nb.model.unloaded import config_json_of

        return config_json_of(model_named(self.config))

    @cached_property
    def splits(self) -> Splits:
        """The rows of each split."""
        config = self.config
        return open_splits(
            config.data,
            namespace=self.namespace,
            working_folder=config.working_folder,
            val_set_size=config.val_set_size,
            seed=config.seed,
            train_split=config.train_split,
            valid_split=config.valid_split,
            test_split=config.test_split,
            subset=config.subset,
        )

    def check(self) -> None:
        """Raise for invalid settings, as far as that can be known without loading a model."""
        refuse_missing_packages(self.config)
        refuse_ineffective(self.config, self.splits)
        if self.config.loss_on != SETTINGS["loss_on"].default:
            refuse_loss_on(self.split("train"), self.config.loss_on)
        self.check_reward_names()

    def check_names(self) -> None:
        """Raise DataError or ModelError if the names of rows or models refer to nothing. Checks names only."""
        from mlx_nb.model.model_source import model_named, refuse_unknown_model

        refuse_unknown_model(model_named(self.config))
        if self.config.reference_model is not None:
            refuse_unknown_model(model_named(self.config, "reference_model"))
        refuse_unknown_data(self.config.data, self.namespace, self.config.working_folder)
        refuse_missing_packages(self.config)

    def check_local_data(self) -> None:
        """Raise ConfigError or DataError for invalid local rows, reading them for at most a second.

        Loads no tokenizer and downloads nothing.
        """
        config = self.config
        if not is_local(config.data, self.namespace, config.working_folder):
            return
        with self.reading:
            refuse_ineffective(config, self.splits)
            settings, kind = ExampleSettings.of(config), method_named(config.method).row_kind
            refuse_no_such_row("leave_out", config.leave_out or (), self.splits.train)
            refuse_no_such_row("down_weight", config.down_weight or (), self.splits.train)
            refuse_unreadable(self.splits.train, settings, kind, SECONDS_TO_LOOK)

    def check_reward_names(self) -> None:
        """Raise ConfigError for a reward or metric that is neither a function in the notebook nor a built-in one."""
        from mlx_nb.rollouts.rewards.resolve import resolve_rewards

        if self.config.metrics is not None:
            self.metric_functions(self.config.metrics)
        if method_named(self.config.method).kind.sampled:
            resolve_rewards(self.config.rewards, self.namespace or {})

    def split(self, split: str) -> Examples:
        """The examples of a split, each made on access. Raises CommandError, DataError."""
        if split not in SPLITS:
            raise CommandError(f"no split {split!r}.{did_you_mean(split, SPLITS)} There are train, valid and test.")
        source = getattr(self.splits, split)
        if source is None:
            raise DataError(f"the data have no {split} split.")
        kind = method_named(self.config.method).row_kind
        settings = ExampleSettings.of(self.config, self.limits)
        if split == "train" and self.config.down_weight is not None:
            refuse_no_such_row("down_weight", self.config.down_weight, source)
            rows, factor = frozenset(self.config.down_weight), self.config.down_weight_factor
            settings = dataclasses.replace(settings, down_weighted=rows, down_weight_factor=factor)
        return Examples(source, self.tokenizer, settings, kind)

    @cached_property
    def examples(self) -> TrainerExamples:
        """The tokenized rows of all splits. Rows that cannot be trained are in `left_out`.

        The rows are fingerprinted at the same time, so later changes to the data affect neither.
        """
        return finished(self.tokenizing())

    def tokenizing(self) -> Generator[Progress, None, TrainerExamples]:
        """Compute `examples`, yielding Progress. If it is abandoned, the next call continues where it stopped."""
        from mlx_nb.train.state import TrainerExamples

        if "examples" not in self.__dict__:
            made = {}
            for split in SPLITS:
                if split != "test" or self.config.test:
                    made[split] = yield from self._tokenizing_split(split)
            for source in self._sources():
                source.fingerprint()
            self.__dict__.setdefault("examples", TrainerExamples(**made))
        return self.examples

    @cached_property
    def training_notes(self) -> list[str]:
        """Notes about training this model with these settings. Raises ModelError if that is impossible."""
        return finished(self.trying())

    def trying(self) -> Generator[Progress, None, list[str]]:
        """Compute `training_notes` on a few tokens, yielding Progress before each trial."""
        from mlx_nb.model.training_trial import training_notes_in_pieces
        from mlx_nb.train.optimizer import refuse_beyond_memory

        if "training_notes" not in self.__dict__:
            notes = yield from training_notes_in_pieces(self.loaded, self.config, refuse_beyond_memory)
            self.__dict__.setdefault("training_notes", notes)
        return self.training_notes

    def _sources(self) -> list[RowSource]:
        return [source for split in SPLITS if (source := getattr(self.splits, split)) is not None]

    def changed_files(self) -> list[str]:
        """The data files that have changed since this run read them. Each file is reported once."""
        changed = {name for source in self._sources() for name in source.changed()} - self._named_as_changed
        self._named_as_changed |= changed
        return sorted(changed)

    def tokenize(self, split: str) -> list[Any]:
        """The tokenized rows of one split, without those that cannot be trained."""
        return finished(self._tokenizing_split(split))

    def _tokenizing_split(self, split: str) -> Generator[Progress, None, list[Any]]:
        source = getattr(self.splits, split)
        if source is None:
            return []
        while True:
            # Looked up each time, because another caller may have finished these rows meanwhile.
            rows = self._tokenizing.get(split)
            if rows is None or getgeneratorstate(rows) == GEN_CLOSED:  # closed by an error or interrupt
                rows = self._tokenizing[split] = tokenize_split(self.split(split))
            try:
                done, seconds = next(rows)
            except StopIteration as end:
                kept, left_out = end.value
                break
            yield Progress(0, f"tokenizing {split}", done, len(source), seconds)
        if split == "train" and self.config.leave_out is not None:
            kept, left_out = exclude_rows(self.config.leave_out, kept, left_out, source)
        self.left_out[split] = left_out
        self._tokenizing.pop(split, None)
        if left_out and not kept:
            raise DataError(f"no row of {split} can be trained. The first: {left_out[0].reason}")
        result: list[Any] = kept
        return result

    @cached_property
    def reference(self) -> ReferenceLogprobs | None:
        """The log-probabilities of the reference model; None for a method without one.

        By default the reference is the model before training, so access it before the first update of a full fine-tune.
        """
        from mlx_nb.model.reference_model import reference_fingerprint, reference_scorer
        from mlx_nb.train.reference_logprobs import ReferenceLogprobs

        if not method_named(self.config.method).reference or self.config.reference_free:
            return None
        start = self.base_model if self.config.fine_tune_type == "full" else None
        fingerprint = reference_fingerprint(self.config, self.loaded)

        def scorer() -> TargetScorer:
            """Load the reference at its first use, which may be long after its files were fingerprinted."""
            found = reference_scorer(self.config, self.loaded, start)
            if reference_fingerprint(self.config, self.loaded) != fingerprint:
                raise ModelError(
                    "the files of the reference (reference_model, reference_adapter or resume_adapter_file) changed "
                    "between the start of the run and their first use. Restore them, or start a new run."
                )
            return found

        return ReferenceLogprobs(scorer, fingerprint, self.config.packing)

    @cached_property
    def rewards(self) -> tuple[Reward, ...]:
        """The reward functions of a method that samples completions. Raises ConfigError if one cannot be called."""
        from mlx_nb.rollouts.rewards.resolve import check_rewards, resolve_rewards

        if not method_named(self.config.method).kind.sampled:
            return ()
        rewards = resolve_rewards(self.config.rewards, self.namespace or {})
        columns = dict.fromkeys(name for example in self.examples.train for name in example.columns)
        check_rewards(rewards, self.config.reward_weights, tuple(columns))
        return rewards

    def metric_functions(self, metrics: Any) -> tuple[Reward, ...]:
        """The functions that `metrics` names. Raises ConfigError for an unknown one, or one named as another metric."""
        from mlx_nb.rollouts.rewards.resolve import resolve_rewards

        of_run = ("bits_per_byte", "best_by", "position", *EVALUATION_COLUMNS)
        taken = (*of_run, *method_named(self.config.method).metrics)
        return resolve_rewards(metrics, self.namespace or {}, "metrics", taken)

    def answer_metrics(self, metrics: Any, max_tokens: int) -> AnswerMetrics:
        """The functions that `metrics` names, to judge the answers to rows. Raises ConfigError as `rewards` does."""
        from mlx_nb.train.answer_metrics import AnswerMetrics

        functions = self.metric_functions(metrics)
        return AnswerMetrics(functions, lambda split, row: self.split(split).question(row), self.tokenizer, max_tokens)

    @cached_property
    def metrics(self) -> AnswerMetrics | None:
        """The metrics of the setting, tried on the columns of a few rows. Raises ConfigError or DataError."""
        if self.config.metrics is None:
            return None
        found = self.answer_metrics(self.config.metrics, self.config.metric_tokens)
        for split in ("valid", "test"):
            if rows := [example.row for example in getattr(self.examples, split)[:ROWS_TO_TRY]]:
                found.check(split, rows)
        return found

    def places_of(self, rows: Sequence[int]) -> str:
        """A sentence with the source locations of training rows if their numbers differ there; otherwise empty."""
        source = self.splits.train
        named = [source.named(row) for row in dict.fromkeys(rows) if 0 <= row < len(source)]
        return f"In your data: {and_more(named, 8)}." if any("(" in one for one in named) else ""

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of everything besides the settings that determines the numbers of a run, by name."""
        model = [("config.json", self.loaded.configuration), *self.loaded.weights]
        own = own_code(self.config, self.rewards, self.metrics)
        reference = {} if self.reference is None else {"reference": self.reference.fingerprint}
        return fingerprints(self._sources(), self.tokenizer, model) | own | reference
