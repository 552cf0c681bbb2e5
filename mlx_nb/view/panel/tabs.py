"""The pages of the panel: rows, samples and chat, settings, checkpoints, log. Each is drawn only while on show."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets

from mlx_nb.config.run_config import LIVE_SETTINGS, SETTINGS
from mlx_nb.config.yaml_text import read_value
from mlx_nb.errors import MlxNbError
from mlx_nb.events import (
    Event,
    Progress,
    Question,
    Request,
    Rewind,
    Sample,
    SampleGenerated,
    StateChanged,
    StepCompleted,
)
from mlx_nb.history import losses_by_row
from mlx_nb.view.event_text import describe, remarks
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.rows.display import RowDisplay, measured_losses
from mlx_nb.view.theme import BLUE, GREY, ORANGE, WRAP, one_line, tint, visible_html

WRAPPED_ROW = {"flex_flow": "row wrap", "align_items": "center"}
LINES_OF_LOG = 200
WORST_ROWS = 30
STEPS_OF_A_SAMPLE = 8
CELL = f"padding:3px 10px 3px 0;text-align:left;vertical-align:top;{WRAP}"

Requester = Callable[[Request], None]
Later = Callable[[Callable[[], None]], None]


def button(text: str, tooltip: str, style: str = "") -> widgets.Button:
    """A button as wide as its text."""
    return widgets.Button(description=text, tooltip=tooltip, button_style=style, layout={"width": "auto"})


def line(*parts: widgets.Widget) -> widgets.Box:
    """Widgets side by side, which wrap where the cell is narrow."""
    return widgets.Box(parts, layout=WRAPPED_ROW)


def note_html(text: str) -> str:
    """A remark below the controls of a tab."""
    return f'<div style="font-size:.9em;{WRAP}">{escape(text)}</div>'


class RowsTab:
    """The rows of an update with their losses, or the worst rows so far; one of them token by token."""

    THIS, WORST = "of one update", "highest loss so far"

    def __init__(self, run: RunHandle, later: Later) -> None:
        self._run = run
        self._step: int | None = None
        self._drawn: tuple[Any, ...] | None = None
        self._quiet = False
        self._worst: list[tuple[int, float]] = []
        self._worst_due = 0.0
        self.source = widgets.ToggleButtons(options=[self.THIS, self.WORST], style={"button_width": "auto"})
        self.latest = button("Latest update", "go with the training again")
        self.measure = button("Losses now", "color the tokens by the model's loss on them, now")
        self.rows = widgets.Select(options=[], rows=6, layout={"width": "auto", "min_width": "16em"})
        self.note = widgets.HTML()
        self.view = widgets.HTML()
        self.source.observe(lambda _: later(self.refresh), "value")
        self.rows.observe(lambda _: later(self._show), "value")
        self.latest.on_click(lambda _: later(lambda: self.select(None)))
        self.measure.on_click(lambda _: later(lambda: self._show(measure=True)))
        self.widget = widgets.VBox([line(self.source, self.latest, self.measure), self.note, self.rows, self.view])

    def select(self, step: int | None) -> None:
        """Stay with the rows of an update; None follows the training."""
        self._step = step
        self.source.value = self.THIS
        self.refresh()

    def refresh(self) -> None:
        """Show the rows of highest loss, or those of the next update, as they are now."""
        history = self._run.history
        if self.source.value == self.WORST:
            losses = self._worst_rows()
            text = f"the {len(losses)} rows of highest loss when last trained on" if losses else ""
        else:
            event = self._event()
            losses = sorted(losses_by_row(event), key=lambda pair: -pair[1]) if event else []
            text = f"rows of update {event.step}, losses before it, epoch {event.epoch:.2f}" if event else ""
        self.note.value = note_html(text or "no update was done yet; these are the rows of the next one")
        if not losses and not len(history) and self._run.prepared:
            rows = dict.fromkeys(self._run.trainer.next_rows())
            losses = [(row, float("nan")) for row in rows]
        options = [(f"row {row}" + (f"   loss {loss:.3f}" if loss == loss else ""), row) for row, loss in losses]
        if options == list(self.rows.options):
            return
        chosen = self.rows.value
        self._quiet = True
        self.rows.options = options
        if chosen in [row for _, row in options]:
            self.rows.value = chosen
        elif options:
            self.rows.index = 0
        self._quiet = False
        self._show()

    def _worst_rows(self) -> list[tuple[int, float]]:
        """Looked up again only so often that it takes a twentieth of the time, because it reads the whole history."""
        now = time.monotonic()
        if now >= self._worst_due:
            self._worst = list(self._run.row_losses("train").items())[:WORST_ROWS]
            self._worst_due = time.monotonic() + 20 * (time.monotonic() - now)
        return self._worst

    def _event(self) -> StepCompleted | None:
        if self._step is None:
            result: StepCompleted | None = self._run.history.last_step
            return result
        steps = (event for event in self._run.history.standing if isinstance(event, StepCompleted))
        return next((event for event in steps if event.step == self._step), None)

    def _show(self, *, measure: bool = False) -> None:
        row = self.rows.value
        if self._quiet or row is None or (self._drawn == (row, False) and not measure):
            return
        view = self._run.rows("train").examples.view(row)
        losses = {}
        if measure and view.conversation is not None:
            losses = measured_losses(view, self._run.token_losses)
        self._drawn = (row, measure)
        self.view.value = RowDisplay(view, self._run.tokenizer, "train", **losses)._repr_html_()


class SamplesTab:
    """Kept prompts answered by the base and by the model over steps, and a chat with the model as it is now."""

    def __init__(self, run: RunHandle, later: Later, ask: Callable[[Question], None], request: Requester) -> None:
        self._run = run
        self._ask = ask
        self._request = request
        self._talk: list[dict[str, str]] = []
        self._busy = False
        self._drawn = ""
        self.prompt = widgets.Text(placeholder="a prompt to keep…", layout={"width": "24em"})
        self.keep = button("Keep", "answer this prompt at every validation")
        self.now = button("Answer now", "answer the kept prompts at this update")
        self.table = widgets.HTML()
        self.message = widgets.Text(placeholder="talk to the model at this update…", layout={"width": "24em"})
        self.send = button("Send", "ask the model as it is now")
        self.base = widgets.Checkbox(description="ask the base", indent=False, layout={"width": "auto"})
        self.clear = button("New chat", "forget what was said")
        self.talk = widgets.HTML()
        self.keep.on_click(lambda _: later(self._keep))
        self.prompt.on_submit(lambda _: later(self._keep))
        self.now.on_click(lambda _: later(lambda: request(Sample())))
        self.send.on_click(lambda _: later(self._send))
        self.message.on_submit(lambda _: later(self._send))
        self.clear.on_click(lambda _: later(self._clear))
        self.widget = widgets.VBox(
            [
                line(self.prompt, self.keep, self.now),
                self.table,
                widgets.HTML('<hr style="border:none;border-top:1px solid rgba(128,128,128,.4);margin:6px 0">'),
                line(self.message, self.send, self.base, self.clear),
                self.talk,
            ]
        )

    def _keep(self) -> None:
        text = self.prompt.value.strip()
        if text:
            kept = self._run.config.sample_prompts or ()
            self._run.set(sample_prompts=[*kept, text] if text not in kept else list(kept))
            self.prompt.value = ""
            self._request(Sample())
        self.refresh()

    def _clear(self) -> None:
        self._talk = []
        self._draw_talk()

    def _send(self) -> None:
        text = self.message.value.strip()
        if not text or self._busy:
            return
        self._talk.append({"role": "user", "content": text})
        asked = list(self._talk)
        self._talk.append({"role": "assistant", "content": "…"})
        self.message.value = ""
        self._busy = self.send.disabled = True
        drawn_at = 0.0

        def on_text(answer: str, done: bool) -> None:
            nonlocal drawn_at
            self._talk[-1]["content"] = answer
            if done:
                self._busy = self.send.disabled = False
            if done or time.monotonic() - drawn_at > 0.2:
                self._draw_talk()
                drawn_at = time.monotonic()

        self._draw_talk()
        self._ask(Question(asked, on_text, base=self.base.value))

    def _draw_talk(self) -> None:
        colors = {"user": ORANGE, "assistant": BLUE}
        self.talk.value = "".join(
            f'<div style="border-left:3px solid {tint(colors[turn["role"]], 1)};padding:2px 0 2px 8px;margin:4px 0;'
            f'{WRAP}"><span style="font-size:.8em;opacity:.75">{turn["role"]}</span><br>'
            f"{visible_html(turn['content'], edges=False)}</div>"
            for turn in self._talk
        )

    def refresh(self) -> None:
        """Show the answers to the kept prompts, the newest first."""
        samples: dict[str, list[SampleGenerated]] = {}
        for event in self._run.history.standing:
            if isinstance(event, SampleGenerated):
                samples.setdefault(event.prompt, []).append(event)
        kept = self._run.config.sample_prompts or ()
        parts = [_sample_html(prompt, answers) for prompt, answers in samples.items()]
        waiting = [prompt for prompt in kept if prompt not in samples]
        parts += [note_html(f"{prompt}: not answered yet") for prompt in waiting]
        drawn = "".join(parts) or note_html("no prompt is kept. One that you keep is answered at every validation.")
        if drawn != self._drawn:
            self._drawn = self.table.value = drawn


def _sample_html(prompt: str, answers: list[SampleGenerated]) -> str:
    """One prompt: the base's answer and the model's over steps, the newest first."""
    base = next((event.base_answer for event in answers if event.base_answer is not None), None)
    rows = [("base", base)] if base is not None else []
    rows += [(f"update {event.step}", event.answer) for event in reversed(answers[-STEPS_OF_A_SAMPLE:])]
    cells = "".join(
        f'<tr><td style="{CELL};white-space:nowrap;opacity:.75">{label}</td>'
        f'<td style="{CELL}">{visible_html(text, edges=False)}</td></tr>'
        for label, text in rows
    )
    title = f'<div style="font-weight:600;margin-top:4px;{WRAP}">{visible_html(prompt, edges=False)}</div>'
    return f'{title}<table style="border:none;font-size:.95em">{cells}</table>'


class SettingsTab:
    """What may change during the run, applied at the next boundary and recorded."""

    def __init__(self, run: RunHandle, later: Later, applied: Callable[[], None]) -> None:
        self._run = run
        self._applied = applied
        self._quiet = False
        self.fields = {
            name: widgets.Text(
                description=name,
                tooltip=SETTINGS[name].metadata["help"],
                continuous_update=False,
                style={"description_width": "10em"},
                layout={"width": "24em"},
            )
            for name in LIVE_SETTINGS
            if name != "sample_prompts"
        }
        for name, field in self.fields.items():
            field.observe(lambda change, name=name: later(lambda: self._change(name)), "value")
        self.note = widgets.HTML(note_html("Enter applies a value at the next update; null switches a setting off."))
        self.widget = widgets.VBox([line(*self.fields.values()), self.note])
        self.refresh()

    def refresh(self) -> None:
        """Show the values that hold now."""
        self._quiet = True
        for name, field in self.fields.items():
            value = getattr(self._run.config, name)
            field.value = "null" if value is None else str(value)
        self._quiet = False

    def _change(self, name: str) -> None:
        if self._quiet:
            return
        old = getattr(self._run.config, name)
        try:
            value = read_value(self.fields[name].value)
            if value == old:
                return
            self._run.set(**{name: value})
        except MlxNbError as error:
            self.note.value = (
                f'<span style="border-left:3px solid {tint(ORANGE, 1)};padding-left:6px">{escape(str(error))}</span>'
            )
            self.refresh()
            return
        self.note.value = note_html(f"{name}: {old} → {value}, from the next update on")
        self._applied()


class CheckpointsTab:
    """The exact checkpoints on disk: go back to one, compare the run with it, delete it."""

    def __init__(self, run: RunHandle, later: Later, request: Requester) -> None:
        self._run = run
        self._infos: list[Any] = []
        self._request = request
        self.list = widgets.Select(options=[], rows=6, layout={"width": "auto", "min_width": "22em"})
        self.rewind = button("Rewind to it", "go back to this update; the branch that is left stays visible")
        self.compare = button("Compare", "the run as it is now against this checkpoint")
        self.delete = button("Delete", "remove this checkpoint from disk")
        self.note = widgets.HTML()
        self.rewind.on_click(lambda _: later(lambda: self._with(lambda info: request(Rewind(info.step)))))
        self.compare.on_click(lambda _: later(lambda: self._with(self._compare)))
        self.delete.on_click(lambda _: later(lambda: self._with(self._delete)))
        self.widget = widgets.VBox([self.list, line(self.rewind, self.compare, self.delete), self.note])

    def refresh(self) -> None:
        """List the checkpoints that are in the folder now."""
        try:
            infos = self._run.checkpoints()[::-1]
        except MlxNbError as error:
            self.note.value = note_html(str(error))
            return
        if infos != self._infos:
            chosen = self.list.index
            self._infos = infos
            self.list.options = [
                f"update {info.step}   {info.kind}   {time.strftime('%H:%M:%S', time.localtime(info.time))}"
                f"   {info.bytes / 1e6:.1f} MB"
                for info in infos
            ]
            if infos:
                self.list.index = min(chosen or 0, len(infos) - 1)
        for one in (self.rewind, self.compare, self.delete):
            one.disabled = not infos

    def _with(self, act: Callable[[Any], None]) -> None:
        if self.list.index is None:
            return
        try:
            act(self._infos[self.list.index])
        except MlxNbError as error:
            self.note.value = note_html(str(error))

    def _compare(self, info: Any) -> None:
        rows = "".join(
            f'<tr><td style="{CELL};opacity:.75">{escape(label)}</td><td style="{CELL}">{escape(value)}</td></tr>'
            for label, value in self._run.compare_checkpoint(info)
        )
        self.note.value = f'<table style="border:none">{rows}</table>'

    def _delete(self, info: Any) -> None:
        self._run.delete_checkpoint(info)
        self.note.value = note_html(f"{info.path.name} is removed")
        self.refresh()


class LogTab:
    """What happened, in words, the newest first; updates themselves are in the curves."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._drawn = 0
        self.text = widgets.HTML(note_html("nothing happened yet"))
        self.widget = widgets.VBox([self.text])

    def add(self, event: Event) -> None:
        """Note an event, but for the frequent ones."""
        if isinstance(event, StepCompleted | Progress | StateChanged):
            return
        self._lines += [f"{time.strftime('%H:%M:%S')}  {describe(event)}"]
        self._lines += [f"          {remark}" for remark in remarks(event)]
        del self._lines[:-LINES_OF_LOG]

    def refresh(self) -> None:
        """Show the lines, the newest first."""
        if self._lines:
            lines = "".join(f"<div>{escape(one_line(text))}</div>" for text in reversed(self._lines))
            frame = f"border:1px solid {tint(GREY, 0.35)};padding:4px 6px"
            style = f"max-height:16em;overflow:auto;font-size:.85em;line-height:1.5;{frame};{WRAP}"
            self.text.value = f'<div tabindex="0" role="log" style="{style}">{lines}</div>'
