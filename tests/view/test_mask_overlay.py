"""What the token views promise: nothing of a row escapes, hides or gets lost; the mask shown is the mask."""

from __future__ import annotations

import math
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.errors import DataError
from mlx_nb.view import theme
from mlx_nb.view.rows.overlay import render_batch_html, render_html, render_text
from shown_rows import ATTRIBUTES, NASTY, TAGS, TOKENIZER, WORDS, Page, conversation, long_conversation


def covered(page: Page) -> list[int]:
    """All token positions that the titles speak of, in order."""
    positions: list[int] = []
    for title, _, _ in page.tokens():
        first, last = re.match(r"tokens? (\d+)(?:–(\d+))?", title).groups()
        positions += range(int(first), int(last or first) + 1)
    return positions


def hides(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp", "Co"}


def views(row: TokenizedConversation, title: str = "") -> list[str]:
    losses = np.where(row.loss_mask > 0, 1.5, np.nan)
    return [
        render_html(row, TOKENIZER, title=title),
        render_html(row, TOKENIZER, title=title, per_token=True),
        render_html(row, TOKENIZER, title=title, token_loss=losses),
        render_html(row, TOKENIZER, title=title, token_loss=losses, token_loss_base=losses + 1),
        render_batch_html(row.tokens[None], row.loss_mask[None], TOKENIZER, [title]),
    ]


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=40).map(lambda text: text.encode("utf-8", "replace").decode()))
def test_any_text_leaves_only_our_own_tags_and_attributes(content):
    row = conversation([("user", content), ("assistant", content + NASTY)], problems=[content + NASTY])
    for html in views(row, title=content + NASTY):
        for tag, attributes, _ in Page(html).elements:
            assert tag in TAGS
            assert set(attributes) <= ATTRIBUTES
        joined = re.sub("(?<=[👩❤☠])[\u200d\ufe0f]", "", html)
        assert [character for character in joined if hides(character) and character not in "\u200d\ufe0f"] == []


def test_a_nasty_row_is_shown_as_written_and_named_where_it_hides():
    page = Page(render_html(conversation([("user", NASTY), ("assistant", "x")]), TOKENIZER))
    text = "".join(text for _, _, text in page.tokens())
    assert '<script>alert(1)</script><img src=x onerror="alert(2)">' in text
    for code in (
        "001B",
        "0007",
        "009B",
        "202E",
        "202C",
        "200B",
        "FEFF",
        "00AD",
        "2066",
        "00A0",
        "2028",
        "0000",
    ):
        assert f"‹U+{code}›" in text
    assert "‹U+000D›⏎\n" in text
    assert "‹U+E0041›" in text
    assert "‹40 combining marks›" in text
    assert "👩‍👩‍👧 ❤️" in text


def test_right_to_left_text_is_isolated_from_its_neighbors():
    page = Page(render_html(conversation([("user", "שלום"), ("assistant", "x")]), TOKENIZER, per_token=True))
    hebrew = [tag for tag, _, text in page.elements if set("".join(text)) & set("שלום") and tag in {"span", "bdi"}]
    assert hebrew
    assert set(hebrew) == {"bdi"}


def test_a_role_from_the_data_is_escaped():
    row = conversation([("<b onclick=x>\u202e", "hello"), ("assistant", "x")])
    assert "<b onclick" not in render_html(row, TOKENIZER)
    assert "\u202e" not in render_html(row, TOKENIZER) + render_text(row, TOKENIZER)


def test_styles_are_inline_and_survive_untrusted_notebooks():
    allowed = re.compile(r"(overflow-wrap:break-word;overflow-wrap:anywhere)|[a-z-]+:[^;{}]+")
    for html in views(conversation()):
        assert "<style" not in html
        assert "var(" not in html
        assert not re.search(r"\d(ch|vw|vh|fr)\b", html)
        for _, attributes, _ in Page(html).elements:
            for declaration in filter(None, (attributes.get("style") or "").split(";")):
                assert allowed.fullmatch(declaration), declaration


@pytest.mark.parametrize("per_token", [False, True])
def test_every_token_is_shown_exactly_once_and_in_order(per_token):
    row = conversation([("user", "a 👩‍👩‍👧 b\n\n\tc"), ("assistant", "d  e ")])
    assert covered(Page(render_html(row, TOKENIZER, per_token=per_token))) == list(range(len(row.tokens)))


