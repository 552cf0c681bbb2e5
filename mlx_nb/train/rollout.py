"""Rollouts: samples completions, scores them with the reward functions, and makes them into training batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch, evaluation_batches, pad
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.prompt import PromptExample
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError
from mlx_nb.events import Event, Progress, RolloutCompleted
from mlx_nb.model.lanes import lane_count, lanes_of
from mlx_nb.model.logprobs import TargetInputs, TargetScorer, accurate_target_logprobs, target_values
from mlx_nb.model.randomness import seed_for
from mlx_nb.objectives.build import options_for
from mlx_nb.process.interruptible import Interruptible
from mlx_nb.process.pieces import relayed
from mlx_nb.rollouts.advantages import Advantages, group_advantages
from mlx_nb.rollouts.completion_rows import Completion
from mlx_nb.rollouts.rewards.resolve import Reward, completion_batch
from mlx_nb.rollouts.rewards.score import Scores, score_completions
from mlx_nb.rollouts.sampling import SamplingSettings, sample_groups
from mlx_nb.train.batch_source import Measured
from mlx_nb.train.packing import packed_as_set
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from mlx_nb.train.step import Evaluation


class NoReward(DataError):
    """No completion of a rollout or evaluation got a reward."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """Completions with their prompts and scores, and the sampling time."""

    examples: list[PromptExample]
    completions: list[Completion]
    scores: Scores
    seconds: float


class Rollouts:
    """Samples rollouts: `group_size` completions of every prompt of an update, used for `updates_per_rollout` updates.

    `columns` are the columns of the rows that reward functions get. `user_code` is entered while a reward function
    runs, so that it can be interrupted.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        columns: tuple[str, ...],
        scorer: TargetScorer,
        tokenizer: Tokenizer,
        rewards: Sequence[Reward],
        reference: ReferenceLogprobs | None,
        width_multiple: int,
    ) -> None:
        self._config = config
        self._columns = columns
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._rewards = rewards
        # With a KL weight of 0 the forward pass of the reference is not needed.
        self._reference = reference if options_for(config).get("beta", 1.0) else None
        self._width_multiple = width_multiple
        self._batches: list[TokenBatch] = []
        self._updates_left = 0
        self.metrics: dict[str, float] = {}  # mean rewards and lengths of the completions
        self.user_code = Interruptible()

    @property
    def ready(self) -> bool:
        """Whether there are completions to train on."""
        return self._updates_left > 0

    def sample(
        self, step: int, first: int, prompts: Sequence[Sequence[PromptExample]]
    ) -> Generator[Event, None, Event]:
        """Sample and score completions of the `prompts` of the update that begins at micro-batch `first`.

        Nothing is changed before the end. Raises NoReward if no completion got a reward.
        """
        config = self._config
        seed = seed_for(config.seed, "rollout", first)
        sampled = yield from self._sample(step, [one for chosen in prompts for one in chosen], config.group_size, seed)
        self._require_reward(sampled.scores)
        scale = config.scale_rewards or method_named(config.method).loss(config.loss).scale_rewards
        advantages = group_advantages(sampled.scores.total_N, config.group_size, scale=scale)
        batches, start = [], 0
        for chosen in prompts:
            end = start + len(chosen) * config.group_size
            yield Progress(step, "reference", start, len(sampled.completions))
            batches.append(self._batch(sampled, advantages, slice(start, end)))
            start = end
        self._batches, self._updates_left = batches, config.updates_per_rollout
        self.metrics = {
            **self._measured(sampled),
            "reward_spread": _spread(sampled.scores.total_N, config.group_size),
            "zero_variance_groups": advantages.zero_variance_share,
        }
        return RolloutCompleted(
            step,
            self._groups(sampled, advantages),
            sampled.seconds,
            {reward.name: float(seconds) for reward, seconds in zip(self._rewards, sampled.scores.seconds_F)},
            tuple(problem.error for problem in sampled.scores.problems),
        )

    def _sample(
        self, step: int, prompts: Sequence[PromptExample], group_size: int, seed: int
    ) -> Generator[Event, None, Sampled]:
        config = self._config
        settings = SamplingSettings(
            config.max_completion_length, config.temperature, config.top_p, config.top_k, config.stop or ()
        )
        started = time.perf_counter()
        tokens = [example.prompt_tokens.tolist() for example in prompts]
        sampling = sample_groups(self._scorer.model, self._tokenizer, tokens, group_size, settings, seed)
        most = len(prompts) * group_size * config.max_completion_length
        completions = yield from relayed(sampling, lambda done: Progress(step, "completions", done, most))
        seconds = time.perf_counter() - started
        examples = [prompts[completion.prompt_index] for completion in completions]
        batch = completion_batch(
            examples, [one.text for one in completions], [one.tokens.tolist() for one in completions], self._columns
        )
        scoring = score_completions(self._rewards, config.reward_weights, batch, timeout=config.reward_timeout)
        scores = yield from relayed(
            scoring, lambda at: Progress(step, f"reward {at.function}", at.done, at.total), within=self.user_code
        )
        return Sampled(examples, completions, scores, seconds)

    def _require_reward(self, scores: Scores) -> None:
        """Raise NoReward if no completion has a reward, with the first error of a function that returned no number."""
        if np.isfinite(scores.total_N).any():
            return
        silent = [reward.name for reward, none in zip(self._rewards, np.isnan(scores.rewards_NF).all(axis=0)) if none]
        problem = next(one for one in scores.problems if not silent or one.function in silent)
        raise NoReward(f"no completion got a reward. {problem.error}")

    def _batch(self, sampled: Sampled, advantages: Advantages, chosen: slice) -> TokenBatch:
        completions, examples = sampled.completions[chosen], sampled.examples[chosen]
        batch = pad(
            [_as_example(prompt, completion) for prompt, completion in zip(examples, completions)], self._width_multiple
        )
        behavior_BT = np.zeros(batch.tokens_BT.shape, np.float32)
        for index, completion in enumerate(completions):
            behavior_BT[index, batch.lengths[index] - len(completion.tokens) : batch.lengths[index]] = (
                completion.logprobs
            )
        counts = [completion.finished or not self._config.mask_truncated_completions for completion in completions]
        batch = batch._replace(
            row_values={"advantage": advantages.advantage_N[chosen], "counts": np.array(counts, np.float32)},
            token_values={"behavior": behavior_BT},
        )
        batch = packed_as_set(batch, self._config.packing, self._scorer)
        return batch if self._reference is None else self._with_reference(batch, self._reference.scorer)

    def _with_reference(self, batch: TokenBatch, scorer: TargetScorer) -> TokenBatch:
        """Add the reference log-probabilities, at the sampling temperature like the policy's."""
        reference_BT = self._logprobs(batch._replace(packed=batch.packed and scorer.can_pack), scorer)
        return batch._replace(token_values={**batch.token_values, "reference": reference_BT})

    def _logprobs(self, batch: TokenBatch, scorer: TargetScorer) -> np.ndarray:
        """(B, T) log-probabilities at the sampling temperature, 0 on untrained tokens."""

        def tempered(logits_CV: mx.array, target_C: mx.array) -> tuple[mx.array]:
            logits_CV = logits_CV.astype(mx.float32) / self._config.temperature
            return (accurate_target_logprobs(logits_CV, target_C),)

        def logprobs(inputs: TargetInputs) -> mx.array:
            return scorer.at_targets(inputs, tempered)[0]

        scorer.refuse_beyond_memory(batch)
        logprobs_BT = np.zeros(batch.tokens_BT.shape, np.float32)
        parts = lanes_of(batch, lane_count())
        logprobs_BT[batch.loss_mask_BT != 0] = np.concatenate(target_values(parts, logprobs))
        return logprobs_BT

    def _measured(self, sampled: Sampled) -> dict[str, float]:
        rewards_NF, total_N = sampled.scores.rewards_NF, sampled.scores.total_N
        lengths = [len(completion.tokens) for completion in sampled.completions]
        known_N = total_N[np.isfinite(total_N)]
        measured = {
            "completion_tokens": float(np.mean(lengths)),
            "cut_off": float(np.mean([not completion.finished for completion in sampled.completions])),
        }
        if len(known_N):
            measured["reward"] = float(known_N.mean())
        for reward, values_N in zip(self._rewards, rewards_NF.T):
            if np.isfinite(values_N).any():
                measured[f"reward_{reward.name}"] = float(np.nanmean(values_N))
        return measured

    def _groups(self, sampled: Sampled, advantages: Advantages) -> tuple[dict[str, Any], ...]:
        names, size = [reward.name for reward in self._rewards], self._config.group_size
        scores = sampled.scores
        groups = []
        for start in range(0, len(sampled.completions), size):
            example = sampled.examples[start]
            completions = [
                {
                    "text": sampled.completions[n].text,
                    "rewards": {name: _plain(value) for name, value in zip(names, scores.rewards_NF[n])},
                    "reward": _plain(scores.total_N[n]),
                    "advantage": float(advantages.advantage_N[n]),
                    "tokens": len(sampled.completions[n].tokens),
                    "finished": sampled.completions[n].finished,
                }
                for n in range(start, start + size)
            ]
            groups.append({"row": example.row, "prompt": _text_of(example.prompt), "completions": completions})
        return tuple(groups)

    def batches(self, groups: Sequence[Sequence[Any]]) -> list[TokenBatch]:
        """The batches of the current rollout, one per micro-batch of prompts."""
        return self._batches

    def use_up(self) -> bool:
        """Count one update made with the completions. Returns whether it was the last."""
        self._updates_left -= 1
        return not self.ready

    def drop(self) -> None:
        """Drop the current rollout."""
        self._updates_left = 0

    def updates_of(self, rollouts: int) -> int:
        """The updates left in `rollouts` rollouts, including the current one."""
        each = self._config.updates_per_rollout
        return rollouts * each - (each - self._updates_left if self.ready and rollouts else 0)

    def log_ratios(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(row, tokens, log(current policy / sampling policy)) of each completion of the last rollout."""
        found = []
        for batch in self._batches:
            ratio_BT = self._logprobs(batch, self._scorer) - batch.token_values["behavior"]
            for index, row in enumerate(batch.rows):
                trained = batch.loss_mask_BT[index] != 0
                found.append((row, batch.tokens_BT[index][trained], ratio_BT[index][trained]))
        return found

    def measure(
        self,
        step: int,
        split: str,
        examples: Sequence[PromptExample],
        limit: int,
        loss_of: Callable[[TokenBatch], Evaluation],
    ) -> Generator[Event, None, Measured]:
        """Measure the reward of one completion per prompt, for a fixed set of prompts and fixed random numbers.

        The loss is minus the reward, so that lower is better. Raises NoReward.
        """
        config = self._config
        lengths = [example.length for example in examples]
        chosen = evaluation_batches(lengths, config.batch_size, limit, config.seed)
        prompts = [examples[position] for positions in chosen for position in positions]
        sampled = yield from self._sample(step, prompts, 1, seed_for(config.seed, "evaluation"))
        self._require_reward(sampled.scores)
        rewards = sampled.scores.total_N
        losses = [(example.row, -float(reward)) for example, reward in zip(prompts, rewards) if math.isfinite(reward)]
        mean = sum(loss for _, loss in losses) / len(losses)
        units = (1.0,) * len(losses)
        return Measured(mean, float(len(losses)), tuple(losses), self._measured(sampled), units)

    def snapshot(self) -> tuple[dict[str, mx.array], dict[str, Any] | None]:
        """The current rollout as arrays by name and plain values. A changed policy cannot sample it again."""
        if not self.ready:
            return {}, None
        arrays = {
            f"{number}.{name}": mx.array(array)
            for number, batch in enumerate(self._batches)
            for name, array in _arrays_of(batch).items()
        }
        shapes = [{"rows": batch.rows, "lengths": batch.lengths, "packed": batch.packed} for batch in self._batches]
        return arrays, {"batches": shapes, "updates_left": self._updates_left, "metrics": self.metrics}

    def restore(self, arrays: dict[str, mx.array], state: Any, prompts: Sequence[Sequence[PromptExample]]) -> None:
        """Restore the rollout of a snapshot if it belongs to these `prompts`; otherwise drop it."""
        self._batches, self._updates_left, self.metrics = [], 0, {}
        wanted = [[one.row for one in chosen for _ in range(self._config.group_size)] for chosen in prompts]
        if state is None or [list(shape["rows"]) for shape in state["batches"]] != wanted:
            return
        self._updates_left, self.metrics = state["updates_left"], dict(state["metrics"])
        self._batches = [
            _batch_of({name: np.array(arrays[f"{number}.{name}"]) for name in _names(arrays, number)}, shape)
            for number, shape in enumerate(state["batches"])
        ]


def _as_example(prompt: PromptExample, completion: Completion) -> TokenizedExample:
    tokens = np.concatenate([prompt.prompt_tokens, completion.tokens]).astype(np.int32)
    loss_mask = np.zeros(len(tokens), np.float32)
    loss_mask[len(prompt.prompt_tokens) :] = 1
    return TokenizedExample(tokens, loss_mask, prompt.row)


def _spread(total_N: np.ndarray, group_size: int) -> float:
    """The mean standard deviation of rewards within a group, over the known ones."""
    groups = [group[np.isfinite(group)] for group in total_N.reshape(-1, group_size)]
    return float(np.mean([group.std(ddof=1) if len(group) > 1 else 0.0 for group in groups]))


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _text_of(prompt: Any) -> str:
    """A prompt as readable text, one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _arrays_of(batch: TokenBatch) -> dict[str, np.ndarray]:
    arrays = {"tokens": batch.tokens_BT, "loss_mask": batch.loss_mask_BT}
    arrays.update({f"row.{name}": value for name, value in batch.row_values.items()})
    arrays.update({f"token.{name}": value for name, value in batch.token_values.items()})
    return arrays


def _names(arrays: dict[str, mx.array], number: int) -> list[str]:
    prefix = f"{number}."
    return [name[len(prefix) :] for name in arrays if name.startswith(prefix)]


def _batch_of(arrays: dict[str, np.ndarray], shape: dict[str, Any]) -> TokenBatch:
    def having(prefix: str) -> dict[str, np.ndarray]:
        return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}

    return TokenBatch(
        arrays["tokens"],
        arrays["loss_mask"],
        tuple(shape["rows"]),
        tuple(shape["lengths"]),
        having("row."),
        having("token."),
        shape.get("packed", False),
    )
