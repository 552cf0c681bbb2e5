"""Trains a model as an iterator of events, and saves its adapters. Prints and draws nothing.

Exact checkpoints are written in run/checkpoints.py.
"""

from __future__ import annotations

import time
import typing
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.config.checks import warnings_about
from mlx_nb.config.methods import lower_is_better, method_named
from mlx_nb.config.run_config import LENGTHS, RunConfig
from mlx_nb.data.examples.batches import Place, TokenBatch
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import CommandError, ConfigError, DataError, FolderError, TrainingError
from mlx_nb.events import (
    EARLY_STOPPING,
    ITERS_REACHED,
    STOPPED,
    AdapterSaved,
    BatchSkipped,
    Cancel,
    ChangeSetting,
    Evaluate,
    EvaluationCompleted,
    Event,
    LossSpiked,
    MemoryLow,
    NothingLearned,
    Pause,
    Progress,
    Request,
    RequestRefused,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    Sample,
    SampleGenerated,
    Save,
    SettingChanged,
    Skip,
    StepCompleted,
    Stop,
    TrainerRequest,
)
from mlx_nb.files.whole_files import write_whole
from mlx_nb.model import adapters
from mlx_nb.model.adapter_files import START, open_adapter, with_adapter_settings
from mlx_nb.model.lanes import lane_count
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.memory import memory_errors
from mlx_nb.model.passes import refuse_cache_mismatch
from mlx_nb.model.randomness import random_stream, seed_for
from mlx_nb.model.recomputing import recomputed_by
from mlx_nb.model.trained import orthogonalized_outside, total_count, trainable_count, trained_summary
from mlx_nb.model.trees import held_arrays
from mlx_nb.objectives.build import objective_for
from mlx_nb.process.interruptible import Interruptible
from mlx_nb.rollouts.rewards.resolve import Reward
from mlx_nb.train.adapter_saves import AdapterSaves
from mlx_nb.train.answer_metrics import Answered, AnswerMetrics, KeptAnswers
from mlx_nb.train.batch_source import BatchSource, RowBatches
from mlx_nb.train.checkpoint import Checkpoint
from mlx_nb.train.evaluation import evaluate_split
from mlx_nb.train.inbox import Inbox
from mlx_nb.train.length import refuse_shorter_than_done, updates_left
from mlx_nb.train.memory_guard import MemoryGuard
from mlx_nb.train.optimizer import build_optimizer, learning_rate_at, rate_note, refuse_beyond_memory, stretch_note
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from mlx_nb.train.rollout import NoReward, Rollouts
from mlx_nb.train.schedule import BEGIN, SAVE_BEST, SAVE_LAST, VALIDATE_NOW, Due, Measures, Schedule
from mlx_nb.train.shared_work import Aborted, SharedWork
from mlx_nb.train.state import TrainerExamples, TrainerState
from mlx_nb.train.step import COMPILED_WIDTHS, Stepper, Update
from mlx_nb.train.tripwires import REMEMBERED_LOSSES, SpikeWatch, advice, length_class, out_of_memory
from mlx_nb.train.update_plan import UpdatePlan

MEMORY_WARNING = 0.9  # share of the device's memory
IDLE_UPDATES = 10  # consecutive updates without a learning signal before NothingLearned


# (prompt, max tokens) -> stream of (answer, answer of the base), one per token
Sampler = Callable[[str, int], Iterator[tuple[str, str | None]]]
_NO_VALIDATION = (
    "there are no validation rows. Provide some (valid.jsonl, or val_set_size), or use `%finetune eval train`."
)
_NO_PROMPTS = "there are no sample prompts. Set `sample_prompts` in a new run, or use `%finetune generate`."


_REWARD_ADVICE = (
    "Nothing has changed. `%finetune run` tries again, `%finetune skip` skips these prompts, and a fork "
    "(`%finetune fork rewards=...`) can use a corrected function."
)


