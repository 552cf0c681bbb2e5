"""Strings are a user and an assistant turn of the chat template, for every method, unless `prompt_format` says raw."""

from __future__ import annotations

import numpy as np
import pytest

from chat_shapes import shaped_tokenizer
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.check.check import check_data
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.prompt_format import Rendering
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import ConfigError, DataError
from mlx_nb.events import Question, SampleGenerated
from mlx_nb.rollouts.generation import generate_texts
from mlx_nb.run.live_model import SampleAnswers, stream_answer
from mlx_nb.run.notes import start_notes
from mlx_nb.run.run import Run
from mlx_nb.view.rows.display import ShownRow

KINDS = {"sft": "tokens", "dpo": "pairs", "cpo": "pairs", "orpo": "pairs", "kto": "labels", "grpo": "prompts"}
STRINGS = {
    "tokens": {"prompt": "say red", "completion": "redred"},
    "pairs": {"prompt": "say red", "chosen": "redred", "rejected": "no"},
    "labels": {"prompt": "say red", "completion": "redred", "label": True},
    "prompts": {"prompt": "say red"},
}
USER, ANSWER = {"role": "user", "content": "say red"}, {"role": "assistant", "content": "redred"}
MESSAGES = {
    "tokens": {"messages": [USER, ANSWER]},
    "pairs": {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]},
    "labels": {"messages": [USER, ANSWER], "label": True},
    "prompts": {"prompt": [USER]},
}
methods = pytest.mark.parametrize("method", KINDS)


@pytest.fixture
def tokenizer():
    return shaped_tokenizer("chatml")


@pytest.fixture(params=["alone", "wrapped"])
def bare(request):
    """Without a chat template; also in mlx-lm's wrapper, which looked for one before it was taken away."""
    from copy import deepcopy

    from mlx_lm.tokenizer_utils import TokenizerWrapper

    other = deepcopy(shaped_tokenizer("chatml"))
    if request.param == "wrapped":
        other = TokenizerWrapper(other)
    other.chat_template = None
    return other


def config_for(method, **settings):
    more = {"rewards": ["number_match"]} if method == "grpo" else {}
    return RunConfig.from_dict({"method": method, "val_set_size": 0, **more, **settings})


def view_of(record, tokenizer, method, **settings):
    source = open_splits([record], val_set_size=0).train
    return Examples(source, tokenizer, ExampleSettings.of(config_for(method, **settings)), KINDS[method]).view(0)


def check(rows, tokenizer, method="sft", **settings):
    return check_data(open_splits(rows, val_set_size=0), tokenizer, config_for(method, **settings), kind=KINDS[method])


@methods
def test_strings_are_trained_as_the_same_messages_are(method, tokenizer):
    strings, messages = (view_of(rows[KINDS[method]], tokenizer, method) for rows in (STRINGS, MESSAGES))
    assert (strings.error, strings.format) == (None, "chat template")
    assert len(strings.conversations) == len(messages.conversations) > 0
    for ours, theirs in zip(strings.conversations, messages.conversations):
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.loss_mask, theirs.loss_mask)


@methods
def test_raw_strings_follow_one_another_without_anything_between(method, tokenizer):
    view = view_of(STRINGS[KINDS[method]], tokenizer, method, prompt_format="raw")
    assert (view.error, view.format) == (None, "raw text")
    answer = "" if method == "grpo" else "redred"
    assert view.conversation.text == f"say red{answer}"


@methods
def test_without_a_template_strings_are_raw_and_chat_is_one_clear_error(method, bare):
    view = view_of(STRINGS[KINDS[method]], bare, method)
    assert (view.error, view.format) == (None, "raw text")
    for ask in (
        lambda: view_of(STRINGS[KINDS[method]], bare, method, prompt_format="chat"),
        lambda: check([STRINGS[KINDS[method]]], bare, method, prompt_format="chat"),
        lambda: prompt_tokens(bare, "say red", rendering=Rendering("chat")),
    ):
        with pytest.raises(DataError, match=r"^`prompt_format: chat` needs a chat template") as caught:
            ask()
        assert "\n" not in str(caught.value)


