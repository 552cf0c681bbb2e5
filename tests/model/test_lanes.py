"""Parts of a batch at the same time: they are its rows, each whole, and give what the batch gives."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from method_runs import ROWS, run_of
from mlx_nb.data.examples.batches import pad, pad_pairs, split_rows
from mlx_nb.data.examples.preference import PreferenceExample
from mlx_nb.errors import DataError
from mlx_nb.model import backend, lanes, logprobs
from mlx_nb.model.logprobs import TargetScorer, accurate_logsumexp, target_inputs, target_values
from mlx_nb.objectives.base import LossSum, joined
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from tiny import random_examples, tiny_model

LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0}
LIBRARY = backend.prepare_backend().library
in_openblas = pytest.mark.skipif(LIBRARY is None, reason="lanes are for Linux CPUs, where OpenBLAS is loaded")


@pytest.fixture
def two_lanes(monkeypatch):
    """Two lanes for batches of any size, on any machine."""
    monkeypatch.setattr(lanes, "_TOKENS_IN_A_LANE", 1)
    for module in ("mlx_nb.model.lanes", "mlx_nb.train.trainer", "mlx_nb.train.batch_source", "mlx_nb.train.rollout"):
        monkeypatch.setattr(f"{module}.lane_count", lambda: 2)


def pairs(count):
    examples = random_examples(2 * count)
    return [
        PreferenceExample(examples[2 * row], examples[2 * row + 1], 3, row, weight=float(row), margin=float(-row))
        for row in range(count)
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_rows_stay_whole_and_in_order_and_both_answers_of_a_pair_together(parts):
    batch = pad_pairs(pairs(5))
    found = split_rows(batch._replace(token_values={"reference": batch.tokens_BT * 2.0}), parts)
    assert len(found) == min(parts, 5)
    assert [row for part in found for row in part.rows] == list(range(5))
    for part in found:
        chosen = len(part.rows)
        assert len(part.lengths) == len(part.tokens_BT) == 2 * chosen
        assert part.row_values["weight"].tolist() == [float(row) for row in part.rows]
        assert part.row_values["margin"].tolist() == [float(-row) for row in part.rows]
        assert (part.token_values["reference"] == part.tokens_BT * 2).all()
        for index, row in enumerate(part.rows):
            for line, whole in ((index, row), (index + chosen, row + 5)):
                assert part.lengths[line] == batch.lengths[whole]
                assert (part.tokens_BT[line] == batch.tokens_BT[whole]).all()
                assert (part.loss_mask_BT[line] == batch.loss_mask_BT[whole]).all()


def test_a_batch_of_few_tokens_is_not_cut():
    batch = pad(random_examples(8, shortest=16, longest=16))
    assert [len(lanes.lanes_of(batch, most)) for most in (1, 2, 4)] == [1, 2, 2]
    assert len(lanes.lanes_of(pad(random_examples(2)), 4)) == 1


class Library:
    """OpenBLAS's number of threads."""

    def __init__(self):
        self.threads, self.seen = 4, []

    def openblas_set_num_threads(self, threads):
        self.threads = threads


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(backend, "_prepared", backend.Blas("", "", found, threads=4))
    return found


def test_products_take_one_thread_inside_and_as_many_as_before_after_an_error(library):
    def broken_off():
        with backend.one_blas_thread():
            library.seen.append(library.threads)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert (library.seen, library.threads) == ([1], 4)


def test_products_take_one_thread_until_the_last_is_done(library):
    first, second = backend.one_blas_thread(), backend.one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert library.threads == 1
    second.__exit__(None, None, None)
    assert library.threads == 4


def test_each_part_is_on_a_stream_of_its_own_and_evaluated_with_one_thread(library, monkeypatch):
    streams, threads, real = [], [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (threads.append(library.threads), real(*arrays)))

    def product(inputs):
        streams.append(mx.default_stream(mx.cpu))
        return inputs.weight_S * 2

    values = target_values([pad([example]) for example in random_examples(3)], product)
    assert len(values) == 3
    assert [streams.count(stream) for stream in streams] == [1, 1, 1]
    assert threads[-1] == 1
    assert mx.default_stream(mx.cpu) not in streams[1:]


