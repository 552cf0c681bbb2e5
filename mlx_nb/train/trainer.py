"""Trainer: an iterator of events. It computes and never shows; it moves only when asked."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_nb.config import RunConfig
from mlx_nb.data.batches import BatchPlan, TokenBatch, evaluation_batches, pad
from mlx_nb.data.examples import TokenizedExample
from mlx_nb.errors import CheckpointError, DataError, NonFiniteLoss
from mlx_nb.events import (
    ChangeSetting,
    CheckpointSaved,
    Evaluate,
    EvaluationCompleted,
    Event,
    Pause,
    Request,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    Save,
    SettingChanged,
    StepCompleted,
    Stop,
)
from mlx_nb.model import adapters
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.randomness import random_stream, seed_for
from mlx_nb.model.trees import named_arrays
from mlx_nb.objectives.sft import sft_loss
from mlx_nb.train.checkpoint import Checkpoint
from mlx_nb.train.optimizer import build_optimizer, learning_rate_at
from mlx_nb.train.step import Stepper

BEST_FOLDER = "best"


@dataclass
class TrainerState:
    """Where a run is. `step` counts updates done, `batches` micro-batches consumed, `seconds` time in updates."""

    step: int = 0
    batches: int = 0
    tokens: int = 0
    target_tokens: float = 0.0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_best: int = 0


@dataclass(frozen=True)
class TrainerExamples:
    """The rows of a run, tokenised. `valid` and `test` may be empty."""

    train: Sequence[TokenizedExample]
    valid: Sequence[TokenizedExample] = ()
    test: Sequence[TokenizedExample] = ()


class Trainer:
    """Trains `model` in place. `events()` yields what happens; control is the caller's between any two events.

    The adapter is attached here and taken out by `close`. Requests are read at step boundaries only.
    Raises DataError without training rows.
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
    ) -> None:
        if not examples.train:
            raise DataError("no training row is left. `%finetune rows` shows why each one was left out.")
        self.config = config
        self.model = model
        self.examples = examples
        self.name = name
        self.folder = folder
        self.notes = tuple(notes)
        self.state = TrainerState()
        self.finished: RunFinished | None = None
        self._pending: deque[Request] = deque()
        self._due: deque[tuple[str, str]] = deque()
        self._started = False
        # Compiled functions are traced once per shape, so there shapes are rounded up to fewer of them.
        self._width_multiple, self._target_multiple = (32, 64) if compiled else (1, 1)
        with random_stream(seed_for(config.seed, "adapter")):
            self.keys = adapters.attach_adapter(model, config)
            mx.eval(model.parameters())
        if config.resume_adapter_file:
            adapters.load_adapter_weights(model, config.resume_adapter_file)
        model.eval()
        self.scorer = TargetScorer(model)
        self.stepper = Stepper(model, build_optimizer(config), sft_loss, self.scorer, compiled=compiled)
        self._plan = BatchPlan([len(example.tokens) for example in examples.train], config.batch_size, config.seed)
        self.iters = config.iters or self._iters_for(config.epochs or 1.0)
        mx.reset_peak_memory()

    def _iters_for(self, epochs: float) -> int:
        return max(1, math.ceil(epochs * self._plan.batches_per_epoch / self.config.grad_accumulation_steps))

    def request(self, request: Request) -> None:
        """Ask for something at the next step boundary. Safe from a signal handler or a widget callback."""
        self._pending.append(request)

    def events(self, updates: int | None = None) -> Iterator[Event]:
        """Train for `updates` optimizer updates, or to the end of the run, yielding events on the way.

        Ends early after RunPaused, RunFinished or RunFailed. May be called again at any time to go on. An
        interrupt inside an update leaves everything as it was before that update.
        """
        done = 0
        if not self._started:
            self._started = True
            self._due.append(("start", ""))
        while True:
            while self._due:
                # Taken off the queue before it is done: what is half done when the person interrupts is not repeated.
                yield from self._do(*self._due.popleft())
            if self.finished is not None:
                return
            stopped = yield from self._read_requests()
            if stopped or done == updates:
                return
            try:
                event = self._update()
            except NonFiniteLoss as error:
                yield RunFailed(self.state.step, str(error), error.rows)
                return
            done += 1
            self._schedule_after_update()
            yield event

    def _do(self, what: str, how: str) -> Iterator[Event]:
        """Carry out one thing of the queue. It holds words, so that a checkpoint can keep it."""
        match what:
            case "start":
                return self._start()
            case "validate":
                return self._validate()
            case "save":
                return self._save(how)
            case _:
                return self._finish(how)

    def snapshot(self) -> Checkpoint:
        """Everything that the next update depends on, as it is at this step boundary."""
        arrays = {
            "parameters": dict(named_arrays(self.model.trainable_parameters())),
            "optimizer": dict(named_arrays(self.stepper.optimizer.state)),
        }
        state = {
            "trainer": asdict(self.state),
            "due": [list(item) for item in self._due],
            "started": self._started,
            "finished": self.finished and asdict(self.finished),
        }
        return Checkpoint(self.state.step, arrays, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a snapshot, bit for bit. Raises CheckpointError when it is of another model or optimizer."""
        parameters, optimizer = checkpoint.arrays["parameters"], checkpoint.arrays["optimizer"]
        ours = {
            "parameter": (parameters, dict(named_arrays(self.model.trainable_parameters()))),
            "optimizer state": (optimizer, dict(named_arrays(self.stepper.optimizer.state))),
        }
        for what, (theirs, here) in ours.items():
            for name in sorted(theirs.keys() | here.keys()):
                one, other = theirs.get(name), here.get(name)
                if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
                    raise CheckpointError(
                        f"the checkpoint of step {checkpoint.step} is of another run: {what} {name} does not fit. "
                        "Use the model, fine_tune_type, lora_parameters and optimizer that it was made with."
                    )
        self.model.update(tree_unflatten(list(parameters.items())))
        self.stepper.optimizer.state = tree_unflatten(list(optimizer.items()))
        self.state = TrainerState(**checkpoint.state["trainer"])
        finished = checkpoint.state["finished"]
        self.finished = None if finished is None else RunFinished(**finished)
        self._due = deque((what, how) for what, how in checkpoint.state["due"])
        self._started = checkpoint.state["started"]

    def _start(self) -> Iterator[Event]:
        yield RunStarted(
            self.state.step,
            self.name,
            self.iters,
            adapters.trainable_count(self.model),
            adapters.total_count(self.model),
            len(self.examples.train),
            len(self.examples.valid),
            self.notes,
        )
        if self.validates:
            yield from self._validate()

    @property
    def validates(self) -> bool:
        return bool(self.examples.valid) and self.config.steps_per_eval != -1

    def _schedule_after_update(self) -> None:
        """Queue what is due at this boundary, so that it is done even if the caller pauses right after the update."""
        step, last = self.state.step, self.state.step >= self.iters
        every = self.config.steps_per_eval or max(1, self.iters // 5)
        if self.validates and (last or step % every == 0):
            self._due.append(("validate", ""))
        if last:
            self._due.append(("finish", "iters reached"))
        elif self.config.save_every > 0 and step % self.config.save_every == 0:
            self._due.append(("save", "step"))

    def _read_requests(self) -> Generator[Event, None, bool]:
        """Carry out what was asked. The generator's value is True when training must not go on now."""
        while self._pending:
            match self._pending.popleft():
                case Pause(reason):
                    yield RunPaused(self.state.step, reason)
                    return True
                case Stop():
                    yield from self._finish("stopped")
                    return True
                case Save():
                    yield from self._save("last")
                case Evaluate():
                    yield from self._validate()
                case ChangeSetting(name, value):
                    yield self._change(name, value)
        return False

    def _change(self, name: str, value: Any) -> SettingChanged:
        old = getattr(self.config, name)
        self.config = self.config.with_live(name, value)
        return SettingChanged(self.state.step, name, old, getattr(self.config, name))

    def _update(self) -> StepCompleted:
        config, state = self.config, self.state
        started = time.perf_counter()
        batches = self.next_batches()
        rows = tuple(row for batch in batches for row in batch.rows)
        learning_rate = learning_rate_at(config, self.iters, state.step)
        update = self.stepper.update(
            [target_inputs(batch, self._target_multiple) for batch in batches],
            learning_rate=learning_rate,
            grad_clip=config.grad_clip,
            seed=seed_for(config.seed, "dropout", state.step),
            rows=rows,
        )
        seconds = time.perf_counter() - started
        tokens = sum(sum(batch.lengths) for batch in batches)
        state.step += 1
        state.batches += len(batches)
        state.tokens += tokens
        state.target_tokens += update.units
        state.seconds += seconds
        return StepCompleted(
            step=state.step,
            loss=update.loss,
            learning_rate=learning_rate,
            gradient_norm=update.gradient_norm,
            target_tokens=update.units,
            tokens=tokens,
            seconds=seconds,
            peak_memory=mx.get_peak_memory(),
            epoch=state.batches / self._plan.batches_per_epoch,
            rows=rows,
            metrics=update.metrics,
            row_losses=tuple(zip(rows, update.row_losses)),
        )

    def _train_batch(self, index: int) -> TokenBatch:
        chosen = self._plan.batch(index)
        return pad([self.examples.train[position] for position in chosen], self._width_multiple)

    def next_batches(self) -> list[TokenBatch]:
        """The very arrays of the next update, one for each micro-batch."""
        return [self._train_batch(self.state.batches + i) for i in range(self.config.grad_accumulation_steps)]

    def evaluate(self, split: str = "valid", *, all_rows: bool = False) -> EvaluationCompleted:
        """Loss over a fixed set of rows of `split`, or all, weighted by token. Changes nothing in the run."""
        config = self.config
        examples = {"train": self.examples.train, "valid": self.examples.valid, "test": self.examples.test}[split]
        if not examples:
            raise DataError(f"there are no rows in the {split} split to evaluate.")
        started = time.perf_counter()
        limit = -1 if all_rows else config.test_batches if split == "test" else config.val_batches
        chosen = evaluation_batches(
            [len(example.tokens) for example in examples], config.batch_size, limit, config.seed
        )
        total = units = 0.0
        row_losses: list[tuple[int, float]] = []
        for positions in chosen:
            batch = pad([examples[position] for position in positions], self._width_multiple)
            measured = self.stepper.evaluate(target_inputs(batch, self._target_multiple))
            total, units = total + measured.total, units + measured.units
            row_losses += zip(batch.rows, measured.row_losses)
        loss = total / units
        rows = sum(len(positions) for positions in chosen)
        seconds = time.perf_counter() - started
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return EvaluationCompleted(
            self.state.step, split, loss, perplexity, units, rows, seconds, row_losses=tuple(row_losses)
        )

    def _validate(self) -> Iterator[Event]:
        result, state = self.evaluate("valid"), self.state
        best = state.best_loss is None or result.loss < state.best_loss
        if best:
            state.best_loss, state.best_step, state.evaluations_without_best = result.loss, state.step, 0
        else:
            state.evaluations_without_best += 1
        yield replace(result, best=best)
        if best and state.step > 0:
            path = adapters.save_adapter(self.model, self.config, self.keys, self.folder / BEST_FOLDER)
            yield CheckpointSaved(state.step, str(path), "best")
        patience = self.config.early_stopping_patience
        if patience is not None and state.evaluations_without_best >= patience and state.step < self.iters:
            self._due.append(("finish", "early stopping"))

    def _save(self, kind: str) -> Iterator[Event]:
        if kind == "step":
            adapters.save_adapter(
                self.model,
                self.config,
                self.keys,
                self.folder,
                f"{self.state.step:07d}_{adapters.ADAPTER_FILE}",
            )
        path = adapters.save_adapter(self.model, self.config, self.keys, self.folder)
        yield CheckpointSaved(self.state.step, str(path), kind)

    def _finish(self, reason: str) -> Iterator[Event]:
        yield from self._save("last")
        if self.config.test and self.examples.test:
            yield self.evaluate("test")
        state = self.state
        self.finished = RunFinished(
            state.step,
            reason,
            state.seconds,
            state.tokens,
            state.target_tokens,
            state.best_loss,
            state.best_step,
            str(self.folder),
        )
        yield self.finished

    def close(self) -> None:
        """Take the adapter out of the model: it is again what was loaded."""
        adapters.detach_adapter(self.model)
        self.model.unfreeze()