@methods
@pytest.mark.parametrize("context", [{"system": "be brief"}, {"tools": [{"type": "function", "function": {}}]}])
def test_a_system_prompt_or_tools_do_not_make_a_raw_row_a_chat(method, context, tokenizer):
    view = view_of({**STRINGS[KINDS[method]], **context}, tokenizer, method, prompt_format="raw")
    assert view.conversation is None
    assert view.error.startswith("row 0: the row's strings are raw text, in which its ")
    if "system" in context:
        chat = view_of({**STRINGS[KINDS[method]], **context}, tokenizer, method)
        assert (chat.error, chat.format) == (None, "chat template")
        assert chat.conversation.text.startswith("<|im_start|>system\nbe brief<|im_end|>\n")


def test_a_null_system_column_changes_nothing(tokenizer):
    for setting in ("chat", "raw"):
        plain = view_of(STRINGS["tokens"], tokenizer, "sft", prompt_format=setting)
        null = view_of({**STRINGS["tokens"], "system": None}, tokenizer, "sft", prompt_format=setting)
        assert np.array_equal(plain.conversation.tokens, null.conversation.tokens)


def test_instruction_rows_are_strings_too(tokenizer, bare):
    row = {"instruction": "say red", "output": "redred"}
    for view in (view_of(row, tokenizer, "sft", prompt_format="raw"), view_of(row, bare, "sft")):
        assert (view.error, view.format, view.conversation.text) == (None, "raw text", "say redredred")
    assert view_of(row, tokenizer, "sft").format == "chat template"


def test_only_the_two_formats_are_taken():
    with pytest.raises(ConfigError, match="Choose one of: chat, raw"):
        config_for("sft", prompt_format="template")


# --- the data check and the row view ----------------------------------------------------------------------------------


@methods
def test_rows_of_one_split_in_two_formats_are_named(method, tokenizer):
    kind = KINDS[method]
    rows = [STRINGS[kind], MESSAGES[kind], STRINGS[kind]]
    result = check(rows, tokenizer, method, prompt_format="raw")
    (found,) = [item for item in result.findings if item.kind == "mixed_formats"]
    assert (found.severity, found.rows, found.count) == ("warning", (1,), 1)
    assert found.examples == ((1, "chat template; the first row is raw text"),)
    assert result.splits[0].formats == {"raw text": 2, "chat template": 1}
    same = check(rows, tokenizer, method)
    assert not [item for item in same.findings if item.kind == "mixed_formats"]
    assert same.splits[0].formats == {"chat template": 3}


def test_plain_text_beside_a_chat_and_another_split_in_another_format_are_named(tokenizer):
    rows = {"train": [STRINGS["tokens"], {"text": "red"}], "valid": [{"text": "blue"}]}
    result = check_data(open_splits(rows), tokenizer, config_for("sft"))
    found = [(item.split, item.examples) for item in result.findings if item.kind == "mixed_formats"]
    assert found == [
        ("train", ((1, "raw text; the first row is chat template"),)),
        ("valid", ((0, "raw text; the first training row is chat template"),)),
    ]


def test_the_row_view_and_the_report_say_which_format(tokenizer):
    from mlx_nb.view.reports.check import CheckDisplay

    for setting, words in (("chat", "chat template"), ("raw", "raw text")):
        shown = ShownRow.of(view_of(STRINGS["tokens"], tokenizer, "sft", prompt_format=setting), tokenizer, "train")
        assert repr(shown).startswith(f"train row 0 (data[0]) · {words}")
        assert f"train row 0 (data[0]) · {words}" in shown._repr_html_()
        report = CheckDisplay(check([STRINGS["tokens"]], tokenizer, prompt_format=setting))
        assert f"1 {words}" in repr(report)
        assert f"1 {words}" in report._repr_html_()


# --- asking -----------------------------------------------------------------------------------------------------------

PROMPT = "say red 4"


def run_of(rows, tiny_folder, tmp_path, **settings):
    given = {"model": str(tiny_folder), "data": rows, "iters": 1, "adapter_path": str(tmp_path / "out"), **settings}
    return Run(RunConfig.from_dict({"val_set_size": 0, **given}), name="asking")


def answer(run, rendering):
    (text,) = generate_texts(
        run.model, run.tokenizer, [PROMPT], max_tokens=6, temperature=0.0, seed=0, rendering=rendering
    )
    return text


