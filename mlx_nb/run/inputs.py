"""What a run is made from: the model, the tokenizer and the rows, each loaded at first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from inspect import GEN_CLOSED, getgeneratorstate
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.data.examples.effects import refuse_ineffective, refuse_loss_on
from mlx_nb.data.examples.imitation import ExampleSettings, LeftOut
from mlx_nb.data.examples.limits import ModelLimits
from mlx_nb.data.examples.split import (
    Examples,
    RowView,
    exclude_rows,
    refuse_no_such_row,
    refuse_unreadable,
    trains_plain_text,
)
from mlx_nb.data.examples.tokenizing import Outcome, tokenize_split
from mlx_nb.data.masks.prompt_format import CHAT, RAW, Rendering
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.data.sources.splits import Splits, is_local, open_splits, refuse_unknown_data
from mlx_nb.errors import CommandError, DataError, MlxNbError, ModelError, and_more, did_you_mean
from mlx_nb.events import Progress, Question
from mlx_nb.process.interruptible import Interruptible
from mlx_nb.process.own_code import code_digest, is_own
from mlx_nb.process.pieces import finished
from mlx_nb.run.resume_checks import fingerprints

if TYPE_CHECKING:
    from mlx_nb.model.loading import LoadedModel
    from mlx_nb.model.logprobs import TargetScorer
    from mlx_nb.rollouts.rewards.resolve import Reward
    from mlx_nb.train.reference_logprobs import ReferenceLogprobs
    from mlx_nb.train.state import TrainerExamples

SECONDS_TO_LOOK = 1.0  # at the rows, before a cell returns
SPLITS = ("train", "valid", "test")


class RunInputs:
    """The model and the rows that a configuration names. `namespace` is where `data: name` looks for a variable.

    Raises ConfigError, DataError or ModelError, each in one line, at the first use of what is wrong.
    """

    def __init__(self, config: RunConfig, namespace: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.namespace = namespace
        self.left_out: dict[str, list[LeftOut]] = {}
        self.reading = Interruptible()  # rows, by code that may be a person's own
        self._tokenizing: dict[str, Generator[tuple[int, float], None, Outcome]] = {}
        self._base_answers: dict[tuple[str, int], str] = {}
        self._named_as_changed: set[str] = set()

    def twin(self, config: RunConfig) -> RunInputs:
        """For a fork with other settings: the same rows, and the same base in modules of its own."""
        from mlx_nb.model.shared_base import twin

        other = RunInputs(config, self.namespace)
        other.loaded, other.splits, other.left_out = twin(self.loaded), self.splits, self.left_out
        other.limits = self.limits
        other.reference = self.reference
        other.examples = self.examples
        if config.test and not self.config.test:
            other.examples = dataclasses.replace(self.examples, test=other.tokenize("test"))
        return other

    def for_settings(self, config: RunConfig) -> RunInputs:
        """For a run that has not begun and whose settings were changed; a model that is loaded already is kept."""
        other = RunInputs(config, self.namespace)
        decisive = ("model", "load_in_bits", "chat_template", "fine_tune_type")
        if "loaded" in self.__dict__ and all(getattr(self.config, name) == getattr(config, name) for name in decisive):
            other.loaded = self.loaded
        return other

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, tokenizer and where they came from."""
        from mlx_nb.model.shared_base import load_base

        return load_base(self.config)

    def loading(self) -> Generator[Progress, None, LoadedModel]:
        """Make `loaded`, with Progress on the way; when somebody else made it meanwhile, that is it."""
        from mlx_nb.model.shared_base import load_base_in_pieces

        if "loaded" not in self.__dict__:
            loaded = yield from load_base_in_pieces(self.config)
            self.__dict__.setdefault("loaded", loaded)
        return self.loaded

    @cached_property
    def base_model(self) -> Any:
        """The base in modules of its own, without the adapter, sharing its arrays."""
        from mlx_nb.model.shared_base import twin

        return twin(self.loaded).model

    @cached_property
    def _tokenizer_alone(self) -> Any:
        from mlx_nb.model.loading import load_tokenizer
        from mlx_nb.model.model_source import model_folder, model_named

        return load_tokenizer(model_folder(model_named(self.config)), self.config.located("chat_template"))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with its chat template. Loaded alone when the model is not needed yet."""
        return self.loaded.tokenizer if "loaded" in self.__dict__ else self._tokenizer_alone

    @cached_property
    def limits(self) -> ModelLimits:
        """What the model, and a reference model beside it, can read. Reads no weights."""
        from mlx_nb.model.limits import limits_by_name
        from mlx_nb.model.model_source import model_named

        found, other = limits_by_name(model_named(self.config)), self.config.reference_model
        return found if other is None else found.within(limits_by_name(model_named(self.config, "reference_model")))

    @cached_property
    def asking(self) -> Rendering:
        """How a text that the model is asked is written: as its training rows are.

        Raises DataError for `prompt_format: chat` without a chat template.
        """
        rendering = Rendering.of(self.config)
        if rendering.prompt_format or rendering.is_raw(self.tokenizer):
            return rendering.resolved(self.tokenizer)
        try:
            raw = trains_plain_text(self.split("train"))
        except MlxNbError:  # no rows to go by: the model can be asked all the same
            raw = False
        return dataclasses.replace(rendering, prompt_format=RAW if raw else CHAT)

    @cached_property
    def splits(self) -> Splits:
        """The rows."""
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
        """Raise for what is wrong with the settings and can be known before a model is loaded."""
        refuse_ineffective(self.config, self.splits)
        if self.config.loss_on != SETTINGS["loss_on"].default:
            refuse_loss_on(self.split("train"), self.config.loss_on)
        self.check_reward_names()

    def check_names(self) -> None:
        """Raise DataError or ModelError for rows or a model that are not there, as far as a look at names can tell."""
        from mlx_nb.model.model_source import model_named, refuse_unknown_model

        refuse_unknown_model(model_named(self.config))
        if self.config.reference_model is not None:
            refuse_unknown_model(model_named(self.config, "reference_model"))
        refuse_unknown_data(self.config.data, self.namespace, self.config.working_folder)

    def check_at_hand(self) -> None:
        """Raise for what is wrong with rows that are here already, as far as reading them for a moment tells.

        No tokenizer is loaded and nothing is fetched. Raises ConfigError or DataError.
        """
        config = self.config
        if not is_local(config.data, self.namespace, config.working_folder):
            return
        with self.reading:
            refuse_ineffective(config, self.splits)
            settings, kind = ExampleSettings.of(config), method_named(config.method).rows
            refuse_no_such_row("leave_out", config.leave_out or (), self.splits.train)
            refuse_no_such_row("down_weight", config.down_weight or (), self.splits.train)
            refuse_unreadable(self.splits.train, settings, kind, SECONDS_TO_LOOK)

    def check_reward_names(self) -> None:
        """Raise ConfigError for a reward that is neither a function in the notebook nor built in."""
        from mlx_nb.rollouts.rewards.resolve import resolve_rewards

        if method_named(self.config.method).kind.sampled:
            resolve_rewards(self.config.rewards, self.namespace or {})

    def split(self, split: str) -> Examples:
        """The rows of a split as examples, each made when it is asked for. Raises CommandError, DataError."""
        if split not in SPLITS:
            raise CommandError(f"no split {split!r}.{did_you_mean(split, SPLITS)} There are train, valid and test.")
        source = getattr(self.splits, split)
        if source is None:
            raise DataError(f"these data have no {split} split.")
        kind = method_named(self.config.method).rows
        settings = ExampleSettings.of(self.config, self.limits)
        if split == "train" and self.config.down_weight is not None:
            refuse_no_such_row("down_weight", self.config.down_weight, source)
            rows, factor = frozenset(self.config.down_weight), self.config.down_weight_factor
            settings = dataclasses.replace(settings, down_weighted=rows, down_weight_factor=factor)
        return Examples(source, self.tokenizer, settings, kind)

    @cached_property
    def examples(self) -> TrainerExamples:
        """The rows of all splits, tokenized; those that cannot be trained are in `left_out`.

        The rows are fingerprinted with it: what a person does to them later changes neither.
        """
        return finished(self.tokenizing())

    def tokenizing(self) -> Generator[Progress, None, TrainerExamples]:
        """Make `examples`, with Progress on the way. When it is left, another one goes on where it was."""
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

    def _sources(self) -> list[RowSource]:
        return [source for split in SPLITS if (source := getattr(self.splits, split)) is not None]

    def changed_files(self) -> list[str]:
        """The files of rows whose content is no longer what this run read, each named once."""
        changed = {name for source in self._sources() for name in source.changed()} - self._named_as_changed
        self._named_as_changed |= changed
        return sorted(changed)

    def tokenize(self, split: str) -> list[Any]:
        """The rows of one split that can be trained."""
        return finished(self._tokenizing_split(split))

    def _tokenizing_split(self, split: str) -> Generator[Progress, None, list[Any]]:
        source = getattr(self.splits, split)
        if source is None:
            return []
        while True:
            # Asked anew each time: in between, another caller may have gone through with these rows.
            rows = self._tokenizing.get(split)
            if rows is None or getgeneratorstate(rows) == GEN_CLOSED:  # by an error or an interrupt
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
        """Log-probabilities of the reference, None for a method without one.

        The reference is what training starts from: ask before the first update of a full fine-tune.
        """
        from mlx_nb.model.reference_model import reference_fingerprint, reference_scorer
        from mlx_nb.train.reference_logprobs import ReferenceLogprobs

        if not method_named(self.config.method).reference or self.config.reference_free:
            return None
        start = self.base_model if self.config.fine_tune_type == "full" else None
        fingerprint = reference_fingerprint(self.config, self.loaded)

        def scorer() -> TargetScorer:
            """Its files are read when it is first asked, which may be long after they were fingerprinted."""
            found = reference_scorer(self.config, self.loaded, start)
            if reference_fingerprint(self.config, self.loaded) != fingerprint:
                raise ModelError(
                    "the reference (reference_model, reference_adapter or resume_adapter_file) was changed after the "
                    "run had begun and before it was read. Bring back what it was, or start a new run."
                )
            return found

        return ReferenceLogprobs(scorer, fingerprint, self.config.packing)

    @cached_property
    def rewards(self) -> tuple[Reward, ...]:
        """The reward functions of a method that needs some. Raises ConfigError for what cannot be called."""
        from mlx_nb.rollouts.rewards.resolve import check_rewards, resolve_rewards

        if not method_named(self.config.method).kind.sampled:
            return ()
        rewards = resolve_rewards(self.config.rewards, self.namespace or {})
        columns = dict.fromkeys(name for example in self.examples.train for name in example.columns)
        check_rewards(rewards, self.config.reward_weights, tuple(columns))
        return rewards

    def places_of(self, rows: Sequence[int]) -> str:
        """Where training rows come from, in a sentence, if they have other numbers there; else empty."""
        source = self.splits.train
        named = [source.named(row) for row in dict.fromkeys(rows) if 0 <= row < len(source)]
        return f"In your data: {and_more(named, 8)}." if any("(" in one for one in named) else ""

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """What the numbers of a run depend on besides its settings, by name."""
        from mlx_nb.model import backend
        from mlx_nb.model.lanes import lane_count

        found = fingerprints(self._sources(), self.tokenizer, self.loaded.weights)
        found["device"] = f"CPU, lanes: {lane_count()}" if backend.is_cpu() else backend.device_name()
        found |= self._own_code()
        return found if self.reference is None else {**found, "reference": self.reference.fingerprint}

    def _own_code(self) -> dict[str, Any]:
        """Digests of the functions of a person's own: their names in the settings stay when what they do changes."""
        method = method_named(self.config.method)
        loss = method.loss(self.config.loss).function()
        found: dict[str, Any] = {"loss function": code_digest(loss)} if is_own(loss) else {}
        own = {reward.name: code_digest(reward.function) for reward in self.rewards if is_own(reward.function)}
        return {**found, "reward functions": own} if own else found

    def token_losses(self, row: RowView, *, base: bool, rejected: bool = False) -> Any:
        """(T,) loss in nats of each token of a row, now; NaN for the first. `base` without the adapter.

        Of a pair, those of the chosen answer with its prompt, or of the rejected one.
        """
        from mlx_nb.model.logprobs import TargetScorer

        conversation = row.rejected if rejected else row.conversation
        if conversation is None:
            raise DataError(f"{row.error or f'row {row.row} is not a pair.'} It has no tokens to measure.")
        self.limits.require(conversation.tokens, np.ones(len(conversation.tokens)), name=f"row {row.row}")
        model = self.base_model if base else self.loaded.model
        model.eval()
        return TargetScorer(model).token_losses(conversation.tokens)

    def answers(self, prompt: str, max_tokens: int) -> Iterator[tuple[str, str | None]]:
        """The greedy answers to a kept prompt, of the model and of its base, as they grow."""
        from mlx_nb.rollouts.generation import stream_text

        asked, answer = (prompt, max_tokens), ""
        for answer in stream_text(self.loaded.model, self.tokenizer, *asked, self.asking):
            yield answer, None
        if self.config.fine_tune_type == "full":
            return
        if asked not in self._base_answers:
            base_answer = ""
            for base_answer in stream_text(self.base_model, self.tokenizer, *asked, self.asking):
                yield answer, base_answer
            self._base_answers[asked] = base_answer
        yield answer, self._base_answers[asked]

    def stream(self, question: Question) -> Iterator[str]:
        """The answer to a question so far, after each token; it begins empty."""
        from mlx_nb.rollouts.generation import stream_text

        model = self.base_model if question.base else self.loaded.model
        yield ""
        asked = question.messages
        if not isinstance(asked, str) and self.asking.is_raw(self.tokenizer):
            # Raw text has no turns: what was said so far goes on.
            asked = "".join(message["content"] for message in asked)
        yield from stream_text(model, self.tokenizer, asked, question.max_tokens, self.asking)
