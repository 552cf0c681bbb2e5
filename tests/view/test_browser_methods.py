"""What the views of pairs, prompts and completions promise of a real browser: nothing runs, hides or overflows."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.rows.imitation import Columns
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.events import RolloutCompleted
from mlx_nb.view.reports.completions import completions_html
from mlx_nb.view.rows.display import RowDisplay
from row_pages import ATTACK, CONTRAST, HIDING, SCRIPTS, THEMES

pytestmark = pytest.mark.browser
WIDTHS = (420, 1200)
VIEWS = ("pair", "pair tokens", "pair loss", "label", "prompt", "completions", "ratios")


def row_shown(kind: str, row: dict, tokenizer, **options) -> str:
    source = RowSource("rows", 1, [row].__getitem__, lambda _: "rows[0]", lambda: "")
    view = Examples(source, tokenizer, ExampleSettings("assistant", 100_000, "right", Columns()), kind).view(0)
    assert view.error is None
    if options.pop("measured", False):
        for name, said in (("token_loss", view.conversation), ("rejected_loss", view.rejected)):
            options[name] = np.arange(len(said.tokens)) % 33 / 4
    return RowDisplay(view, tokenizer, "train", **options)._repr_html_()


def completion(text: str, advantage: float, tokenizer) -> dict:
    rewards = {"right": 1.0, ATTACK: None, "a_function_of_a_long_name_indeed": -123.456}
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    said = {"text": text, "rewards": rewards, "reward": -122.0, "advantage": advantage, "tokens": tokens}
    return {**said, "finished": False}


def shown(kind: str, tokenizer) -> str:
    pair = {"prompt": ATTACK + HIDING, "chosen": SCRIPTS + ATTACK, "rejected": ATTACK + SCRIPTS, "margin": 0.5}
    match kind:
        case "pair":
            return row_shown("pairs", pair, tokenizer)
        case "pair tokens":
            return row_shown("pairs", pair, tokenizer, per_token=True)
        case "pair loss":
            return row_shown("pairs", pair, tokenizer, measured=True)
        case "label":
            return row_shown("labels", {"prompt": ATTACK, "completion": HIDING, "label": False}, tokenizer)
        case "prompt":
            row = {"prompt": ATTACK, "answer": HIDING, ATTACK: SCRIPTS, "long": "unbroken" * 100}
            return row_shown("prompts", row, tokenizer)
    texts = (ATTACK, HIDING, SCRIPTS, "")
    said = [completion(text, at - 1.5, tokenizer) for at, text in enumerate(texts)]
    reported = RolloutCompleted(4, ({"row": 7, "prompt": HIDING + SCRIPTS, "completions": said},), 1.0, (ATTACK,))
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for text in texts]
    ratios = [(7, tokens, np.linspace(-1, 1, len(tokens), dtype=np.float32)) for tokens in ids]
    return completions_html(reported, tokenizer, ratios if kind == "ratios" else ())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", VIEWS)
def test_a_hostile_text_stays_inside_its_box_runs_nothing_and_can_be_read(
    kind,
    theme,
    width,
    tokenizer,
    opened,
    screenshot,
):
    page = opened(shown(kind, tokenizer), theme, width)
    page.evaluate("document.querySelectorAll('#output details').forEach(one => { one.open = true; })")
    screenshot(page, f"{kind.replace(' ', '-')}-{theme}-{width}")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.evaluate("document.body.children.length") == 1
    assert page.locator("#output script, #output img, #output iframe, #output style, #output link").count() == 0
    drawn = page.evaluate(CONTRAST)
    assert len(drawn) > 2
    assert [item for item in drawn if item[0] < 4.5 and item[2] == "text"] == []
    assert [item for item in drawn if item[0] < 3 and item[2] == "glyph"] == []


@pytest.mark.parametrize(("width", "beside"), [(1200, True), (420, False)])
def test_the_answers_stand_side_by_side_where_there_is_room(width, beside, tokenizer, opened):
    row = {"prompt": "say red", "chosen": "red " * 60, "rejected": "green"}
    page = opened(row_shown("pairs", row, tokenizer), width=width)
    chosen, rejected = (page.get_by_text(name, exact=True).bounding_box() for name in ("✓ chosen", "✗ rejected"))
    assert (chosen["y"] == rejected["y"]) == beside
    assert (chosen["x"] == rejected["x"]) != beside


def test_a_wide_table_scrolls_by_itself_and_does_not_widen_what_holds_it(tokenizer, opened):
    page = opened(
        f'<div style="display:flex"><div style="flex:1">{shown("completions", tokenizer)}</div></div>', width=420
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    scrolls = "[...document.querySelectorAll('#output div')].filter(one => getComputedStyle(one).overflowX === 'auto')"
    sizes = page.evaluate(f"() => {scrolls}.map(one => [one.clientWidth, one.scrollWidth])")
    assert all(inner > outer > 200 for outer, inner in sizes)