@pytest.mark.parametrize("per_token", [False, True])
def test_trained_tokens_have_tint_and_underline_and_the_others_are_dim(per_token):
    row = conversation()
    for title, style, _ in Page(render_html(row, TOKENIZER, per_token=per_token)).tokens():
        first = int(re.search(r"\d+", title)[0])
        trained = row.loss_mask[first] > 0
        assert ("background:" in style and "border-bottom:2px solid" in style) == trained
        assert ("opacity" in style) == (not trained)
        assert ("not trained" in title) == (not trained)


def test_the_trained_text_reads_as_in_the_row():
    page = Page(render_html(conversation(), TOKENIZER))
    trained = "".join(text for title, _, text in page.tokens() if "not trained" not in title)
    assert trained == "Arr, the capital be Paris, me hearty.<|im_end|>"


def test_partial_weights_are_visible_and_counted():
    row = conversation(weight=0.25)
    html = render_html(row, TOKENIZER)
    assert f"weight 0.25: {np.count_nonzero(row.loss_mask)} tokens" in html
    assert "2px dashed" in html
    assert "×0.25" in html
    assert "×0.25" in render_text(row, TOKENIZER, color=False)


def test_the_legend_counts_tokens_by_role():
    row = conversation(problems=["the end token is not trained"])
    total, trained = len(row.tokens), int((row.loss_mask > 0).sum())
    html = render_html(row, TOKENIZER, title="row 12", dropped_tokens=3)
    assert f"{total} tokens · {trained} trained ({trained / total:.0%}) · 3 tokens cut off" in html
    assert f"assistant {trained} of {trained}" in html
    assert re.search(r"user 0 of \d+", html)
    assert "row 12" in html
    assert "⚠ the end token is not trained" in html


def test_a_split_character_is_one_cell_that_names_all_its_ids():
    row = conversation([("user", "hi"), ("assistant", "🦜")])
    ids = [int(token) for token in TOKENIZER.bpe.encode("🦜").ids]
    assert len(ids) > 1
    parrots = [title for title, _, text in Page(render_html(row, TOKENIZER, per_token=True)).tokens() if text == "🦜"]
    assert len(parrots) == 1
    assert f"ids {', '.join(map(str, ids))}" in parrots[0]


def test_special_tokens_have_a_border():
    page = Page(render_html(conversation(), TOKENIZER))
    bordered = [text for _, style, text in page.tokens() if "border:1px solid" in style]
    assert bordered == ["<|im_start|>", "<|im_end|>"] * 3


def test_newlines_keep_their_break_and_only_telling_spaces_are_marked():
    row = conversation([("user", "a b\n  c  d \n\te "), ("assistant", "x")])
    text = "".join(text for _, _, text in Page(render_html(row, TOKENIZER)).tokens())
    assert "a b⏎\n··c··d·⏎\n⇥\te·<|im_end|>" in text


def test_the_template_opens_the_message_that_follows_and_closes_the_one_before():
    page = Page(render_html(conversation(), TOKENIZER))
    blocks = [
        "".join(text)
        for tag, attributes, text in page.elements
        if tag == "div" and "border-left" in attributes.get("style", "")
    ]
    assert len(blocks) == 3
    assert all(block.count("<|im_start|>") == block.count("<|im_end|>") == 1 for block in blocks)
    assert blocks[1].endswith("<|im_start|>user⏎\nWhat is the capital of France?<|im_end|>⏎\n")


def test_characters_that_no_token_covers_are_shown_as_never_seen():
    row = conversation()
    holes = TokenizedConversation(
        row.tokens[:-3], row.loss_mask[:-3], row.text, row.offsets[:-3], row.spans, row.problems
    )
    assert "never seen" in render_html(holes, TOKENIZER)
    assert "never seen" not in render_html(holes, TOKENIZER, dropped_tokens=3)


@pytest.mark.parametrize("kept", [slice(0, 20), slice(-20, None)], ids=["right", "left"])
def test_a_row_cut_to_length_shows_only_what_is_left(kept):
    row = conversation()
    cut = TokenizedConversation(
        row.tokens[kept], row.loss_mask[kept], row.text, row.offsets[kept], row.spans, row.problems
    )
    page = Page(render_html(cut, TOKENIZER, dropped_tokens=len(row.tokens) - 20))
    start, end = cut.offsets[0, 0], cut.offsets[-1, 1]
    assert "".join(text for _, _, text in page.tokens()) == row.text[start:end].replace("\n", "⏎\n")


