"""Handles clicks in the panel by sending requests to the run; it never trains itself."""

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
from mlx_nb.view.panel.page_requests import PageRequests
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.state import cannot_begin, shown_path, visible

Message = Mapping[str, Any]
# Events to report only if a click requested them, because they also occur regularly.
_AWAITED: dict[type[Event], str] = {
    AdapterSaved: "save",
    EvaluationCompleted: "evaluate",
    SampleGenerated: "sample",
}


# States of an idle run that can continue.
_MOVABLE = ("built", "paused", "failed")


def useful_clicks(run: RunHandle) -> list[str]:
    """The names of the buttons to enable now."""
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
    """The message in the panel for an event, or empty. Removes the event from `awaited`."""
    kind = _AWAITED.get(type(event))
    if kind is not None:
        if kind not in awaited:
            return ""
        awaited.discard(kind)
    match event:
        case AdapterSaved():
            return f"saved to {shown_path(event.path, config)}"
        case SampleGenerated():
            return f"answered the sample prompts at update {event.step}"
        case RunPaused():
            why = "" if event.reason in ("pause requested", "") else f": {event.reason}"
            return f"paused after update {event.step}{why}"
        case RunFinished():
            saved = f"; saved to {shown_path(event.path, config)}" if event.path else ""
            return f"finished after update {event.step} ({event.reason}){saved}"
        case EvaluationCompleted() | RequestRefused() | Rewound() | SettingChanged() | BatchSkipped():
            return describe(event)
    return ""


class Clicked(Protocol):
    """The part of a panel that the actions use."""

    chat: Chat
    page_requests: PageRequests
    awaited: set[str]

    @property
    def run(self) -> Any:
        """The run."""

    def refresh(self) -> None:
        """Send the current state of the run to the page."""

    def show_again(self, name: str) -> None:
        """Send one of the lists to the page again."""

    def say(self, text: str, *, bad: bool = False) -> None:
        """Show the result of a click."""

    def send(self, content: Any, buffers: Any = None) -> None:
        """Send a message to the page."""


class Clicks:
    """The actions of one panel, each called with a message from the page."""

    def __init__(self, panel: Clicked) -> None:
        self._panel = panel

    def act(self, message: Message) -> None:
        """Carry out a message. Raises MlxNbError with the reason if that is not possible."""
        acts: dict[str, Callable[[Message], None]] = {
            "run": lambda _: self._start(None),
            "step": lambda message: self._start(int(message["updates"])),
            "stop": lambda _: self._request(Stop()),
            "save": lambda _: self._request(Save(), "save"),
            "evaluate": lambda _: self._request(Evaluate(), "evaluate"),
            "sample": lambda _: self._request(Sample(), "sample"),
            "skip": lambda _: self._request(Skip()),
            "rewind": lambda message: self._request(Rewind(max(0, int(message["to"])))),
            "set": lambda message: self._set(message["name"], message["text"]),
            "keep": lambda message: self._keep(message["prompt"]),
            "forget": lambda message: self._forget(message["prompt"]),
            "chat": lambda message: self._say(message["text"], bool(message.get("base"))),
            "new chat": lambda _: self._panel.chat.restart(),
            "keep last": lambda _: self._keep(self._panel.chat.last_message),
            "delete": lambda message: self._delete(message["save"]),
        }
        act = acts.get(message["do"])
        if act is None:
            raise CommandError(f"the panel does not know {message['do']!r}. Run the cell again for a new one.")
        act(message)

    def reply_to(self, message: Message) -> None:
        """Send the content that the page requests, or the error."""
        requests = self._panel.page_requests
        arguments = {name: value for name, value in message.items() if name not in ("show", "id")}
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "rows": requests.rows,
            "row": requests.row,
            "batch": requests.batch,
            "rollout": requests.rollout,
            "compare": self._compare,
        }
        try:
            reply = answers[message["show"]](**arguments)
        except MlxNbError as error:
            reply = {"error": str(error)}
        self._panel.send({"kind": "answer", "id": message["id"], **reply})

    def _start(self, updates: int | None) -> None:
        self._panel.run.start(updates)
        self._panel.refresh()

    def _request(self, request: Request, awaited: str = "") -> None:
        """Request something for the next step boundary; if the run is idle, carry it out now."""
        if awaited:
            self._panel.awaited.add(awaited)
        self._panel.run.request(request)
        self.applied()

    def applied(self) -> None:
        """Wake an idle run to carry out its requests, without an update."""
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
        self._panel.say("the prompt is no longer a sample; its answers stay")
        self._panel.show_again("samples")
        self.applied()

    def _say(self, text: str, base: bool) -> None:
        self._panel.chat.send(text, self._panel.run.step_count, base=base)

    def ask(self, question: Any) -> None:
        """Request an answer for the chat."""
        self._panel.run.ask(question)
        self.applied()

    def _compare(self, save: int) -> dict[str, Any]:
        return {"rows": [list(row) for row in self._panel.run.compare_checkpoint(self._checkpoint(save))]}

    def _delete(self, save: int) -> None:
        info = self._checkpoint(save)
        self._panel.run.delete_checkpoint(info)
        self._panel.say(f"{info.path.name} was deleted")
        self._panel.show_again("checkpoints")

    def _checkpoint(self, save: int) -> Any:
        for info in self._panel.run.checkpoints():
            if info.save == save:
                return info
        self._panel.show_again("checkpoints")
        raise CommandError("this checkpoint no longer exists.")
