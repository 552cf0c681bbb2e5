"""Parts of a batch at the same time: they are its rows, each whole, and give what the batch gives."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_nb.data.batches import pad, pad_pairs, split_rows
from mlx_nb.data.preference_examples import PreferenceExample
from mlx_nb.model import backend, lanes
from mlx_nb.model.logprobs import TargetScorer, target_inputs, target_values
from mlx_nb.train.reference import ReferenceLogprobs
from test_methods import ROWS, run_of
from tiny import random_examples, tiny_model

LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0}
LIBRARY = backend.prepare_backend().library
in_openblas = pytest.mark.skipif(LIBRARY is None, reason="lanes are for Linux CPUs, where OpenBLAS is loaded")


@pytest.fixture
def two_lanes(monkeypatch):
    """Two lanes for batches of any size, on any machine."""
    monkeypatch.setattr(lanes, "_TOKENS_IN_A_LANE", 1)
    for module in ("mlx_nb.model.lanes", "mlx_nb.train.trainer", "mlx_nb.train.feeds", "mlx_nb.train.rollout_feed"):
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


@in_openblas
def test_products_take_one_thread_inside_and_as_many_as_before_after_an_error():
    before = LIBRARY.openblas_get_num_threads()
    seen = []

    def broken_off():
        with backend.one_blas_thread():
            seen.append(LIBRARY.openblas_get_num_threads())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert seen == [1]
    assert LIBRARY.openblas_get_num_threads() == before


@in_openblas
def test_a_cpu_has_a_lane_for_each_thread_of_its_blas():
    assert lanes.lane_count() == LIBRARY.openblas_get_num_threads()
    count = lanes.lane_count()
    with backend.one_blas_thread():
        assert lanes.lane_count() == count


@pytest.mark.parametrize("method", ROWS)
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


@pytest.mark.parametrize("method", ROWS)
def test_a_run_in_lanes_goes_back_and_on_again_bit_for_bit(method, tmp_path, tiny_folder, two_lanes):
    straight, rewound = (run_of(method, tmp_path / name, tiny_folder, iters=5) for name in ("straight", "rewound"))
    straight.run()
    rewound.step(4)
    rewound.rewind(to=2)
    rewound.run()
    assert rewound.adapter_bytes() == straight.adapter_bytes()


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