def test_an_empty_row_is_shown():
    none = np.zeros(0, dtype=np.int32)
    row = TokenizedConversation(none, none.astype(np.float32), "", np.zeros((0, 2), np.int32), ())
    assert "0 tokens · 0 trained (0%)" in render_html(row, TOKENIZER)
    assert "0 tokens" in render_text(row, TOKENIZER)


def test_known_losses_are_reported_with_their_probability():
    row = conversation()
    losses = np.where(row.loss_mask > 0, 2.0, np.nan)
    tokens = Page(render_html(row, TOKENIZER, token_loss=losses)).tokens()
    reported = [title for title, _, _ in tokens if "loss 2.000 nats, probability 0.135" in title]
    assert len(reported) == int((row.loss_mask > 0).sum())
    assert not any("loss" in title for title, _, _ in tokens if "not trained" in title)
    assert "mean loss of the trained tokens 2.000 nats" in render_html(row, TOKENIZER, token_loss=losses)


def test_the_tint_grows_with_the_loss_and_stops_at_six_nats():
    alphas = [float(theme.loss_tint(loss).split(",")[-1][:-1]) for loss in (0.0, 1.0, 3.0, 6.0, 60.0, math.inf)]
    assert alphas[:4] == sorted(alphas[:4])
    assert alphas[3] == alphas[4] == alphas[5] == theme.STRONGEST_TINT


def test_comparison_is_blue_where_the_adapter_is_better_and_orange_where_it_is_worse():
    row = conversation()
    trained = np.flatnonzero(row.loss_mask)
    losses = np.full(len(row.tokens), np.nan)
    base = losses.copy()
    losses[trained[:2]], base[trained[:2]] = (1.0, 3.0), (3.0, 1.0)
    html = render_html(row, TOKENIZER, token_loss=losses, token_loss_base=base)
    styles = [style for title, style, _ in Page(html).tokens() if "base model" in title]
    assert "rgba(0,114,178" in styles[0]
    assert "rgba(213,94,0" in styles[1]
    assert "mean loss of the trained tokens 2.000 nats, base model 2.000" in html


def test_losses_of_the_wrong_length_are_refused():
    row = conversation()
    with pytest.raises(DataError, match="one loss per token"):
        render_html(row, TOKENIZER, token_loss=np.zeros(len(row.tokens) - 1))
    with pytest.raises(DataError, match="token_loss_base is given without token_loss"):
        render_html(row, TOKENIZER, token_loss_base=np.zeros(len(row.tokens)))


def test_eight_thousand_tokens_stay_under_700_kilobytes():
    row = long_conversation(8000)
    html = render_html(row, TOKENIZER)
    assert len(html.encode()) < 700_000
    assert covered(Page(html)) == list(range(8000))


def test_a_long_row_is_paged_and_pages_together_hold_every_token():
    row = long_conversation(4500)
    folded = render_html(row, TOKENIZER, page=1)
    assert re.findall(r"<details( open)?><summary", folded) == ["", " open", ""]
    pages = [render_html(row, TOKENIZER, per_token=True, page=page) for page in range(3)]
    assert [position for html in pages for position in covered(Page(html))] == list(range(4500))
    with pytest.raises(DataError, match="page 3 does not exist: the row has 4,500 tokens, which is 3 pages of 2,000"):
        render_html(row, TOKENIZER, per_token=True, page=3)


def luminance(color) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def over(color, alpha, background):
    return [alpha * c + (1 - alpha) * b for c, b in zip(color, background)]


@pytest.mark.parametrize(
    ("background", "text", "text_alpha"),
    [
        ((255, 255, 255), (0, 0, 0), 0.87),
        ((17, 17, 17), (255, 255, 255), 1.0),
        ((31, 31, 31), (204, 204, 204), 1.0),
    ],
    ids=["light", "dark", "grey on dark"],
)
def test_inherited_text_keeps_its_contrast_on_every_tint_and_when_dim(background, text, text_alpha):
    def contrast(one, other):
        bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (bright + 0.05) / (dark + 0.05)

    for color in (theme.BLUE, theme.ORANGE):
        tinted = over(color, theme.STRONGEST_TINT, background)
        assert contrast(over(text, text_alpha, tinted), tinted) >= 4.5
    assert contrast(over(text, text_alpha * theme.DIM, background), background) >= 4.5


