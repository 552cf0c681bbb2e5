"""The last state of a run as a picture and a table, for pages without a kernel: reopened, exported, printed."""

from __future__ import annotations

from html import escape

from mlx_nb.view.curves.figure import live_svg
from mlx_nb.view.event_text import summary_html
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.state import head_of
from mlx_nb.view.theme import ORANGE, WRAP, tint

# JupyterLab keeps an output of a widget whose kernel is gone as an error in words. What lasts stands below it and hides
# it; and while the panel lives, the panel hides what lasts. The words of the class are those of `page/panel.css`.
LASTING_STYLE = """<style>
.jp-OutputArea-child:has(> .jp-OutputArea-output.jupyter-widgets):has(~ .jp-OutputArea-child .mlx-nb-lasting) {
  display: none }
.jp-OutputArea-child:has(.mlx-nb-live) ~ .jp-OutputArea-child:has(.mlx-nb-lasting),
.jp-OutputArea-child:has(.mlx-nb-live) ~ .jp-OutputArea-child:has(.mlx-nb-lasting)
  + .jp-OutputArea-child:has(img) { display: none }
</style>"""


def lasting_html(html: str) -> str:
    """`html` as an output that takes the place of the panel once that is dead."""
    return f'{LASTING_STYLE}<div class="mlx-nb-lasting">{html}</div>'


def still_html(run: RunHandle, device: str) -> str:
    """Curve, table and the way on; inline styles only, no script."""
    head, history = head_of(run, device), run.history
    title = f"{run.name}: {run.state} after update {run.step_count}, when this was saved"
    facts = " · ".join(head["facts"])
    resume = f" Resume with <code>{escape(head['resume'])}</code>." if head["resume"] else ""
    failed = f'<div style="border-left:3px solid {tint(ORANGE, 1)};padding-left:8px">{escape(head["failure"])}</div>'
    iters = history.iters or run.config.iters or max(1, run.step_count)
    return (
        f'<div style="{WRAP};line-height:1.5;max-width:60em">{summary_html(history, title)}'
        f"{failed if head['failure'] else ''}{live_svg(history, iters)}"
        f'<div style="font-size:.9em;opacity:.8">{escape(facts)}</div>'
        f"<div>The live panel needs the kernel that trains.{resume}</div></div>"
    )
