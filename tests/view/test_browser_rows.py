"""What the row and batch views promise of a real browser: nothing runs, nothing hides, nothing overflows, it paints."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlx_nb.data.examples.examples import Examples, RowView
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.rows.imitation import Columns
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.model.model_source import model_folder
from mlx_nb.view.rows.display import RowDisplay
from mlx_nb.view.rows.overlay import render_batch_html
from row_pages import ATTACK, CONTRAST, HIDING, SCRIPTS, THEMES

pytestmark = pytest.mark.browser

PAINT_SECONDS = 2.0
CONVERSATION = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": ATTACK},
    {"role": "assistant", "content": HIDING + ATTACK, "weight": 0.3},
    {"role": "user", "content": HIDING + SCRIPTS},
    {"role": "assistant", "content": SCRIPTS + ATTACK},
    {"role": "user", "content": "Was that all?"},
    {"role": "assistant", "content": "It was.", "train": False},
    {"role": "assistant", "content": "שלום, it was: ‏yes."},
]
WIDTHS = (500, 1200)
VIEWS = ("runs", "tokens", "loss", "compare", "batch")


def view_of(messages, tokenizer, max_seq_length: int = 100_000):
    """The row view of a conversation, by the way that `%finetune row` takes."""
    rows = [{"messages": messages}]
    source = RowSource("rows", 1, rows.__getitem__, lambda row: f"rows[{row}]", lambda: "")
    view = Examples(source, tokenizer, ExampleSettings("assistant", max_seq_length, "right", Columns())).view(0)
    assert view.error is None
    return view


def losses_of(view) -> tuple[np.ndarray, np.ndarray]:
    """Losses from 0 to 8 nats and a base model that is between 4 worse and 4 better; the first is unknown."""
    steps = np.arange(len(view.conversation.tokens))
    loss, base = steps % 33 / 4, np.maximum(steps % 33 / 4 + steps % 17 / 2 - 4, 0)
    loss[0] = base[0] = np.nan
    return loss, base


def shown(view, tokenizer, kind: str, page: int = 0) -> str:
    loss, base = losses_of(view)
    if kind == "batch":
        conversation = view.conversation
        padded = np.pad(conversation.tokens, (0, 40)), np.pad(conversation.loss_mask, (0, 40))
        segments = np.arange(len(padded[0])) // 300
        return render_batch_html(padded[0][None], padded[1][None], tokenizer, [0], segments_BT=segments[None])
    options = {
        "runs": {},
        "tokens": {"per_token": True},
        "loss": {"token_loss": loss},
        "compare": {"token_loss": loss, "token_loss_base": base},
    }[kind]
    return RowDisplay(view, tokenizer, "train", page=page, **options)._repr_html_()


def pages_shown(view, tokenizer, kind: str) -> list[str]:
    """One output that folds all pages, or one output a page."""
    pages = -(-len(view.conversation.tokens) // 2000) if kind != "runs" else 1
    return [shown(view, tokenizer, kind, page) for page in range(pages)]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def chat(turns: int) -> list[dict]:
    """A chat of many turns: prose, code, a list, and now and then what hides."""
    prose = "The harbour was quiet at dawn, and the boats had not yet left; a gull called twice."
    code = "def area(width, height):\n    return width * height\n"
    return [
        message
        for turn in range(turns)
        for message in (
            {"role": "user", "content": f"Question {turn}: {prose}" + ("\u202e👩‍👩‍👧 שלום" if turn % 10 == 0 else "")},
            {"role": "assistant", "content": f"{prose}\n\n1. {code}2. {prose}"},
        )
    ]


def long_view(length: int, tokenizer):
    view = view_of(chat(length // 100), tokenizer, max_seq_length=length)
    assert len(view.conversation.tokens) == length
    return view


@pytest.fixture(scope="module")
def nasty(tokenizer):
    return view_of(CONVERSATION, tokenizer)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", VIEWS)
def test_a_hostile_row_stays_inside_its_box_and_runs_nothing(kind, theme, width, nasty, tokenizer, opened, screenshot):
    page = opened(shown(nasty, tokenizer, kind), theme, width)
    screenshot(page, f"{kind}-{theme}-{width}")
    beyond = page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            const wide = [...document.querySelectorAll("#output *")]
                .filter(element => [...element.getClientRects()].some(box => box.right > width + 1 || box.left < -1))
                .map(element => element.textContent.slice(0, 60));
            return [document.documentElement.scrollWidth - width, wide];
        }"""
    )
    assert beyond == [0, []]
    assert page.evaluate("document.body.children.length") == 1
    assert page.locator("#output script, #output img, #output iframe, #output style, #output link").count() == 0


OPEN_ALL = """async () => {
    const frame = () => new Promise(requestAnimationFrame);
    const start = performance.now();
    document.querySelectorAll("#output details").forEach(page => { page.open = true; });
    document.body.offsetHeight;
    await frame();
    await frame();
    return (performance.now() - start) / 1000;
}"""

