"""What a click in the panel does. It asks; it never trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.yaml_text import read_value
from mlx_nb.errors import CommandError, MlxNbError
from mlx_nb.events import (
    AdapterSaved,
    BatchSkipped,
    Evaluate,
    EvaluationCompleted,
    Event,
    Request,
    RequestRefused,
    Rewind,
    Rewound,
    RunFinished,
    RunPaused,
    RunState,
    Sample,
    SampleGenerated,
    Save,
    SettingChanged,
    Skip,
    Stop,
)
from mlx_nb.view.event_text import AT_NO_UPDATE, describe, setting_words
from mlx_nb.view.panel.chat import Chat
from mlx_nb.view.panel.looks import Looks
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.state import cannot_begin, shown_path, visible

Message = Mapping[str, Any]
# Results of what was clicked; else they are no news, for they come by themselves all the time.
_AWAITED: dict[type[Event], str] = {
    AdapterSaved: "save",
    EvaluationCompleted: "evaluate",
    SampleGenerated: "sample",
}


# States of a run that stands and can go on.
_MOVABLE = ("built", "paused", "failed")


def useful_clicks(run: RunHandle) -> list[str]:
    """The names of what it makes sense to click now."""
    state = run.state
    if run.let_go:
        return []
    running, prepared = state == RunState.RUNNING, run.prepared
    can_train = not running and not run.over and not cannot_begin(run)
    useful = {
        "run": can_train,
        "step": can_train,
        "pause": running,
        "cancel": run.cancellable,
        "stop": running or (state in _MOVABLE and prepared),
        "save": prepared,
        "evaluate": prepared and run.trainer.validates,
        "sample": prepared and bool(run.config.sample_prompts),
        "rewind": run.step_count > 0,
        "skip": state == RunState.FAILED and prepared and not run.over,
        "set": not cannot_begin(run),
        "keep": not cannot_begin(run),
        "chat": prepared or state in (RunState.BUILT, RunState.PAUSED),
    }
    return [name for name, is_useful in useful.items() if is_useful]


def result_of(event: Event, awaited: set[str], config: RunConfig) -> str:
    """What to say in the panel about an event; empty where there is nothing to say. What was `awaited` is, once."""
    kind = _AWAITED.get(type(event))
    if kind is not None:
        if kind not in awaited:
            return ""
        awaited.discard(kind)
    match event:
        case AdapterSaved():
            return f"saved to {shown_path(event.path, config)}"
        case SampleGenerated():
            return f"the kept prompts are answered at update {event.step}"
        case RunPaused():
            why = "" if event.reason in ("asked to pause", "") else f": {event.reason}"
            return f"paused after update {event.step}{why}"
        case RunFinished():
            saved = f"; saved to {shown_path(event.path, config)}" if event.path else ""
            return f"finished after update {event.step} ({event.reason}){saved}"
        case EvaluationCompleted() | RequestRefused() | Rewound() | SettingChanged() | BatchSkipped():
            return describe(event)
    return ""


class Clicked(Protocol):
    """What the acts need of a panel."""

    chat: Chat
    looks: Looks
    awaited: set[str]

    @property
    def run(self) -> Any:
        """The run."""

    def refresh(self) -> None:
        """Tell the page how the run is now."""

    def show_again(self, name: str) -> None:
        """Tell the page one of the lists, which may have changed."""

    def say(self, text: str, *, bad: bool = False) -> None:
        """Say what came of a click."""

    def send(self, content: Any, buffers: Any = None) -> None:
        """Send a message to the page."""


class Clicks:
    """The acts of one panel by name, each with the message that the page sent."""

    def __init__(self, panel: Clicked) -> None:
        self._panel = panel

    def act(self, message: Message) -> None:
        """Do what a message asks. Raises MlxNbError with the reason when it cannot be done."""
        acts: dict[str, Callable[[Message], None]] = {
            "run": lambda _: self._start(None),
            "step": lambda told: self._start(int(told["updates"])),
            "stop": lambda _: self._request(Stop()),
            "save": lambda _: self._request(Save(), "save"),
            "evaluate": lambda _: self._request(Evaluate(), "evaluate"),
            "sample": lambda _: self._request(Sample(), "sample"),
            "skip": lambda _: self._request(Skip()),
            "rewind": lambda told: self._request(Rewind(max(0, int(told["to"])))),
            "set": lambda told: self._set(told["name"], told["text"]),
            "keep": lambda told: self._keep(told["prompt"]),
            "forget": lambda told: self._forget(told["prompt"]),
            "chat": lambda told: self._say(told["text"], bool(told.get("base"))),
            "new chat": lambda _: self._panel.chat.begin_anew(),
            "keep last": lambda _: self._keep(self._panel.chat.last_asked),
            "delete": lambda told: self._delete(told["save"]),
        }
        act = acts.get(message["do"])
        if act is None:
            raise CommandError(f"the panel does not know {message['do']!r}. Run the cell again for a new one.")
        act(message)

    def look(self, message: Message) -> None:
        """Answer what the page asks to see; what cannot be shown is said in its place."""
        looks = self._panel.looks
        asked = {name: value for name, value in message.items() if name not in ("look", "id")}
        looked: dict[str, Callable[..., dict[str, Any]]] = {
            "rows": looks.rows,
            "row": looks.row,
            "batch": looks.batch,
            "rollout": looks.rollout,
            "compare": self._compare,
        }
        try:
            told = looked[message["look"]](**asked)
        except MlxNbError as error:
            told = {"error": str(error)}
        self._panel.send({"kind": "answer", "id": message["id"], **told})

    def _start(self, updates: int | None) -> None:
        self._panel.run.start(updates)
        self._panel.refresh()

    def _request(self, request: Request, awaited: str = "") -> None:
        """Have something done at the next boundary; when the run does not move, now."""
        if awaited:
            self._panel.awaited.add(awaited)
        self._panel.run.request(request)
        self.applied()

    def applied(self) -> None:
        """A run that stands still is woken to read its requests, without an update."""
        run = self._panel.run
        if not run.active and (run.prepared or run.state in (RunState.BUILT, RunState.PAUSED)):
            run.start(0)

    def _set(self, name: str, text: str) -> None:
        run = self._panel.run
        old = getattr(run.config, name, None)
        try:
            value = read_value(text)
            if value == old:
                return
            run.set(**{name: value})
        except MlxNbError:
            self._panel.show_again("settings")
            raise
        when = AT_NO_UPDATE if run.over else "from the next update on"
        self._panel.say(f"{name}: {setting_words(old)} → {setting_words(value)}, {when}")
        self._panel.show_again("settings")
        self.applied()

    def _keep(self, prompt: str) -> None:
        run, text = self._panel.run, prompt.strip()
        kept = list(run.config.sample_prompts or ())
        if text and text not in kept:
            run.set(sample_prompts=[*kept, text])
        self._request(Sample(), "sample")
        self._panel.show_again("samples")

    def _forget(self, prompt: str) -> None:
        run = self._panel.run
        kept = [one for one in run.config.sample_prompts or () if visible(one) != prompt]
        run.set(sample_prompts=kept or None)
        self._panel.say("the prompt is not kept any more; its answers stay")
        self._panel.show_again("samples")
        self.applied()

    def _say(self, text: str, base: bool) -> None:
        self._panel.chat.say(text, self._panel.run.step_count, base=base)

    def ask(self, question: Any) -> None:
        """Have a question of the chat answered."""
        self._panel.run.ask(question)
        self.applied()

    def _compare(self, save: int) -> dict[str, Any]:
        return {"rows": [list(row) for row in self._panel.run.compare_checkpoint(self._checkpoint(save))]}

    def _delete(self, save: int) -> None:
        info = self._checkpoint(save)
        self._panel.run.delete_checkpoint(info)
        self._panel.say(f"{info.path.name} is removed")
        self._panel.show_again("checkpoints")

    def _checkpoint(self, save: int) -> Any:
        for info in self._panel.run.checkpoints():
            if info.save == save:
                return info
        self._panel.show_again("checkpoints")
        raise CommandError("this checkpoint no longer exists.")