def test_an_update_evaluates_its_parts_with_one_thread_and_a_whole_batch_with_all(library, tmp_path, tiny_folder):
    run = run_of("sft", tmp_path, tiny_folder, batch_size=8, val_set_size=0, steps_per_eval=-1)
    (batch, *_), stepper = run.trainer.next_batches(), run.trainer.stepper
    lanes.in_lanes(str, ["a", "b"])  # the first lanes of a process make their streams, with an evaluation of their own
    threads, real = [], mx.eval
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "_TOKENS_IN_A_LANE", 1)
        patch.setattr(mx, "eval", lambda *arrays: (threads.append(library.threads), real(*arrays)))
        for stepper.lanes in (1, 2):
            stepper.gradients([batch], seed=0)
    assert threads == [4, 1]


def test_without_lanes_everything_stays_on_the_stream_of_the_device(monkeypatch):
    monkeypatch.setattr(backend, "is_cpu", lambda: False)
    monkeypatch.setattr(mx, "stream", lambda stream: pytest.fail("a stream was chosen"))
    assert lanes.lane_count() == 1
    assert lanes.in_lanes(lambda part: part + 1, [1, 2, 3]) == [2, 3, 4]


@pytest.mark.long
@in_openblas
def test_other_processes_do_not_inherit_the_order_of_lanes():
    code = (
        "from mlx_nb.model import backend, lanes; import os; backend.prepare_backend();"
        "before = os.environ[backend.ORDER_VARIABLE]; lanes.in_lanes(lambda part: part, [1, 2]);"
        "print(before, backend.ORDER_VARIABLE in os.environ)"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    environment.pop(backend.ORDER_VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["32", "False"]


@in_openblas
def test_a_cpu_has_a_lane_for_each_thread_of_its_blas():
    assert lanes.lane_count() == LIBRARY.openblas_get_num_threads()
    count = lanes.lane_count()
    with backend.one_blas_thread():
        assert lanes.lane_count() == count


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.matrix(every=3)
def test_an_update_in_lanes_is_the_update_of_the_whole_batch(method, tmp_path, tiny_folder, two_lanes):
    run = run_of(method, tmp_path, tiny_folder, val_set_size=0, steps_per_eval=-1, batch_size=6, lora_parameters=LORA)
    run.step()  # from here on the policy is not the reference
    (batch, *_), stepper = run.trainer.next_batches(), run.trainer.stepper
    found = []
    for stepper.lanes in (1, 2, 3):
        assert len(stepper._parts(batch)) == stepper.lanes
        found.append((stepper.gradients([batch], seed=0), stepper.evaluate(batch)))
    (whole, evaluated), *cut = found
    assert whole.loss != 0
    for one, evaluation in cut:
        assert one.loss == pytest.approx(whole.loss, rel=1e-4, abs=1e-5)
        assert one.units == pytest.approx(whole.units)
        assert one.metrics == pytest.approx(whole.metrics, rel=1e-3, abs=1e-4)
        assert one.row_losses == pytest.approx(whole.row_losses, rel=1e-3, abs=1e-4)
        assert evaluation.total == pytest.approx(evaluated.total, rel=1e-4, abs=1e-4)
        assert evaluation.row_losses == pytest.approx(evaluated.row_losses, rel=1e-3, abs=1e-4)
        for (name, ours), (_, theirs) in zip(tree_flatten(one.gradients), tree_flatten(whole.gradients), strict=True):
            assert mx.allclose(ours, theirs, rtol=1e-3, atol=1e-5).item(), name


@pytest.mark.long
@pytest.mark.parametrize("method", ROWS)
def test_a_run_in_lanes_goes_back_and_on_again_bit_for_bit(method, tmp_path, tiny_folder, two_lanes):
    straight, rewound = (run_of(method, tmp_path / name, tiny_folder, iters=5) for name in ("straight", "rewound"))
    straight.run()
    rewound.step(4)
    rewound.rewind(to=2)
    rewound.run()
    assert rewound.adapter_bytes() == straight.adapter_bytes()


def test_a_metric_that_only_some_rows_have_is_kept():
    def part(value, **metrics):
        row = mx.array([value])
        return LossSum(
            mx.array(value), mx.array(1.0), {n: (mx.array(v), mx.array(1.0)) for n, v in metrics.items()}, row, row
        )

    sums = joined([part(1.0, a=2.0), part(2.0, a=3.0, b=4.0), part(3.0, b=5.0)])
    assert (sums.total.item(), sums.units.item(), sums.row_total_R.tolist()) == (6.0, 3.0, [1.0, 2.0, 3.0])
    found = {name: (total.item(), divisor.item()) for name, (total, divisor) in sums.metrics.items()}
    assert found == {"a": (5.0, 2.0), "b": (9.0, 2.0)}


def test_a_part_in_which_no_completion_counts_changes_no_metric(tmp_path, tiny_folder, two_lanes):
    run = run_of("grpo", tmp_path, tiny_folder, val_set_size=0, steps_per_eval=-1, batch_size=6, lora_parameters=LORA)
    run.step()
    (batch, *_), stepper = run.trainer.next_batches(), run.trainer.stepper
    counts = np.zeros(len(batch.rows), np.float32)
    counts[:2] = 1.0
    batch = batch._replace(row_values={**batch.row_values, "counts": counts})
    found = []
    for stepper.lanes in (1, 3):
        found.append(stepper.gradients([batch], seed=0).metrics)
    assert found[0].keys() == found[1].keys() >= {"entropy", "clipped", "kl"}
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("function", [accurate_logsumexp, logprobs._logsumexp])
def test_log_sum_exp_and_its_gradient_at_all_sizes(function):
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 1024)).astype(np.float32) * np.array([[1, 10, 100, 1e-3, 1, 1e30]], np.float32).T
    logits[4, :512] = -np.inf  # a padded vocabulary
    exact = logits.astype(np.float64)
    largest = exact.max(axis=-1, keepdims=True)
    expected = np.log(np.exp(exact - largest).sum(axis=-1)) + largest[:, 0]
    values = mx.array(logits)
    assert np.allclose(np.array(function(values)), expected, rtol=2e-6, atol=2e-5)
    gradient = np.array(mx.grad(lambda x: (function(x) * mx.arange(1, 7)).sum())(values))
    softmax = np.exp(exact - expected[:, None]) * np.arange(1, 7)[:, None]
    assert np.allclose(gradient[:5], softmax[:5], rtol=1e-4, atol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_log_sum_exp_of_infinities_is_mlx_own(value):
    logits = mx.array([[1.0, value, 2.0], [value, value, value]])
    assert logprobs._logsumexp(logits).tolist() == mx.logsumexp(logits, axis=-1).tolist()


def test_a_batch_without_a_target_is_refused():
    (example,) = random_examples(1)
    batch = pad([example])
    with pytest.raises(DataError, match="rows 0: no token is trained"):
        target_inputs(batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT)))