CELLS = '#output [title^="token "], #output [title^="tokens "]'


def read_back(texts: list[str]) -> str:
    """The row's characters from what is on screen: glyphs and named characters turned back."""
    text = "".join(texts).replace("◌", "").replace("⏎\n", "\n").replace("⇥\t", "\t").replace("·", " ")
    text = text.replace("‹40 combining marks›", "\u0301" * 40)
    return re.sub("‹U\\+([0-9A-F]{4,6})›", lambda match: chr(int(match[1], 16)), text)


@pytest.mark.parametrize("kind", ["runs", "tokens", "loss", "compare"])
def test_what_is_on_screen_reads_back_to_the_row(kind, nasty, tokenizer, opened):
    texts = []
    for html in pages_shown(nasty, tokenizer, kind):
        texts += opened(html).eval_on_selector_all(
            CELLS,
            """cells => cells.map(cell => {
                const copy = cell.cloneNode(true);
                copy.querySelectorAll("sup").forEach(label => label.remove());
                return copy.textContent;
            })""",
        )
    assert read_back(texts) == nasty.conversation.text.replace("‹U+202E›", "\u202e")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["runs", "tokens", "loss"])
def test_every_cell_is_visible_and_stands_after_the_one_before_it(kind, width, nasty, tokenizer, opened):
    page = opened(shown(nasty, tokenizer, kind, page=int(kind != "runs")), width=width)
    page.evaluate(OPEN_ALL)
    unseen, reordered = page.eval_on_selector_all(
        CELLS,
        """cells => {
            const boxes = cells.map(cell => [...cell.getClientRects()].filter(box => box.width > 0.5));
            const name = index => cells[index].title + ": " + cells[index].textContent;
            const unseen = [], reordered = [];
            boxes.forEach((now, index) => {
                if (!now.length) return unseen.push(name(index));
                const before = index && boxes[index - 1].at(-1);
                if (!before) return;
                const sameLine = Math.abs(before.top - now[0].top) < 8;
                if (sameLine ? now[0].left < before.right - 1 : now[0].top < before.top) reordered.push(name(index));
            });
            return [unseen, reordered];
        }""",
    )
    assert unseen == []
    assert reordered == []


def test_no_bidi_control_and_no_control_character_reaches_the_page(nasty, tokenizer, opened):
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f]"
    for kind in VIEWS:
        page = opened(shown(nasty, tokenizer, kind))
        found = page.evaluate(f"(document.querySelector('#output').innerHTML.match(/{controls}/g) || []).length")
        assert found == 0, kind


def counts_of(view) -> dict[str, tuple[int, int]]:
    """Per role: trained and all tokens, counted from mask and spans alone."""
    conversation = view.conversation
    counts: dict[str, tuple[int, int]] = {}
    for weight, (start, end) in zip(conversation.loss_mask, conversation.offsets):
        owners = [span.role for span in conversation.spans if span.start <= max(start, end - 1) < span.end]
        trained, total = counts.get(role := owners[0] if owners else "template", (0, 0))
        counts[role] = (trained + int(weight != 0), total + 1)
    return counts


@pytest.mark.parametrize("kind", ["runs", "tokens", "loss", "compare"])
def test_the_legend_counts_what_the_mask_trains(kind, nasty, tokenizer, opened):
    mask, in_blocks = nasty.conversation.loss_mask, 0
    for html in pages_shown(nasty, tokenizer, kind):
        page = opened(html)
        page.evaluate(OPEN_ALL)
        text = page.inner_text("#output")
        reported = re.findall(r"(\w+) ([\d,]+) of ([\d,]+)", re.search(r"^trained: (.*)$", text, re.MULTILINE)[1])
        assert {role: (number(trained), number(total)) for role, trained, total in reported} == counts_of(nasty)
        assert f"{len(mask):,} tokens · {np.count_nonzero(mask):,} trained" in text
        if kind in {"runs", "tokens"}:
            assert f"weight 0.3: {np.count_nonzero(np.isclose(mask, 0.3)):,} tokens" in text
        heads = re.findall(
            r"^\w+ [\d,]+ (?:of [\d,]+ trained|tokens)(?: · template [\d,]+(?: of [\d,]+)?)?$", text, re.M
        )
        in_blocks += sum(number(trained) for head in heads for trained in re.findall(r"([\d,]+) of", head))
    assert in_blocks == np.count_nonzero(mask)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", VIEWS)
def test_text_keeps_its_contrast_on_every_color(kind, theme, nasty, tokenizer, opened):
    drawn = opened(shown(nasty, tokenizer, kind), theme).evaluate(CONTRAST)
    assert len(drawn) > 3
    assert [item for item in drawn if item[0] < 4.5 and item[2] == "text"] == []
    # White space marks are signs beside the text, held to the bound for graphics.
    assert [item for item in drawn if item[0] < 3 and item[2] == "glyph"] == []