def _longest(config: RunConfig, examples: Sequence[Any]) -> int:
    """The length in tokens of the longest row, including the longest completion of a prompt."""
    completion = config.max_completion_length if method_named(config.method).kind.sampled else 0
    return max(len(part.tokens) for example in examples for part in example.sequences) + completion


class Trainer:
    """Trains `model` in place. `events()` yields events, and the caller has control between any two of them.

    The constructor attaches the adapter; `close` removes it. Requests are handled only at step boundaries.
    `base` is the `base_identity` to store with saved adapters. `from_checkpoint` says that `restore` follows, so that
    the adapter in `resume_adapter_file` is not loaded. Raises DataError without training rows, ModelError for a model
    whose forward pass in training differs from that in generation.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        examples: TrainerExamples,
        *,
        name: str,
        folder: Path,
        notes: Sequence[str] = (),
        compiled: bool = False,
        memory_limit: int | None = None,
        guard: MemoryGuard | None = None,
        sampler: Sampler | None = None,
        reference: ReferenceLogprobs | None = None,
        tokenizer: Tokenizer | None = None,
        rewards: Sequence[Reward] = (),
        metrics: AnswerMetrics | None = None,
        base: dict[str, Any] | None = None,
        loading_info: Mapping[str, str] | None = None,
        from_checkpoint: bool = False,
        inbox: Inbox | None = None,
        write: adapters.Write = write_whole,
        places_of: Callable[[Sequence[int]], str] = lambda rows: "",
    ) -> None:
        if not examples.train:
            raise DataError("no training row is left. `%finetune rows` shows why each one was left out.")
        config = config if from_checkpoint else with_adapter_settings(config)
        refuse_cache_mismatch(model, _longest(config, examples.train))
        self.config = config
        self.model = model
        self.examples = examples
        self.name = name
        self.places_of = places_of
        self.notes = tuple(notes)
        self.state = TrainerState(best_by=config.best_by or "")
        self.finished: RunFinished | None = None
        self._inbox = inbox if inbox is not None else Inbox()
        self.schedule = Schedule()
        self._peaks = (0, 0)  # peak of all memory, and of training alone
        self.kept_memory = 0  # bytes of snapshots kept for rewinding
        self._started = False
        self._abort = False
        self._work = SharedWork()
        self._memory_limit = memory_limit
        self._guard = guard
        self._sampler = sampler
        self._reference = reference
        self._tokenizer = tokenizer
        self.metrics = metrics
        width_multiple = COMPILED_WIDTHS if compiled else 1
        try:
            with random_stream(seed_for(config.seed, "adapter")):
                self._keys = adapters.attach_adapter(model, config)
                self.saves = AdapterSaves(model, self._keys, folder, write, base, loading_info)
                refuse_beyond_memory(model, config)
                mx.eval(held_arrays(model))
            if config.resume_adapter_file and not from_checkpoint:
                start = open_adapter(str(config.located(START)), START)
                adapters.load_adapter_weights(model, start)
                mx.eval(held_arrays(model))
            self.notes += orthogonalized_outside(model, config)
            model.eval()
            self.scorer = TargetScorer(model, recomputed_by(config))
            self.stepper = Stepper(
                model,
                build_optimizer(config),
                objective_for(config),
                self.scorer,
                compiled=compiled,
                lanes=lane_count(),
                poll=self._poll,
                b_ratio=config.loraplus_lr_ratio or 1.0,
            )
        except BaseException:
            self.close()
            raise
        self.plan = UpdatePlan(config, examples.train)
        self.rollouts: Rollouts | None = None
        if method_named(config.method).kind.sampled:
            assert tokenizer is not None, "sampling completions needs a tokenizer"
            self.rollouts = Rollouts(
                config,
                columns=tuple(dict.fromkeys(name for example in examples.train for name in example.columns)),
                scorer=self.scorer,
                tokenizer=tokenizer,
                rewards=rewards,
                reference=reference,
                width_multiple=width_multiple,
            )
        self.source: BatchSource = self.rollouts or RowBatches(
            config, scorer=self.scorer, reference=reference, width_multiple=width_multiple
        )
        self.iters = self._total_updates()
        mx.reset_peak_memory()  # mlx's peak is that of the whole process; a run keeps its own in `_peaks`

    def _updates_left(self) -> int:
        """The number of updates left."""
        return updates_left(self.config, self.state, self.plan, self.rollouts)

    def _total_updates(self) -> int:
        """The length of the whole run, at least the updates done."""
        return max(1, self.state.step + self._updates_left())

    def request(self, request: Request) -> None:
        """Queue a request for the next step boundary. Safe to call from a signal handler or widget callback."""
        at_once = isinstance(request, Pause) and request.at_once
        at_once = at_once or (isinstance(request, Cancel) and self.schedule.first_is_cancellable)
        self._abort = self._abort or at_once
        self._inbox.put(request)
        if at_once:
            for user_code in self.user_code:
                user_code.strike(Aborted())  # interrupts a running reward or metric function

    @property
    def user_code(self) -> list[Interruptible]:
        """The contexts in which user-defined rewards and metrics run, to interrupt them."""
        return [one.user_code for one in (self.rollouts, self.metrics) if one is not None]

    def _poll(self) -> None:
        if self._abort:
            raise Aborted

    def events(self, updates: int | None = None) -> Iterator[Event]:
        """Train for `updates` optimizer updates, or to the end of the run, yielding events.

        Ends early after RunPaused, RunFinished or RunFailed. Call it again at any time to continue, also after a stop.
        A task that was aborted, or failed because the disk was full, has changed nothing and is tried again then.
        """
        done = 0
        if updates != 0:
            self.undo_early_end()
        while True:
            paused = yield from self._read_requests()
            if paused:
                return
            if not self._started:  # the first call, or the first after a rewind to before the start
                self._started = True
                self.schedule.add(BEGIN)
            try:
                if self.saves.best_is_stale:
                    self.restore_best()
                self.stepper.trainable()  # undoes the user's freezing, or raises ModelChanged
                if self.schedule:
                    event = yield from self._work.share(self._do_next)
                elif self.finished is not None or done == updates:
                    return
                elif self.rollouts is not None and not self.rollouts.ready:
                    event = yield from self._work.share(self._sample_rollout)
                else:
                    event = self._update()
                    done += 1
            except Aborted:
                continue  # the Pause that aborted it is the next request, or another loop has finished the work
            except NoReward as error:
                yield RunPaused(self.state.step, f"{error} {_REWARD_ADVICE}")
                return
            except OSError as error:
                yield RunPaused(self.state.step, _disk_error(self.saves.folder, error))
                return
            except FolderError as error:
                yield RunPaused(self.state.step, str(error))
                return
            except TrainingError as error:
                yield self._failed(error)
                return
            except (MemoryError, RuntimeError) as error:
                yield self._failed(out_of_memory(error, ()))
                return
            yield event

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended and no update is left."""
        return self.finished is not None and not self._updates_left()

    def undo_early_end(self) -> None:
        """Undo a stop or early stop, so that the remaining updates are done."""
        if self.finished is not None and self._updates_left():
            self.finished = None
            self.state = replace(self.state, evaluations_without_best=0)

    def repeat_finish(self) -> None:
        """If the run is complete, finish it again, which writes its adapter to the folder of this trainer."""
        if self.is_complete:
            self.finished = None
            self.schedule.add(SAVE_LAST, ("finish", ITERS_REACHED))

    def change_folder(self, folder: Path, write: adapters.Write) -> None:
        """Save to `folder` with `write` from now on. The current adapter must be there already."""
        self.saves.folder, self.saves.write_file = folder, write
        if self.finished is not None:
            self.finished = replace(self.finished, path=str(folder))

    def _failed(self, error: TrainingError) -> RunFailed:
        doubtful = bool(warnings_about(self.config))
        what = advice(type(error), self.state.step, self.config.learning_rate, doubtful=doubtful)
        places = self.places_of(error.rows)
        text = " ".join(filter(None, (str(error), places, what)))
        return RunFailed(self.state.step, error.reason, text, error.rows, error.largest_gradients)

    def _polled(self, work: Generator[Event, None, Any]) -> Generator[Event, None, Any]:
        """Run `work`, raising Aborted between its events if that was requested."""
        try:
            while True:
                self._poll()
                yield next(work)
        except StopIteration as ended:
            return ended.value
        finally:
            work.close()

    def _sample_rollout(self) -> Generator[Event, None, Event]:
        assert self.rollouts is not None
        first = self.state.batches
        rollout: Event = yield from self._polled(
            self.rollouts.sample(self.state.step, first, self.plan.examples(first))
        )
        return rollout

    def _do_next(self) -> Generator[Event, None, Event]:
        """Do the first task of the queue, remove it, and queue its follow-up tasks."""
        event, follow_up = yield from self._do(*self.schedule.first)
        self.schedule.done(follow_up)
        return event

    def _do(self, what: str, how: str) -> Generator[Event, None, tuple[Event, list[Due]]]:
        """Do one task. Returns its event and the follow-up tasks."""
        match what:
            case "start":
                return self._start(), self.planned_measurements.at_the_start
            case "validate":
                return (yield from self._validate(scheduled=not how))
            case "sample":
                try:
                    return (yield from self._sample(how)), []
                except DataError as error:  # the model cannot read the prompt
                    return RequestRefused(self.state.step, f"sample {how!r}: {error}"), []
            case "save":
                return self._save(how), []
            case "test":
                return (yield from self._test()), []
            case "memory":
                return MemoryLow(self.state.step, mx.get_peak_memory(), int(how)), []
            case "spike":
                return LossSpiked(self.state.step, how), []
            case "idle":
                return NothingLearned(self.state.step, int(how)), []
            case _:
                return self._finish(how), []

    def snapshot(self) -> Checkpoint:
        """A snapshot of everything that the next update depends on. Call it at a step boundary."""
        completions, about_completions = self.rollouts.snapshot() if self.rollouts is not None else ({}, None)
        arrays = {
            **self.stepper.arrays(),
            "feed": completions,
        }
        if self.saves.best is not None and self.state.best_step != self.state.step:
            arrays["best"] = self.saves.best
        state = {
            "feed": about_completions,
            "trainer": dict(vars(self.state)),  # not asdict, which would copy the lists
            "place": list(self.plan.batches.place(self.state.batches)),
            "due": self.schedule.as_lists(),
            "asked": self._inbox.kept(),
            "started": self._started,
            "finished": self.finished and asdict(self.finished),
        }
        return Checkpoint(self.state.step, arrays, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a snapshot bit for bit. Raises CheckpointError if it is from another model or optimizer."""
        parameters = checkpoint.arrays["parameters"]
        self.stepper.refuse_mismatch(checkpoint.step, parameters, checkpoint.arrays["optimizer"])
        self._work.drop()
        self.stepper.restore(parameters, checkpoint.arrays["optimizer"])
        self.state = TrainerState(**checkpoint.state["trainer"])
        # JSON has no tuples, and older checkpoints have losses without a length class, which are dropped.
        pairs = [one for one in self.state.recent_losses if isinstance(one, list | tuple)]
        self.state.recent_losses = [(length, loss) for length, loss in pairs]
        same_best = self.state.best_by == (self.config.best_by or "")
        if not same_best:  # another metric decides from now on, and how it was until now is not known
            self.state = replace(
                self.state,
                best_by=self.config.best_by or "",
                best_loss=None,
                best_step=None,
                best_score=None,
                scheduled_best=None,
                evaluations_without_best=0,
            )
        if (place := checkpoint.state.get("place")) is not None:
            self.state.batches = self.plan.batches.find(Place(*place))
        if self.rollouts is not None:
            prompts = self.plan.examples(self.state.batches)
            self.rollouts.restore(checkpoint.arrays.get("feed", {}), checkpoint.state.get("feed"), prompts)
        finished = checkpoint.state["finished"]
        # The folder may have been moved or copied since.
        self.finished = None if finished is None else RunFinished(**{**finished, "path": str(self.saves.folder)})
        self.schedule.only((what, how) for what, how in checkpoint.state["due"])
        self._started = checkpoint.state["started"]
        if self.config.fine_tune_type != "full":
            kept = checkpoint.arrays.get("best") if same_best else None
            self.saves.best = dict(parameters) if self.state.best_step == checkpoint.step else kept
        self.saves.best_is_stale = self.state.best_step is not None
        self._end_where_due()
        # A pending Skip was meant for the batch after another update.
        self._inbox.drop(Skip)

    def _start(self) -> RunStarted:
        return RunStarted(
            self.state.step,
            self.name,
            self.iters,
            trainable_count(self.model),
            total_count(self.model),
            len(self.examples.train),
            len(self.examples.valid),
            self.notes,
            trained_summary(self.model, self.config, self._keys),
        )

    @property
    def validates(self) -> bool:
        """Whether the run evaluates validation rows on its own."""
        return bool(self.examples.valid) and self.config.steps_per_eval != -1

    @property
    def planned_measurements(self) -> Measures:
        """What the run measures on its own."""
        prompts = self.config.sample_prompts if self._sampler is not None else None
        return Measures(self.validates, bool(self.config.test and self.examples.test), tuple(prompts or ()))

    def _schedule_after_update(self) -> None:
        """Queue the tasks due at this boundary, so that they are done even if the caller pauses before them."""
        step = self.state.step
        if self._memory_limit is not None and mx.get_peak_memory() > MEMORY_WARNING * self._memory_limit:
            self.schedule.add(("memory", str(self._memory_limit)))
            self._memory_limit = None  # reported only once
        if step - self.state.learned_step == IDLE_UPDATES:
            self.schedule.add(("idle", str(IDLE_UPDATES)))
        if self._updates_left():
            self.schedule.after_update(step, self.iters, self.config, self.planned_measurements)
        else:
            self.schedule.after_the_last(self.state.validated_step == step, self.planned_measurements)

    def _sample(self, prompt: str) -> Generator[Event, None, SampleGenerated]:
        assert self._sampler is not None
        begun = time.perf_counter()
        answers: tuple[str, str | None] = ("", None)
        # The answer of the base follows that of the model, unless it is cached.
        model_tokens = total_tokens = self.config.sample_tokens
        for tokens, so_far in enumerate(self._sampler(prompt, model_tokens), start=1):
            if so_far[1] is not None and answers[1] is None:
                total_tokens = tokens + model_tokens
            answers = so_far
            yield Progress(self.state.step, "sample", min(tokens, total_tokens), total_tokens)
            self._poll()
        return SampleGenerated(self.state.step, prompt, *answers, time.perf_counter() - begun)

    def _read_requests(self) -> Generator[Event, None, bool]:
        """Handle pending requests. The generator's value is True if training must pause now."""
        request: TrainerRequest
        for request in self._inbox.take(TrainerRequest):
            match request:
                case Pause(reason):
                    self.clear_pauses()
                    if self.finished is None:
                        yield RunPaused(self.state.step, reason)
                        return True
                case Cancel():
                    self._abort = Pause in self._inbox and self._abort
                    self.schedule.cancel()
                case Stop():
                    self.schedule.only(self.planned_measurements.at_the_end(STOPPED))
                case Save():
                    self.schedule.add(SAVE_LAST)
                case Evaluate() if not self.examples.valid:
                    yield RequestRefused(self.state.step, _NO_VALIDATION)
                case Evaluate():
                    self.schedule.add(VALIDATE_NOW)
                case Sample() if not self.planned_measurements.prompts:
                    yield RequestRefused(self.state.step, _NO_PROMPTS)
                case Sample():
                    self.schedule.add(*self.planned_measurements.samples)
                case ChangeSetting(name, value):
                    try:
                        yield self.change(name, value)
                    except ConfigError as error:
                        yield RequestRefused(self.state.step, str(error))
                case Skip():
                    yield self._skip()
                case _:
                    typing.assert_never(request)
        return False

    @property
    def cancellable(self) -> bool:
        """Whether Cancel would drop something."""
        return self.schedule.cancellable or Sample in self._inbox or Evaluate in self._inbox

    def clear_pauses(self) -> None:
        """Drop all pending pauses, which one pause satisfies."""
        self._inbox.drop(Pause)
        self._abort = False

    def _skip(self) -> BatchSkipped:
        rows = self.next_rows()
        self.state = replace(self.state, batches=self.plan.after(self.state.batches))
        if self.rollouts is not None:
            self.rollouts.drop()
        self._end_where_due()
        return BatchSkipped(self.state.step, rows)

    def _end_where_due(self) -> None:
        """Update the length of the run: reopen it if it became longer, and end it if no update is left."""
        self.iters = self._total_updates()
        if self._updates_left():
            if self.finished and self.finished.reason == ITERS_REACHED:
                self.finished = None
            self.schedule.reopen()
        elif self._started and self.finished is None and not self.schedule.ends:
            self.schedule.after_the_last(self.state.validated_step == self.state.step, self.planned_measurements)

    def change(self, name: str, value: Any) -> SettingChanged:
        """Change a live setting at a step boundary. A finished run that becomes longer continues.

        Raises ConfigError for a length below the updates done.
        """
        old, before = getattr(self.config, name), self.iters
        config = self.config.with_live(**{name: value})
        if name not in LENGTHS:
            self.config = config
            return SettingChanged(
                self.state.step, name, old, getattr(config, name), note=self.change_note(name, config)
            )
        self.refuse_shorter_than_done(config)
        self.config = config
        self._end_where_due()
        self.undo_early_end()
        note = stretch_note(config, before, self.iters, self.state.step)
        return SettingChanged(self.state.step, name, old, getattr(config, name), self.iters, note)

    def change_note(self, name: str, config: RunConfig) -> str:
        """A note about the effect of a changed setting; empty if there is nothing to explain."""
        if name != "learning_rate":
            return ""
        return " ".join([rate_note(config, self.iters, self.state.step), *warnings_about(config)])

    def refuse_shorter_than_done(self, config: RunConfig) -> None:
        """Raise ConfigError for a length that the run has passed already."""
        refuse_shorter_than_done(config, self.name, self.state, self.plan.batches.batches_per_epoch)

    def _update(self) -> StepCompleted:
        config, state = self.config, self.state
        started = time.perf_counter()
        batches = self.next_batches()
        rows = tuple(row for batch in batches for row in batch.rows)
        if self._guard is not None:
            self._guard.refuse(batches, config)
        learning_rate = learning_rate_at(config, self.iters, state.step)
        tokens = sum(sum(batch.lengths) for batch in batches)
        length = length_class(tokens, len(rows))
        comparable_losses = [loss for of_length, loss in state.recent_losses if of_length == length]
        watch = SpikeWatch(comparable_losses, state.spikes, config.loss_spike, config.spike_patience)
        try:
            update = self.stepper.update(
                batches,
                learning_rate=learning_rate,
                grad_clip=config.grad_clip,
                seed=seed_for(config.seed, "dropout", state.step),
                rows=tuple(dict.fromkeys(rows)),
                judge=watch.judge,
            )
        except (MemoryError, RuntimeError) as error:
            raise out_of_memory(error, batches) from error
        seconds = time.perf_counter() - started
        metrics = {**update.metrics, **(self.rollouts.metrics if self.rollouts is not None else {})}
        batches_done = self.rollouts is None or self.rollouts.use_up()
        self.state = state = replace(
            state,
            step=state.step + 1,
            batches=self.plan.after(state.batches) if batches_done else state.batches,
            tokens=state.tokens + tokens,
            target_tokens=state.target_tokens + update.units,
            learned_step=state.step + 1 if _had_signal(update, metrics, learning_rate) else state.learned_step,
            seconds=state.seconds + seconds,
            recent_losses=[*state.recent_losses, (length, update.loss)][-REMEMBERED_LOSSES:],
            spikes=watch.in_a_row,
        )
        if watch.found is not None:
            self.schedule.add(("spike", watch.found))
        self._schedule_after_update()
        return StepCompleted(
            step=state.step,
            loss=update.loss,
            learning_rate=learning_rate,
            gradient_norm=update.gradient_norm,
            target_tokens=update.units,
            tokens=tokens,
            seconds=seconds,
            peak_memory=self._peak_memory(),
            epoch=self.plan.batches.epochs(state.batches),
            rows=tuple(dict.fromkeys(rows)),
            metrics=metrics,
            row_losses=tuple(zip(rows, update.row_losses)),
        )

    def _peak_memory(self) -> int:
        """The peak memory of training so far, without the snapshots kept for rewinding."""
        highest, own = self._peaks
        if (peak := mx.get_peak_memory()) > highest:
            self._peaks = (peak, max(own, peak - self.kept_memory))
        return self._peaks[1]

    def next_rows(self) -> tuple[int, ...]:
        """The rows of the next update, in batch order."""
        return self.plan.rows(self.state.batches)

    def next_batches(self) -> list[TokenBatch]:
        """The batches of the next update, one per micro-batch; empty if its completions are not sampled yet."""
        if self.rollouts is not None and not self.rollouts.ready:
            return []
        return self.source.batches(self.plan.examples(self.state.batches))

    def evaluate(
        self,
        split: str = "valid",
        *,
        all_rows: bool = False,
        metrics: AnswerMetrics | None = None,
        kept: KeptAnswers | None = None,
        on_progress: Callable[[Event], None] = lambda event: None,
    ) -> EvaluationCompleted:
        """Token-weighted loss over a fixed set of rows of `split`, or all. Does not change the run.

        `metrics` judge the answers to these rows (None = those of the run), and `kept` keeps the answers. `on_progress`
        is called between two pieces of work, and may raise to end the evaluation.
        Raises OutOfMemory if a batch does not fit, ModelChanged, and CommandError if user code inside it requests an
        immediate pause. Other pauses take effect when training continues.
        """
        self.stepper.trainable()  # undoes the user's freezing, or raises ModelChanged
        evaluating = self._evaluating(split, all_rows, metrics or self.metrics, kept)
        with (
            memory_errors("rows were evaluated", "A lower batch_size or max_seq_length needs less."),
            closing(evaluating),
        ):
            while True:
                try:
                    on_progress(next(evaluating))
                except StopIteration as ended:
                    result: EvaluationCompleted = ended.value
                    return result
                except Aborted:
                    raise CommandError(
                        "the evaluation was aborted by an immediate pause. Nothing has changed."
                    ) from None

    def _evaluating(
        self,
        split: str,
        all_rows: bool = False,
        metrics: AnswerMetrics | None = None,
        kept: KeptAnswers | None = None,
    ) -> Generator[Event, None, EvaluationCompleted]:
        def answering(rows: Sequence[int]) -> Generator[Event, None, Answered]:
            assert metrics is not None
            return metrics.measure(self.state.step, split, rows, self.model, kept)

        return evaluate_split(
            self.config,
            self.examples,
            self.source,
            self.stepper.evaluate,
            step=self.state.step,
            split=split,
            all_rows=all_rows,
            tokenizer=self._tokenizer,
            answering=answering if metrics is not None else None,
        )

    def _validate(self, scheduled: bool) -> Generator[Event, None, tuple[Event, list[Due]]]:
        """Only scheduled validations count for early stopping, so that extra ones never end a run."""
        try:
            result = yield from self._polled(self._evaluating("valid", metrics=self.metrics))
        except DataError as error:  # no completion has a reward, or no row asks anything any more
            return RequestRefused(self.state.step, f"validation: {error}"), []
        state = self.state = replace(self.state, validated_step=self.state.step)
        score = self._score(result)
        known = state.best_loss if self.config.best_by is None else state.best_score
        best = score is not None and (known is None or score < known)
        if best:
            by_metric = score if self.config.best_by is not None else None
            self.state = replace(self.state, best_loss=result.loss, best_step=state.step, best_score=by_metric)
            if self.config.fine_tune_type != "full":
                self.saves.best = adapters.adapter_weights(self.model)
        follow_up = [SAVE_BEST] if best and state.step > 0 else []
        if scheduled:
            self._count_for_early_stopping(score)
        return replace(result, best=best), follow_up

    def _score(self, result: EvaluationCompleted) -> float | None:
        """What is compared to find the best validation, lower is better; None if no metric function gave a number."""
        by = self.config.best_by
        if by is None:
            return result.loss
        value = result.metrics.get(by)
        return value if value is None or lower_is_better(self.config.method, by) else -value

    def _count_for_early_stopping(self, score: float | None) -> None:
        state, patience = self.state, self.config.early_stopping_patience
        if score is not None and (state.scheduled_best is None or score < state.scheduled_best):
            self.state = replace(state, scheduled_best=score, evaluations_without_best=0)
            return
        self.state = replace(state, evaluations_without_best=state.evaluations_without_best + 1)
        out_of_patience = patience is not None and self.state.evaluations_without_best >= patience
        if out_of_patience and self.finished is None and self._updates_left():
            self.schedule.add(*self.planned_measurements.at_the_end(EARLY_STOPPING))

    def _test(self) -> Generator[Event, None, Event]:
        try:
            tested: EvaluationCompleted = yield from self._polled(self._evaluating("test", metrics=self.metrics))
            return tested
        except DataError as error:
            return RequestRefused(self.state.step, f"test: {error}")

    def _save(self, kind: str) -> AdapterSaved:
        self.stepper.trainable()
        path = self.saves.save(self.config, self.state.step, kind)
        if self._reference is not None:
            self._reference.save(self.saves.folder, self.saves.write_file)
        return AdapterSaved(self.state.step, str(path), kind)

    def restore_best(self) -> None:
        """After `restore`, write the adapter of the best update to best/.

        Does nothing if best/ holds it already, or if neither the run nor the folder has a best adapter. Raises OSError
        and FolderError.
        """
        self.saves.restore_best(self.config, self.state.best_step)

    def _finish(self, reason: str) -> RunFinished:
        state = self.state
        self.finished = RunFinished(
            state.step,
            reason,
            state.seconds,
            state.tokens,
            state.target_tokens,
            state.best_loss,
            state.best_step,
            str(self.saves.folder),
            learned=state.learned_step > 0,
        )
        return self.finished

    def close(self) -> None:
        """Detach the adapter and unfreeze the whole model. Weights trained by `full` stay trained."""
        adapters.detach_adapter(self.model)
        self.model.unfreeze()


def _had_signal(update: Update, metrics: dict[str, float], learning_rate: float) -> bool:
    """Whether an update had a learning signal. If all rewards are equal, the gradient is only rounding error."""
    return learning_rate > 0 and update.gradient_norm > 0 and metrics.get("zero_variance_groups", 0.0) < 1


def _disk_error(folder: Path, error: OSError) -> str:
    return (
        f"{folder} cannot be written: {error.strerror or error}. Nothing in memory is lost. Free disk space or fix the "
        "folder and `%finetune run` again, or continue in another one with `%finetune save OTHER_FOLDER`."
    )
