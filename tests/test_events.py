"""Events turn into JSON lines and back."""

from __future__ import annotations

import json

import pytest

from mlx_nb import events
from mlx_nb.events import RunState

EXAMPLES = [
    events.RunStarted(0, "run", 10, 100, 1000, 20, 4, ("a note",)),
    events.StepCompleted(3, 1.25, 1e-4, 0.5, 12.0, 40, 0.1, 1000, 0.3, (4, 7), {"margin": 0.1}),
    events.EvaluationCompleted(3, "valid", 1.0, 2.718, 40.0, 4, 0.2, True),
    events.EvaluationCompleted(3, "valid", -0.5, None, 8.0, 8, 0.2, metrics={"reward": 0.5}),
    events.RolloutCompleted(
        3,
        (
            {
                "row": 7,
                "prompt": "say red",
                "completions": [
                    {
                        "text": "red",
                        "rewards": {"short": 1.0, "right": None},
                        "reward": 1.0,
                        "advantage": 0.0,
                        "tokens": 2,
                        "finished": True,
                    }
                ],
            },
        ),
        0.2,
        ("right: no number for completion 0",),
    ),
    events.AdapterSaved(3, "adapters/run", "best"),
    events.CheckpointSaved(3, "adapters/run/checkpoints/save-0001-step-0000003-best", "best"),
    events.SettingChanged(3, "learning_rate", 1e-4, 5e-5),
    events.RunPaused(3, "interrupted"),
    events.RunFinished(10, "iters reached", 1.0, 400, 120.0, 1.0, 3, "adapters/run"),
    events.RunFailed(3, "not finite", "loss is nan", (4, 7), (("a.lora_a", 1.5),)),
    events.BatchSkipped(3, (4, 7)),
    events.MemoryLow(3, 90, 100),
    events.DataChanged(3, "data/train.jsonl"),
    events.LossSpiked(3, "loss is 9.000"),
    events.NothingLearned(10, 10),
    events.SampleGenerated(3, "Hello", "Hi", None),
    events.Progress(3, "sample", 2, 64),
    events.DataChanged(3, "rows.jsonl"),
    events.StateChanged(3, "running"),
    events.RequestRefused(3, "no such update"),
    events.Rewound(4, 6, 12),
]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_survives_json(event):
    assert events.event_from_json(event.to_json()) == event


def test_every_event_type_is_tried_here():
    assert {type(event) for event in EXAMPLES} == set(events.EVENT_TYPES.values())


def test_the_state_of_a_run_is_its_word():
    assert {str(state) for state in RunState} == {"built", "running", "paused", "stopped", "finished", "failed"}
    assert RunState.PAUSED == "paused"
    assert repr(RunState.PAUSED) == "'paused'"
    assert json.dumps(RunState.PAUSED) == '"paused"'
