"""The last state of a run as static HTML, for pages without a kernel: reopened, exported or printed."""

from __future__ import annotations

from html import escape

from mlx_nb.view.curves.figure import live_svg
from mlx_nb.view.event_text import summary_html
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.state import head_of
from mlx_nb.view.theme import ORANGE, WRAP, tint

# JupyterLab shows an error message for a widget whose kernel is gone. The lasting output below the panel hides it, and
# the live panel hides the lasting output. The class names are those of `page/panel.css`.
LASTING_STYLE = """<style>
.jp-OutputArea-child:has(> .jp-OutputArea-output.jupyter-widgets):has(~ .jp-OutputArea-child .mlx-nb-lasting) {
  display: none }
.jp-OutputArea-child:has(.mlx-nb-live) ~ .jp-OutputArea-child:has(.mlx-nb-lasting),
.jp-OutputArea-child:has(.mlx-nb-live) ~ .jp-OutputArea-child:has(.mlx-nb-lasting)
  + .jp-OutputArea-child:has(img) { display: none }
</style>"""


def lasting_html(html: str) -> str:
    """`html` as an output that replaces the panel when its kernel is gone."""
    return f'{LASTING_STYLE}<div class="mlx-nb-lasting">{html}</div>'


def static_html(run: RunHandle, device: str) -> str:
    """Curve, summary and how to resume; inline styles only, no script."""
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