STRING_ROWS = [{"prompt": f"say red {k}", "completion": "redred"} for k in range(8)]
TEXT_ROWS = [{"text": f"say red {k} and be done"} for k in range(8)]
CHAT_AS_TEXT = [{"text": f"<|user|>say red {k}<|end|>\n<|assistant|>red<|end|>\n"} for k in range(8)]


@pytest.mark.parametrize(
    ("rows", "settings", "asked"),
    [
        (STRING_ROWS, {}, "chat"),
        (STRING_ROWS, {"prompt_format": "raw"}, "raw"),
        (TEXT_ROWS, {}, "raw"),
        (TEXT_ROWS, {"prompt_format": "chat"}, "chat"),
        (CHAT_AS_TEXT, {}, "chat"),
        ("no such folder", {}, "chat"),
    ],
)
@pytest.mark.matrix(every=3)
def test_every_way_of_asking_writes_a_text_as_the_rows_are_written(rows, settings, asked, tiny_folder, tmp_path):
    run = run_of(rows, tiny_folder, tmp_path, **settings)
    assert run.inputs.prompt_rendering == Rendering(asked)
    expected = answer(run, Rendering(asked))
    assert expected != answer(run, Rendering("raw" if asked == "chat" else "chat"))
    assert run.generate(PROMPT, max_tokens=6) == expected
    assert run.generate([PROMPT, PROMPT], max_tokens=6) == [expected, expected]
    assert [*SampleAnswers(run.inputs)(PROMPT, 6)][-1][0] == expected
    for question in (PROMPT, [{"role": "user", "content": PROMPT}]):
        said = [*stream_answer(run.inputs, Question(question, lambda text, done: None, max_tokens=6))]
        assert said[-1] == expected
    # Messages are a chat whatever the rows are.
    assert run.generate([{"role": "user", "content": PROMPT}], max_tokens=6) == answer(run, Rendering("chat"))


def test_kept_prompts_are_asked_as_the_rows_are_written(tiny_folder, tmp_path):
    for name, rows in (("chat", STRING_ROWS), ("raw", TEXT_ROWS)):
        settings = {"sample_prompts": [PROMPT], "sample_tokens": 6, "learning_rate": 1e-9}
        run = run_of(rows, tiny_folder, tmp_path / name, **settings)
        samples = [event for event in run.events() if isinstance(event, SampleGenerated)]
        assert samples
        assert {event.answer for event in samples} == {answer(run, Rendering(name))}


def test_the_notes_of_a_run_on_plain_text_say_how_it_is_asked(tiny_folder, tmp_path):
    note = "The training rows are plain text, so prompts are raw text too."
    assert any(text.startswith(note) for text in start_notes(run_of(TEXT_ROWS, tiny_folder, tmp_path).inputs))
    for rows, settings in ((STRING_ROWS, {}), (TEXT_ROWS, {"prompt_format": "raw"}), (CHAT_AS_TEXT, {})):
        notes = start_notes(run_of(rows, tiny_folder, tmp_path, **settings).inputs)
        assert not any(text.startswith(note) for text in notes)


def test_a_question_that_cannot_be_written_is_answered_with_the_reason_and_the_run_continues(tiny_folder, tmp_path):
    picky = (
        "{% for m in messages %}{% if 'boom' in m.content %}{{ raise_exception('no boom') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    run = run_of(STRING_ROWS, tiny_folder, tmp_path, chat_template=picky, iters=2)
    run.step()
    said = []
    run.ask(Question("boom?", lambda text, done: said.append((text, done))))
    run.run()
    assert run.finished
    text, done = said[-1]
    assert text.startswith("not answered: the chat template does not render this prompt: ")
    assert ("no boom" in text, done) == (True, True)


def test_rollouts_are_asked_as_the_prompts_are_written(tiny_folder, tmp_path):
    for setting in ("chat", "raw"):
        rows = [{"prompt": PROMPT, "answer": "4"}]
        more = {"method": "grpo", "rewards": ["number_match"], "prompt_format": setting}
        run = run_of(rows, tiny_folder, tmp_path, **more)
        (example,) = run.inputs.examples.train
        assert example.prompt_tokens.tolist() == prompt_tokens(run.tokenizer, PROMPT, rendering=Rendering(setting))
        assert run.inputs.prompt_rendering == Rendering(setting)