@pytest.mark.parametrize("theme", THEMES)
def test_a_row_that_is_left_out_says_so_within_the_same_bounds(theme, tokenizer, opened, screenshot):
    reason = f"row 0: \u202e שלום {ATTACK} " + "unbroken" * 60
    row = RowView(0, f"\u202e{ATTACK}", None, None, None, reason)
    page = opened(RowDisplay(row, tokenizer, "train")._repr_html_(), theme, 500)
    screenshot(page, f"left-out-{theme}")
    assert "\u202e" not in page.inner_text("#output")
    assert page.evaluate("document.documentElement.scrollWidth") == 500
    assert [item for item in page.evaluate(CONTRAST) if item[0] < 4.5] == []


# From the moment the notebook hands the output to the browser until its frame is drawn.
PAINT = """async html => {
    const frame = () => new Promise(requestAnimationFrame);
    await frame();
    const start = performance.now();
    document.querySelector("#output").innerHTML = html;
    document.body.offsetHeight;
    await frame();
    await frame();
    return (performance.now() - start) / 1000;
}"""


@pytest.mark.parametrize("kind", ["runs", "tokens", "loss", "compare"])
@pytest.mark.parametrize("length", [8_000, 30_000])
def test_a_long_row_paints_within_two_seconds(length, kind, tokenizer, opened, screenshot, record_property):
    html = shown(long_view(length, tokenizer), tokenizer, kind)
    page = opened("", "light", 500)
    seconds = page.evaluate(PAINT, html)
    record_property("kilobytes", len(html.encode()) / 1000)
    record_property("paint_seconds", seconds)
    assert seconds < PAINT_SECONDS
    if kind == "runs":
        assert page.evaluate(OPEN_ALL) < PAINT_SECONDS
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    if length == 8_000:
        assert len(html.encode()) < 700_000
        screenshot(page, f"long-{kind}")


def test_a_row_that_would_be_too_large_shows_one_page(tokenizer, opened):
    content = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\0\n" * 8_000}]
    view = view_of(content, tokenizer, max_seq_length=8_000)
    html = shown(view, tokenizer, "runs", page=2)
    assert len(html.encode()) < 700_000
    page = opened(html, width=500)
    assert "tokens 4,000–5,999 of 8,000, page 2 of 0 to 3" in page.inner_text("#output")
    assert page.evaluate(PAINT, html) < PAINT_SECONDS


def test_the_pages_of_a_long_row_unfold_and_hold_every_token(tokenizer, opened, screenshot):
    view = long_view(8_000, tokenizer)
    page = opened(shown(view, tokenizer, "runs", page=1))
    folds = page.locator("#output details")
    assert folds.count() == 4
    assert page.eval_on_selector_all("#output details", "pages => pages.map(page => page.open)") == [
        False,
        True,
        False,
        False,
    ]
    assert not folds.nth(2).locator("div").first.is_visible()
    folds.nth(2).locator("summary").click()
    assert folds.nth(2).locator("div").first.is_visible()
    screenshot(page, "pages")
    titles = page.eval_on_selector_all(CELLS, "cells => cells.map(cell => cell.title)")
    ranges = [re.match(r"tokens? (\d+)(?:–(\d+))?", title).groups() for title in titles]
    assert [at for first, last in ranges for at in range(int(first), int(last or first) + 1)] == list(range(8_000))
    last = opened(shown(view, tokenizer, "loss", page=3))
    assert "tokens 6,000–7,999 of 8,000, page 3 of 0 to 3" in last.inner_text("#output")


def test_a_prompt_that_the_template_adds_is_not_attributed_to_the_user(tiny_folder, opened, screenshot):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    tokenizer.chat_template = "<|system|>You are a helpful assistant.<|end|>\n" + tokenizer.chat_template
    view = view_of([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Arr."}], tokenizer)
    page = opened(shown(view, tokenizer, "runs"), width=500)
    screenshot(page, "template-prompt")
    blocks = page.eval_on_selector_all(
        '#output div[style*="border-left"]', "blocks => blocks.map(block => block.innerText.split('\\n'))"
    )
    assert [block[0].split()[0] for block in blocks] == ["template", "user", "assistant"]
    assert blocks[0][1].startswith("<|system|>You are a helpful assistant.<|end|>")
    assert blocks[1][1].startswith("<|user|>Hello<|end|>")


@pytest.mark.real_model
def test_a_row_of_the_real_tokenizer_in_the_browser(opened, screenshot):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    view = view_of(CONVERSATION[1:], tokenizer)
    for kind in VIEWS:
        for theme, width in (("light", 500), ("dark", 1200)):
            page = opened(shown(view, tokenizer, kind), theme, width)
            screenshot(page, f"smollm2-{kind}-{theme}-{width}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