@pytest.mark.parametrize("color", [True, False])
def test_the_terminal_gets_no_control_character_of_the_row(color):
    row = conversation([("user", NASTY), ("assistant", NASTY)], problems=[NASTY])
    losses = np.where(row.loss_mask > 0, 3.0, np.nan)
    text = render_text(row, TOKENIZER, title=NASTY, color=color, token_loss=losses)
    if color:
        assert "\x1b[" in text
        text = re.sub(r"\x1b\[[0-9;]+m", "", text)
    assert [character for character in text if hides(character) and character not in "\u200d\ufe0f"] == []
    assert "\t" not in text


def test_plain_text_marks_what_is_trained():
    text = render_text(conversation(), TOKENIZER, title="row 12", color=False)
    assert "⟦Arr, the capital be Paris, me hearty.<|im_end|>⟧⏎" in text
    assert "│ <|im_start|>user⏎\n│ What is the capital of France?<|im_end|>⏎" in text


def test_marks_in_the_row_cannot_pass_for_ours():
    row = conversation([("user", "⟦not trained⟧"), ("assistant", "x")])
    assert "‹U+27E6›not trained‹U+27E7›" in render_text(row, TOKENIZER, color=False)


def test_lines_fit_the_width():
    row = conversation([("user", WORDS * 3 + "x" * 200 + "日本語のテキスト" * 20), ("assistant", "y" * 150)])
    for line in render_text(row, TOKENIZER, color=False, width=60).split("│ ")[1:]:
        first = line.split("\n")[0]
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in first) <= 58


def test_the_highest_losses_are_listed_first():
    row = conversation()
    losses = np.where(row.loss_mask > 0, np.arange(len(row.tokens)) / 10, np.nan)
    listed = render_text(row, TOKENIZER, color=False, token_loss=losses).split("highest losses")[1].splitlines()[1:]
    worst = np.flatnonzero(row.loss_mask)[::-1][:8]
    assert [int(line.split()[1]) for line in listed] == worst.tolist()


def padded(rows, width):
    tokens_BT = np.zeros((len(rows), width), dtype=np.int32)
    loss_mask_BT = np.zeros((len(rows), width), dtype=np.float32)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row.tokens)] = row.tokens
        loss_mask_BT[index, : len(row.tokens)] = row.loss_mask
    return tokens_BT, loss_mask_BT


def test_a_batch_card_shows_the_next_token_with_the_weight_of_the_next_token():
    row = conversation([("user", "hi"), ("assistant", "yes")])
    tokens_BT, loss_mask_BT = padded([row], len(row.tokens) + 5)
    html = render_batch_html(tokens_BT, loss_mask_BT, TOKENIZER, [7])
    seen = 0
    for title in Page(html).titles():
        match = re.match(r"position (\d+) · id (\d+) .*→ predicts token (\d+) · id (\d+) · weight (\S+)", title)
        if match:
            position, token, following, target = map(int, match.groups()[:4])
            assert following == position + 1
            assert token == tokens_BT[0, position]
            assert target == tokens_BT[0, position + 1]
            assert float(match[5]) == loss_mask_BT[0, position + 1]
            seen += 1
    assert seen >= len(row.tokens)
    assert "row 7</b>" in html
    assert f"{len(row.tokens)} tokens, {np.count_nonzero(row.loss_mask)} trained, 5 padding" in html


def test_a_target_that_counts_across_a_segment_is_marked():
    row = conversation([("user", "hi"), ("assistant", "yes")])
    tokens_BT, loss_mask_BT = padded([row], len(row.tokens))
    segments_BT = np.zeros_like(tokens_BT)
    inside = int(np.flatnonzero(row.loss_mask)[1])
    segments_BT[0, inside:] = 1
    crossing = [
        title
        for title in Page(
            render_batch_html(tokens_BT, loss_mask_BT, TOKENIZER, ["a"], segments_BT=segments_BT)
        ).titles()
        if "across a boundary" in title
    ]
    assert [int(title.split()[1]) for title in crossing] == [inside - 1]


def test_long_padding_is_shortened_and_counted():
    row = conversation()
    html = render_batch_html(*padded([row], len(row.tokens) + 500), TOKENIZER, [0])
    # The last token still predicts padding with weight 0, so it belongs to the text.
    assert "⋯ 497 more like this" in html


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(DataError, match="the batch cannot be shown"):
        render_batch_html(np.zeros((2, 4), int), np.zeros((2, 5)), TOKENIZER, [1, 2])
    with pytest.raises(DataError, match="each line a row name"):
        render_batch_html(np.zeros((2, 4), int), np.zeros((2, 4)), TOKENIZER, [1])
