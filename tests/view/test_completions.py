"""Completions on screen: every number of a rollout, nothing of a text that runs or gets lost, colors that mean it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlx_nb.errors import CommandError
from mlx_nb.events import RolloutCompleted
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.view.panel import page_requests
from mlx_nb.view.reports.completions import CompletionsDisplay, completions_html, completions_text, fits
from shown_rows import NASTY, TOKENIZER, Page

TAGS = {"div", "span", "bdi", "b", "br", "details", "summary", "table", "tr", "th", "td", "wbr"}
ATTRIBUTES = {"class", "dir", "style", "title", "open", "scope", "aria-hidden"}


class Table(Page):
    """The page, which may break long names."""

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag == "wbr":
            self.stack.pop()

    def rows(self) -> list[list[str]]:
        """The texts of the cells of each row."""
        rows: list[list[str]] = []
        for tag, _, text in self.elements:
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("".join(text).strip())
        return rows


def completion(text="red", advantage=0.5, *, finished=True, tokens=2, **rewards) -> dict:
    known = [value for value in rewards.values() if value is not None]
    return {
        "text": text,
        "rewards": rewards,
        "reward": sum(known) if known else None,
        "advantage": advantage,
        "tokens": tokens,
        "finished": finished,
    }


def rollout(*groups: list[dict], prompt="say red", problems=()) -> RolloutCompleted:
    reported = tuple({"row": 7 + k, "prompt": prompt, "completions": group} for k, group in enumerate(groups))
    return RolloutCompleted(4, reported, 1.25, problems=tuple(problems))


def test_a_line_has_every_number_of_its_completion():
    group = [
        completion("red red", 1.25, short=0.5, right_word=1.0),
        completion("green", -1.25, finished=False, tokens=1200, short=0.25, right_word=None),
        completion("", 0.0, short=None, right_word=None),
    ]
    html = completions_html(rollout(group, problems=["reward short: <b>bad</b>"]))
    head, *lines = Table(html).rows()
    assert head == ["", "completion", "advantage", "reward", "short", "right_word", "tokens"]
    assert lines == [
        ["0", "red red", "+1.25", "1.5", "0.5", "1", "2"],
        ["1", "green", "-1.25", "0.25", "0.25", "no number", "1,200 cut"],
        ["2", "nothing", "0", "no number", "no number", "no number", "2"],
    ]
    assert "⚠ reward short: &lt;b&gt;bad&lt;/b&gt;" in html
    text = completions_text(rollout(group, problems=["reward short: <b>bad</b>"]))
    reported = text.splitlines()
    numbers = [line.split() for line in reported if line[:1].isdecimal()]
    assert numbers[0] == ["0", "+1.25", "1.5", "0.5", "1", "2"]
    assert numbers[1] == ["1", "-1.25", "0.25", "0.25", "no", "number", "1,200", "cut"]
    assert [line.strip() for line in reported if line.startswith("    ")] == ["red red", "green", "nothing"]
    assert reported[-1] == "⚠ reward short: <b>bad</b>"


def test_a_column_name_breaks_only_after_its_underscores_in_any_message():
    html = completions_html(rollout([completion("red", exact_match=1.0)]))
    heads = re.findall(r'<th scope="col" style="([^"]*)">(.*?)</th>', html)
    assert "exact_<wbr>match" in [name for _, name in heads]
    assert all("overflow-wrap:normal" in style for style, name in heads if name)


def test_bars_are_as_long_as_advantages_and_point_to_their_side():
    html = completions_html(
        rollout([completion(advantage=2.0, a=1), completion(advantage=-1.0, a=0)], [completion(a=1)])
    )
    bars = re.findall(r"width:([\d.]+)px;height:9px;background:rgba\((\d+)", html)
    assert bars == [("18.0", "0"), ("9.0", "213"), ("4.5", "0")]
    assert html.count('text-align:right"><span style="display:inline-block;width:9.0px') == 1


def test_a_group_that_teaches_nothing_says_so():
    same = [completion(advantage=0.0, a=1.0), completion(advantage=0.0, a=1.0)]
    other = [completion(advantage=1.0, a=1.0), completion(advantage=-1.0, a=0.0)]
    for shown in (completions_html(rollout(same, other)), completions_text(rollout(same, other))):
        assert shown.count("this prompt teaches nothing now") == 1
        assert "reward 0.5 ± 0.707" in shown
    assert "no reward" in completions_text(rollout([completion()]))


def test_long_texts_fold_and_lose_nothing():
    long = "".join(f"word {k}, " for k in range(200)) + "end."
    html = completions_html(rollout([completion(long, a=1.0)], prompt=long))
    page = Table(html)
    folded = ["".join(text) for tag, _, text in page.elements if tag == "details"]
    said = [re.sub(r" … [\d,]+ more", "", text) for text in folded]
    assert sum(text == long for text in said) == 2
    heads = ["".join(text) for tag, _, text in page.elements if tag == "summary"]
    assert max(map(len, heads)) < 400
    assert all(
        len(line) <= 80 for line in completions_text(rollout([completion(long, a=1.0)], prompt=long), 80).splitlines()
    )
    lines = "\n".join(["x"] * 50)
    assert "…" in completions_html(rollout([completion(lines, a=1.0)]))


def test_a_large_rollout_stays_small_and_says_what_is_left_out():
    large = rollout(*[[completion("word " * 1000, a=1.0, b=0.5) for _ in range(8)] for _ in range(40)])
    html = completions_html(large)
    assert "… and 24 more prompts" in html
    assert html.count("<details open") == 3
    assert len(html) < 1_500_000
    assert "… and 24 more prompts" in completions_text(large)


def test_hostile_texts_names_and_problems_are_escaped():
    hostile = rollout([completion(NASTY, **{NASTY: 1.0})], prompt=NASTY, problems=[NASTY])
    page = Table(completions_html(hostile))
    assert {tag for tag, _, _ in page.elements} <= TAGS
    assert {name for _, attributes, _ in page.elements for name in attributes} <= ATTRIBUTES
    assert not any(ord(character) < 32 and character != "\n" for character in completions_text(hostile))


def ratios_of(group: list[dict], *values: list[float]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    return [
        (7, np.array(TOKENIZER.bpe.encode(said["text"]).ids), np.array(value, np.float32))
        for said, value in zip(group, values)
    ]


def test_tokens_are_colored_by_how_their_probability_changed():
    text = "the capital"
    ids = TOKENIZER.bpe.encode(text).ids
    values = [0.2 * (-1) ** k for k in range(len(ids))]
    values[0] = 0.0
    group = [completion(text, a=1.0, tokens=len(ids))]
    shown = rollout(group)
    ratios = ratios_of(group, values)
    assert fits(shown, ratios)
    page = Table(completions_html(shown, TOKENIZER, ratios))
    tokens = page.tokens()
    assert "".join(said for _, _, said in tokens) == text
    assert tokens[0][1] == ""
    for (title, style, _), value, token in list(zip(tokens, values, ids))[1:]:
        assert f"id {token} · log-ratio {value:+.3f} · probability × {np.exp(value):.3g}" in title
        assert ("rgba(0,114,178" in style, "2px solid" in style) == (value > 0, value > 0)
        assert ("rgba(213,94,0" in style, "2px dashed" in style) == (value < 0, value < 0)
    assert {"-0.2", "-0.1", "+0.1", "+0.2"} <= {"".join(said) for _, _, said in page.elements}


def test_ratios_of_other_completions_are_not_drawn():
    group = [completion("the capital", a=1.0, tokens=99)]
    ratios = ratios_of(group, [0.1] * 50)
    assert not fits(rollout(group), ratios)
    assert completions_html(rollout(group), TOKENIZER, ratios) == completions_html(rollout(group))


# Of a run


def test_a_run_shows_its_newest_completions_and_those_of_a_step(make_run):
    run = make_run("grpo")
    session = Session()
    session.add(run)
    with pytest.raises(CommandError, match="no completions yet"):
        run_line(session, "rollouts")
    run.step(3)
    newest = run_line(session, "rollouts")
    assert isinstance(newest, CompletionsDisplay)
    assert newest.rollout is run.history.last_rollouts(1)[0]
    assert newest.rollout.step == 2
    assert run_line(session, "rollouts --step 1").rollout.step == 1
    assert run.completions(0).rollout.step == 0
    said = [one for group in newest.rollout.groups for one in group["completions"]]
    lines = [row for row in Table(newest._repr_html_()).rows() if row[0] != ""]
    assert len(lines) == len(said) == 6
    with pytest.raises(CommandError, match="until update -1"):
        run.completions(-1)
    with pytest.raises(CommandError, match="trains on rows"):
        make_run("dpo").completions()


@pytest.mark.parametrize("uses", [1, 2])
def test_log_ratios_are_of_the_last_completions_used_or_not(make_run, uses):
    run = make_run("grpo", updates_per_rollout=uses, learning_rate=1e-2)
    with pytest.raises(CommandError, match="no completions in memory"):
        run.log_ratios()
    run.step(uses)
    ratios = run.log_ratios()
    assert fits(run.history.last_rollouts(1)[0], ratios)
    largest = max(float(np.abs(ratio_T).max()) for _, _, ratio_T in ratios)
    assert 1e-3 < largest < 50
    before = run.adapter_bytes()
    assert "log(current policy / sampling policy)" in run.completions(ratios=True)._repr_html_()
    assert run.adapter_bytes() == before
    run.rewind(to=0)
    with pytest.raises(CommandError, match="no completions in memory"):
        run.log_ratios()


def test_the_policy_that_sampled_is_the_policy_before_its_update(make_run):
    run = make_run("grpo", updates_per_rollout=2)
    for event in run.events(1):
        if isinstance(event, RolloutCompleted):
            ratios = run.log_ratios()
            assert max(float(np.abs(ratio_T).max()) for _, _, ratio_T in ratios) < 1e-4


@pytest.mark.long
def test_looking_at_ratios_changes_no_bit_of_what_follows(make_run):
    plain, looked = make_run("grpo"), make_run("grpo")
    plain.run()
    for event in looked.events():
        if type(event).__name__ in ("RolloutCompleted", "StepCompleted"):
            looked.completions(ratios=True)._repr_html_()
    assert looked.adapter_bytes() == plain.adapter_bytes()


# In the panel, and in what stays


def opened(run):
    """Its panel with the page of completions on show, and what the page is sent."""
    panel, sent = run.panel(), []
    panel.send = lambda content, buffers=None: sent.append(content)
    panel.tab = "Completions"
    panel.show_again("completions")
    return panel, sent


def chosen(panel, sent, place, colored=False):
    """The completions of a rollout of before, as the page asks for them."""
    panel._on_message(None, {"show": "rollout", "id": 1, "place": place, "colored": colored}, None)
    return sent[-1]


def test_only_runs_that_sample_have_the_page(make_run):
    assert "Completions" not in make_run("dpo").panel().tabs
    run = make_run("grpo")
    assert run.panel().tabs[:3] == ["Curves", "Rows", "Completions"]


def test_the_page_shows_the_newest_completions_and_those_chosen(make_run):
    run = make_run("grpo")
    panel, sent = opened(run)
    assert "no completions have been sampled yet" in panel.completions["note"]
    run.step(2)
    panel.refresh()
    assert panel.completions["updates"] == [1, 0]
    assert panel.completions["html"] == completions_html(run.history.last_rollouts(1)[0])
    first = completions_html(run.history.last_rollouts(2)[0])
    assert chosen(panel, sent, 1)["html"] == first
    run.step()
    panel.refresh()
    assert panel.completions["updates"] == [2, 1, 0]
    assert chosen(panel, sent, 2)["html"] == first
    assert chosen(panel, sent, 0)["html"] == completions_html(run.history.last_rollouts(1)[0])


def test_the_toggle_colors_the_newest_completions_and_measures_once_for_an_update(make_run):
    run = make_run("grpo", updates_per_rollout=2)
    run.step(2)
    panel, sent = opened(run)
    measured, log_ratios = [], run.log_ratios
    run.log_ratios = lambda: measured.append(run.step_count) or log_ratios()
    plain = panel.completions["html"]
    panel.coloring = True
    assert "log(current policy" in panel.completions["html"]
    for _ in range(3):
        panel.show_again("completions")
    assert measured == [2]
    run.step()
    panel.refresh()
    assert measured[-1] == 3
    assert measured in ([2, 3], [2, 2, 3])  # new completions before update 3, if that was drawn, and after it
    older = chosen(panel, sent, 1, colored=True)
    assert "log(current policy" not in older["html"]
    assert "only the newest" in older["note"]
    panel.coloring = False
    assert panel.completions["note"] == ""
    assert chosen(panel, sent, 1)["html"] == plain


def test_what_cannot_be_measured_is_reported_on_the_page(make_run):
    run = make_run("grpo")
    run.step()
    panel, _ = opened(run)

    def full():
        raise RuntimeError("[malloc] Unable to allocate")

    run.log_ratios = full
    panel.coloring = True
    assert "Unable to allocate" in panel.completions["note"]
    assert panel.completions["html"] == completions_html(run.history.last_rollouts(1)[0])
    run.run()
    assert run.finished


def test_long_completions_go_to_a_page_only_when_it_shows_them(make_run, monkeypatch):
    run = make_run("grpo")
    panel, sent = opened(run)
    panel.tab = "Curves"
    monkeypatch.setattr(page_requests, "MOST_CHARACTERS_UNREQUESTED", 10)
    run.step()
    panel.refresh()
    assert panel.completions["html"] is None
    assert chosen(panel, sent, 0)["html"] == completions_html(run.history.last_rollouts(1)[0])
    panel.tab = "Completions"
    run.step()
    panel.refresh()
    assert panel.completions["html"] == completions_html(run.history.last_rollouts(1)[0])


@pytest.mark.long
def test_a_report_and_a_log_keep_completions_and_problems(make_run, tmp_path):
    run = make_run("grpo")
    panel = run.panel()
    run.run()
    rollout = run.history.last_rollouts(1)[0]
    page = run.report(tmp_path / "report.html").read_text()
    assert "Completions of the last rollout" in page
    assert completions_html(rollout) in page
    assert "<th>perplexity</th>" not in page
    assert "<th>reward</th>" in page
    reported = "\n".join(panel.event_log["lines"])
    assert "completions of 2 prompts" in reported
    problems = [problem for one in run.history.last_rollouts(9) for problem in one.problems]
    assert problems
    assert "it returned None" in reported


def test_a_row_of_an_update_is_listed_once_with_the_mean_of_its_completions(make_run):
    run = make_run("grpo")
    event = run.step()
    panel = run.panel()
    listed = [row for row, _, _ in panel.latest["rows"]]
    assert sorted(listed) == sorted(set(event.rows))
    assert len(event.row_losses) == 3 * len(event.rows)
    row = listed[0]
    mean = np.mean([loss for one, loss in event.row_losses if one == row])
    assert run.history.row_losses()[row] == [(0, pytest.approx(mean))]