def test_the_numbers_of_a_row_do_not_depend_on_what_it_is_measured_beside(two_lanes):
    scorer = TargetScorer(tiny_model())
    examples = random_examples(5, shortest=10, longest=60)
    together = ReferenceLogprobs(lambda: scorer, "").fill(pad(examples)).token_values["reference"]
    for index, example in enumerate(examples):
        alone = ReferenceLogprobs(lambda: scorer, "").fill(pad([example])).token_values["reference"][0]
        assert np.array_equal(together[index, : len(alone)], alone)
        (values,) = target_values([pad([example])], scorer.logprobs)
        assert np.array_equal(alone[example.loss_mask != 0], values)
        assert np.allclose(values, np.array(scorer.logprobs(target_inputs(pad([example])))), atol=1e-5)


WIDE = """
import mlx.core as mx
mx.reset_peak_memory()
branches = [mx.sin(mx.full((1000, 1000), float(one))).sum() for one in range(200)]
mx.eval(mx.stack(branches).sum())
print(mx.get_peak_memory())
"""


@pytest.mark.long
@in_openblas
def test_lanes_take_little_more_memory_in_graphs_of_other_code():
    """200 branches of 4 MB: mlx alone has 20 at a time, 80 MB; with two lanes it may have 32 of them."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    environment.pop(backend.ORDER_VARIABLE, None)
    code = f"from mlx_nb.model.backend import prepare_backend; prepare_backend()\n{WIDE}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 5e6


def test_arrays_one_by_one_are_the_arrays():
    tree = {"a": mx.arange(3), "b": [mx.array(2.0), {"c": mx.ones((2, 2))}]}
    chained = lanes.one_by_one(tree)
    for (name, one), (other_name, other) in zip(tree_flatten(tree), tree_flatten(chained), strict=True):
        assert name == other_name
        assert mx.array_equal(one, other).item()
