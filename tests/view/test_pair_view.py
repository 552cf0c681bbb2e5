"""Pairs on screen: both answers with their masks, what differs marked, nothing lost, nothing that runs."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_nb.errors import DataError
from mlx_nb.view.rows.diff import differing_indices
from mlx_nb.view.rows.overlay import render_html
from mlx_nb.view.rows.pair import Answer, pages_of_pair, pair_cells, render_pair_html, render_pair_text
from shown_rows import ATTRIBUTES, MESSAGES, NASTY, TAGS, TOKENIZER, Page, conversation, long_conversation

ASKED = MESSAGES[:2]


def pair(chosen: str, rejected: str) -> tuple[Answer, Answer]:
    said = (conversation([*ASKED, ("assistant", answer)]) for answer in (chosen, rejected))
    return tuple(Answer(one) for one in said)


def differing_text(cells) -> str:
    return "".join(cell.text if cell.differs else "|" for cell in cells)


def test_words_that_differ_are_marked_whole_and_others_are_not():
    cells = pair_cells(*pair("the capital be Paris, me hearty", "the capital is Paris, my friend"), TOKENIZER)
    assert differing_text(cells.chosen).replace("|", "") == " be me hearty"
    assert differing_text(cells.rejected).replace("|", "") == " is my friend"
    assert not any(cell.differs for cell in cells.prompt)


def test_one_word_that_agrees_by_chance_between_long_differences_is_marked_with_them():
    cells = pair_cells(*pair("you are hearty, Paris helpful assistant", "what is the, of France capital"), TOKENIZER)
    assert differing_text(cells.chosen).strip("|") == "you are hearty, Paris helpful assistant"


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_what_is_not_marked_is_the_same_in_both(one, other):
    differing = differing_indices(one, other)
    left = [
        [word for place, word in enumerate(said) if place not in marked]
        for said, marked in zip((one, other), differing)
    ]
    assert left[0] == left[1]
    assert differing_indices(one, one) == (set(), set())


@pytest.mark.parametrize("words", [1, 3, 5000])
def test_the_difference_of_long_answers_is_found_in_a_moment(words):
    draw = random.Random(0)
    one, other = ([draw.randrange(words) for _ in range(4000)] for _ in range(2))
    started = time.perf_counter()
    differing_indices(one, other)
    assert time.perf_counter() - started < 3


def test_the_prompt_is_shown_once_and_every_token_of_both_answers():
    answers = pair("Arr, Paris.", "Paris, of course.")
    page = Page(render_pair_html(*answers, TOKENIZER, per_token=True))
    said = [answer.conversation for answer in answers]
    positions = [int(title.split()[1].rstrip(" ·")) for title, _, _ in page.tokens() if title.startswith("token ")]
    assert sorted(set(positions)) == list(range(max(len(one.tokens) for one in said)))
    cells = pair_cells(*answers, TOKENIZER)
    prompt = cells.prompt[-1].stop
    assert len(positions) == len(said[0].tokens) + len(said[1].tokens) - prompt
    assert said[0].tokens[:prompt].tolist() == said[1].tokens[:prompt].tolist()
    trained = sum(", weight 1" in title for title in page.titles())
    assert trained == sum(int(np.count_nonzero(one.loss_mask)) for one in said)


def test_answers_without_a_common_prompt_are_shown_whole():
    one, other = conversation(MESSAGES), conversation([("user", "Paris?"), ("assistant", "No.")])
    cells = pair_cells(Answer(one), Answer(other), TOKENIZER)
    assert cells.prompt == []
    assert cells.chosen[-1].stop == len(one.tokens)
    assert cells.rejected[-1].stop == len(other.tokens)


def test_a_difference_is_shown_by_a_bar_and_a_legend_and_not_by_color_alone():
    html = render_pair_html(*pair("Arr, Paris.", "It is Paris."), TOKENIZER)
    marked = [(style, title) for title, style, _ in Page(html).tokens() if "differs from the other answer" in title]
    assert marked
    assert all("border-top:2px solid" in style for style, _ in marked)
    assert html.count("border-top:2px solid") == len(marked) + 1  # the sample in the legend
    same = render_html(conversation(), TOKENIZER)
    assert "differs" not in same


def test_losses_of_both_answers_color_their_tokens():
    answers = [
        Answer(said, np.full(len(said.tokens), loss), np.full(len(said.tokens), loss + 1))
        for said, loss in zip((one.conversation for one in pair("Arr, Paris.", "It is Paris.")), (1.0, 3.0))
    ]
    html = render_pair_html(*answers, TOKENIZER)
    assert "mean loss of the trained tokens 1.000 nats, base model 2.000: better by 1.000" in html
    assert "mean loss of the trained tokens 3.000 nats, base model 4.000: better by 1.000" in html
    assert "loss 1.000 nats" in html
    assert "loss 3.000 nats" in html
    text = render_pair_text(*answers, TOKENIZER, color=False)
    assert text.count("highest losses") == 2
    with pytest.raises(DataError, match="token_loss has shape"):
        render_pair_html(answers[0], Answer(answers[1].conversation, np.zeros(3)), TOKENIZER)


def test_long_answers_are_paged_together():
    long, short = long_conversation(5000), conversation([*ASKED, ("assistant", "No.")])
    answers = Answer(long), Answer(short)
    assert pages_of_pair(pair_cells(*answers, TOKENIZER)) == 3
    assert "this answer has no tokens on this page" in render_pair_html(*answers, TOKENIZER, page=2, per_token=True)
    with pytest.raises(DataError, match="page 3 does not exist"):
        render_pair_html(*answers, TOKENIZER, page=3)


def test_as_text_marks_stand_around_what_is_trained_and_what_differs():
    text = render_pair_text(*pair("Arr, Paris ▸ it is.", "No, Paris ▸ it is."), TOKENIZER, title="row 3", color=False)
    assert "\x1b" not in text
    assert "⟦▸Arr◂, Paris ‹U+25B8› it is.<|im_end|>⟧" in text
    assert "⟦▸No◂, Paris ‹U+25B8› it is.<|im_end|>⟧" in text
    assert text.count("What is the capital of France?") == 1
    assert text.index("✓ chosen") < text.index("Arr") < text.index("✗ rejected") < text.index("▸No")
    assert "\x1b[1;4;38;5;166m" in render_pair_text(*pair("Arr.", "No."), TOKENIZER)


def test_a_hostile_pair_is_escaped_in_every_form():
    answers = pair(NASTY, NASTY[::-1])
    for html in (
        render_pair_html(*answers, TOKENIZER, title=NASTY),
        render_pair_html(*answers, TOKENIZER, per_token=True, hidden_roles=["user"]),
    ):
        page = Page(html)
        assert {tag for tag, _, _ in page.elements} <= TAGS
        assert {name for _, attributes, _ in page.elements for name in attributes} <= ATTRIBUTES
    text = render_pair_text(*answers, TOKENIZER, title=NASTY, color=False)
    assert not any(ord(character) < 32 and character != "\n" for character in text)
