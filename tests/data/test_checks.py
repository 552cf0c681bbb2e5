"""The data check: each finding on rows made for it, duplicates as a law, and the command that prints it."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_nb.cli import main
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.check.check import check_data, row_record, stops_a_run
from mlx_nb.data.check.duplicates import NEAR, NearIndex, common_sequences, jaccard, word_sequences
from mlx_nb.data.check.findings import KINDS, SEVERITIES
from mlx_nb.data.check.read_pass import read_splits
from mlx_nb.data.check.template_report import probe_template
from mlx_nb.data.check.token_pass import kind_of, length_summary, sampled_rows
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import CommandError
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.run.run import Run
from mlx_nb.view.reports.check import CheckDisplay, render_html, render_text
from mlx_nb.view.rows.display import ShownRow
from tiny import CHAT_TEMPLATE, tiny_rows


@pytest.fixture
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


def chat(*turns):
    """`chat("hi", "hello")` is a user and an assistant turn; a pair names its role."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": turn[0], "content": turn[1]}
            if isinstance(turn, tuple)
            else {"role": roles[i % 2], "content": turn}
            for i, turn in enumerate(turns)
        ]
    }


def check(tokenizer, train, *, valid=None, rows=5000, kind="tokens", **settings):
    splits = open_splits({"train": train, **({"valid": valid} if valid else {})}, val_set_size=0)
    return check_data(splits, tokenizer, RunConfig(**settings), rows=rows, kind=kind)


def found(result, kind, split="train"):
    return next(item for item in result.findings if item.kind == kind and item.split == split)


def kinds(result):
    return {item.kind for item in result.findings}


# --- findings -------------------------------------------------------------------------------------------------------


def test_good_rows_have_no_findings(tokenizer):
    result = check(tokenizer, tiny_rows())
    assert result.findings == ()
    assert result.ok
    assert result.splits[0].shapes == {"chat": 24}
    assert result.splits[0].trainable == 24


FINDINGS = {
    "unreadable": ({"nothing": 1}, {}, "error"),
    "assistant_first": (chat(("assistant", "hello"), ("user", "hi"), ("assistant", "yes")), {}, "warning"),
    "same_role_twice": (chat(("user", "one"), ("user", "two"), ("assistant", "yes")), {}, "warning"),
    "late_system": (chat(("user", "one"), ("system", "late"), ("assistant", "yes")), {}, "warning"),
    "last_not_assistant": (chat("one", "yes", "two"), {}, "warning"),
    "empty_turns": (chat(" \n", "yes"), {}, "warning"),
    "long_turns": (chat("long", "word " * 2000), {"max_seq_length": 1500}, "note"),
    "truncated": (chat("long", "word " * 200), {"max_seq_length": 100}, "warning"),
    "dropped": (chat("long", "word " * 200), {"max_seq_length": 100, "truncate": "drop"}, "note"),
    "too_long": (chat("long", "word " * 200), {"max_seq_length": 100, "truncate": "error"}, "error"),
    "reply_cut_away": (chat("word " * 200, "yes"), {"max_seq_length": 100}, "warning"),
    "refused": (chat("only a question"), {}, "warning"),
    "mixed_shapes": ({"text": "plain"}, {}, "note"),
    "mask_problem": (chat("a blank one", " "), {}, "warning"),
    "two_systems": ({"system": "Be brief.", **chat(("system", "Be kind."), ("user", "hi"), "yes")}, {}, "warning"),
    "labeled_bad": ({"label": False, **chat("is this good", "no")}, {}, "warning"),
    "exact_duplicates": (tiny_rows()[2], {}, "warning"),
}


@pytest.mark.parametrize("kind", FINDINGS)
def test_each_finding_names_its_row_its_severity_and_what_next(kind, tokenizer):
    bad, config, severity = FINDINGS[kind]
    rows = tiny_rows()
    result = check(tokenizer, [*rows[:10], bad, *rows[10:]] if kind != "exact_duplicates" else [*rows, bad], **config)
    item = found(result, kind)
    assert (item.severity, item.rows, item.count) == (severity, (24,) if kind == "exact_duplicates" else (10,), 1)
    assert item.looked_at == 25
    assert item.what
    assert item.next.endswith(".")
    assert result.ok == (severity != "error")


def test_a_row_without_findings_is_never_named(tokenizer):
    rows = tiny_rows()
    result = check(tokenizer, [*rows[:10], *(bad for bad, _, _ in FINDINGS.values()), *rows[10:]], max_seq_length=1500)
    good = {*range(10), *range(10 + len(FINDINGS), 24 + len(FINDINGS))}
    assert not good & {row for item in result.findings for row in item.rows}


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be kind.", **chat(("system", "Be kind."), ("user", "hi"), "yes")},
        {"system": " ", **chat(("system", "Be kind."), ("user", "hi"), "yes")},
        {"system": "Be brief.", **chat("hi", "yes")},
        {"label": 0, **chat("which class", "the first")},
        {"label": "true", **chat("is this good", "yes")},
    ],
)
def test_columns_that_say_nothing_else_are_no_finding(row, tokenizer):
    assert not {"two_systems", "labeled_bad"} & kinds(check(tokenizer, [*tiny_rows(), row]))


def test_reasons_are_listed_by_number_and_counted_beyond_the_list(tokenizer):
    result = check(tokenizer, [*tiny_rows(2), *(chat(f"question {i}") for i in range(60))])
    refused = result.splits[0].refused
    assert refused.count == 60
    assert [row for row, _ in refused.rows] == list(range(2, 52))
    assert refused.rows[0][1].startswith("no token is trained")


def test_problems_of_one_kind_are_one_finding(tokenizer):
    rows = [chat("a", "b", "c", " "), chat("a", " "), chat("d", "e", "f", "g", "h", " ")]
    items = [item for item in check(tokenizer, rows).findings if item.kind == "mask_problem"]
    assert [(item.count, item.rows) for item in items] == [(3, (0, 1, 2))]
    assert items[0].what == "loss mask: message N (assistant) is blank: only its end is trained"
    assert "%finetune row 0" in items[0].next


def test_a_kind_forgets_quoted_texts_and_numbers():
    said = "one token, 'it\\'s 3', reaches across the edge of message 12 (user): it is trained."
    assert kind_of(said) == "one token, …, reaches across the edge of message N (user): it is trained"


def test_nothing_to_train_is_an_error(tokenizer):
    result = check(tokenizer, [chat("a question"), chat("another")])
    assert found(result, "nothing_to_train").severity == "error"
    assert result.epoch is None


def test_findings_come_errors_first_and_every_kind_is_declared(tokenizer):
    result = check(tokenizer, [*tiny_rows(), *(bad for bad, _, _ in FINDINGS.values())])
    order = [SEVERITIES.index(item.severity) for item in result.findings]
    assert order == sorted(order)
    assert kinds(result) <= set(KINDS)


# --- pairs, labels and prompts --------------------------------------------------------------------------------------


def pair(k, chosen="yes it is so", rejected="no it is not"):
    """Pairs whose answers differ in length now one way, now the other."""
    return {"prompt": f"question {k} of {k * k}", "chosen": chosen + " !" * (k % 2 * 9), "rejected": rejected}


def labeled(k, label=None):
    return {"prompt": f"question {k} of {k * k}", "completion": "yes", "label": k % 2 if label is None else label}


def prompt(k):
    return {"prompt": f"question {k} of {k * k}", "answer": k}


MADE = {"pairs": pair, "labels": labeled, "prompts": prompt}


@pytest.mark.parametrize("kind", MADE)
def test_good_rows_of_every_kind_have_no_findings(kind, tokenizer):
    result = check(tokenizer, [MADE[kind](k) for k in range(30)], valid=[MADE[kind](40)], kind=kind)
    assert result.findings == ()
    assert (result.kind, result.splits[0].trainable) == (kind, 30)


def test_lengths_and_tokens_of_a_pair_are_those_of_both_answers(tokenizer):
    rows = [pair(k) for k in range(30)]
    split = check(tokenizer, rows, kind="pairs").splits[0]
    sizes = [
        len(tokenizer(f"<|user|>{row['prompt']}<|end|>\n<|assistant|>{row[answer]}<|end|>\n")["input_ids"])
        for row in rows
        for answer in ("chosen", "rejected")
    ]
    assert (split.tokens, split.lengths.longest) == (sum(sizes), max(sizes))
    assert sum(split.lengths.histogram_counts) == 60
    assert split.shapes == {"pair of texts": 30}
    assert split.longer_chosen == 0.5


JUDGED = {
    "identical_answers": ("pairs", pair(0, "same", "same"), {}, "warning"),
    "unreadable": ("pairs", {"prompt": "a", "chosen": "b"}, {}, "error"),
    "repeated_prompts": ("pairs", pair(29, "another answer"), {}, "note"),
    "exact_duplicates": ("pairs", pair(29), {}, "warning"),
    "empty_turns": ("pairs", pair(50, rejected=" "), {}, "warning"),
    "truncated": ("pairs", pair(50, rejected="no " * 200), {"max_seq_length": 200}, "warning"),
    "reply_cut_away": ("labels", {**labeled(50), "prompt": "why " * 300}, {"max_seq_length": 200}, "warning"),
    "last_not_assistant": (
        "labels",
        {
            "prompt": "a",
            "completion": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "label": 1,
        },
        {},
        "warning",
    ),
    "missing_answers": ("prompts", {"prompt": "a new one"}, {}, "warning"),
    "long_left_out": ("prompts", {"prompt": "why " * 300, "answer": 1}, {"max_seq_length": 200}, "warning"),
}


@pytest.mark.parametrize("kind", JUDGED)
def test_each_finding_about_judged_rows_names_its_row(kind, tokenizer):
    rows, bad, config, severity = JUDGED[kind]
    result = check(tokenizer, [*(MADE[rows](k) for k in range(30)), bad], kind=rows, **config)
    item = found(result, kind)
    assert (item.severity, item.rows, item.count, item.looked_at) == (severity, (30,), 1, 31)
    assert {row for other in result.findings for row in other.rows} <= {30}


def test_a_pair_that_the_cut_makes_the_same_is_a_pair_of_identical_answers(tokenizer):
    same = pair(50, "no " * 200 + "yes", "no " * 201)
    result = check(tokenizer, [*(pair(k) for k in range(30)), same], kind="pairs", max_seq_length=200)
    item = found(result, "identical_answers")
    assert (item.rows, item.count) == ((30,), 1)
    assert "raise max_seq_length" in item.next
    assert "chosen and rejected are the same within max_seq_length=200" in str(result.splits[0].left_out)
    assert "reply_cut_away" not in kinds(result)


def test_pairs_that_teach_length_are_pointed_out_with_their_share(tokenizer):
    longer = [pair(2 * k, chosen="a much longer answer than the other one") for k in range(27)]
    result = check(tokenizer, [*longer, *(pair(k, "no") for k in (100, 102, 104))], kind="pairs")
    item = found(result, "answer_length")
    assert item.what.endswith("chosen is longer in 90% of the pairs that differ")
    assert result.splits[0].longer_chosen == 0.9
    assert "answer_length" not in kinds(check(tokenizer, longer[:19], kind="pairs"))


def test_labels_are_counted_and_lopsided_ones_pointed_out(tokenizer):
    result = check(tokenizer, [labeled(k, k < 2) for k in range(30)], kind="labels")
    assert result.splits[0].labels == {"true": 2, "false": 28}
    assert found(result, "lopsided_labels").what.endswith("7% are true")


def test_rows_that_ask_what_a_training_row_asks_are_shared_with_it(tokenizer):
    valid = [pair(3, "some other answer"), {**pair(60), "prompt": f"{LONG} again"}, pair(70)]
    result = check(tokenizer, [*(pair(k) for k in range(30)), {**pair(80), "prompt": LONG}], valid=valid, kind="pairs")
    assert (result.overlaps[0].exact, result.overlaps[0].near) == (1, 1)
    assert found(result, "shared_with_train", "valid").rows == (0,)
    assert found(result, "shared_with_train", "valid").what.endswith("by their prompts")
    assert found(result, "nearly_shared_with_train", "valid").rows == (1,)


@pytest.mark.parametrize("kind", MADE)
def test_a_check_of_any_kind_is_shown_and_is_json(kind, tokenizer):
    result = check(tokenizer, [MADE[kind](k) for k in range(30)], kind=kind)
    json.dumps(result.to_dict(), allow_nan=False)
    text, shown = render_text(result), render_html(result)
    for words in {"pairs": ["tokens per answer"], "labels": ["15 true, 15 false"], "prompts": ["of prompts"]}[kind]:
        assert words in text
        assert words in shown


def test_the_record_of_a_pair_has_both_answers(tokenizer):
    config = RunConfig(max_seq_length=60)
    source = open_splits([pair(1), pair(2, rejected="no " * 60)], val_set_size=0).train
    rows = Examples(source, tokenizer, ExampleSettings.of(config), "pairs")
    record = row_record(rows.view(0), rows.settings)
    assert set(record) == {"row", "tokens", "loss_mask", "spans", "problems", "rejected"}
    assert tokenizer.decode(record["tokens"]).endswith("! !<|end|>\n")
    assert tokenizer.decode(record["rejected"]["tokens"]).endswith("no it is not<|end|>\n")
    assert len(record["rejected"]["loss_mask"]) == len(record["rejected"]["tokens"])
    cut = rows.view(1)
    assert len(row_record(cut, rows.settings)["rejected"]["tokens"]) == 60
    assert "tokens were cut at max_seq_length=60." in row_record(cut, rows.settings)["problems"][-1]
    assert not stops_a_run(cut, rows.settings)
    strict = Examples(source, tokenizer, ExampleSettings.of(RunConfig(max_seq_length=60, truncate="error")), "pairs")
    assert [stops_a_run(strict.view(row), strict.settings) for row in (0, 1)] == [False, True]


# --- duplicates -----------------------------------------------------------------------------------------------------

LONG = "the old captain told every sailor on deck that gold lay under the third palm of the far island"


def test_rows_shared_with_train_are_found_exactly_and_nearly(tokenizer):
    train = [*tiny_rows(), chat("tell me", LONG)]
    valid = [tiny_rows()[5], chat("tell me!", LONG.upper() + " today"), chat("something else", "entirely")]
    result = check(tokenizer, train, valid=valid)
    overlap = result.overlaps[0]
    assert (overlap.split, overlap.exact, overlap.near) == ("valid", 1, 1)
    assert overlap.pairs[0] == (0, 5, 1.0)
    assert overlap.pairs[1][:2] == (1, 24)
    assert NEAR <= overlap.pairs[1][2] < 1
    assert found(result, "shared_with_train", "valid").rows == (0,)
    assert found(result, "nearly_shared_with_train", "valid").rows == (1,)


def test_rows_that_share_only_a_system_prompt_are_not_alike(tokenizer):
    rows = [chat(("system", LONG * 3), ("user", f"question {i} of {i * i}"), ("assistant", f"{i}")) for i in range(30)]
    assert "near_duplicates" not in kinds(check(tokenizer, rows))


def test_rows_that_share_only_a_long_instruction_are_not_alike(tokenizer):
    words = np.random.default_rng(0).integers(0, 10**6, (40, 12)).astype(str)
    rows = [chat(f"{LONG}. {' '.join(own)}", "yes") for own in words]
    assert "near_duplicates" not in kinds(check(tokenizer, rows))
    assert len(common_sequences(row["messages"][0]["content"] for row in rows)) > 0


def test_many_similar_rows_are_one_group(tokenizer):
    words = [f"w{i}" for i in range(60)]
    rows = [chat("tell", " ".join([*words[:k], "x", *words[k:]])) for k in range(1, 60, 3)]
    result = check(tokenizer, [*tiny_rows(60), *rows])
    assert result.splits[0].near_groups == (tuple(range(60, 80)),)
    assert result.splits[0].near_duplicates == 19


words = st.lists(
    st.sampled_from(["ahoy", "captain", "gold", "海", "storm", "7", "rum", "the", "of", "Été"]), min_size=0, max_size=12
)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=30))
def test_duplicates_are_what_comparing_all_pairs_says(texts):
    """Exact: the rows equal to an earlier one. Near: no pair below the threshold; the same wording is always found."""
    rows = [chat(" ".join(asked), " ".join(answered)) for asked, answered in texts]
    splits = open_splits(rows, val_set_size=0)
    reading = read_splits({"train": splits.train}, ExampleSettings.of(RunConfig()))[0]["train"]
    assert reading.exact_duplicates == len(rows) - len({json.dumps(row) for row in rows})
    spoken = ["\n".join(message["content"] for message in row["messages"]) for row in rows]
    common = common_sequences(spoken)
    index = NearIndex(1, common, spoken.__getitem__)
    sets = [index.sequences(text) for text in spoken]
    for group in reading.near.all():
        for row in group:
            assert max(jaccard(sets[row], sets[other]) for other in group if other != row) >= NEAR
    first: dict[tuple, int] = {}
    for row, sequences in enumerate(sets):
        if len(sequences):
            earlier = first.setdefault(tuple(sequences.tolist()), row)
            same = rows[earlier] == rows[row]
            copies = any(rows[row] == rows[k] for k in range(row))
            assert same or copies or reading.near.leader(earlier) == reading.near.leader(row)


def test_most_pairs_at_the_threshold_are_found_among_strangers():
    random = np.random.default_rng(1)
    texts = [" ".join(random.integers(0, 5000, 80).astype(str)) for _ in range(400)]
    for k in range(200):
        own = texts[k].split()
        texts[200 + k] = " ".join([*own[: 80 - 11], *random.integers(5000, 9000, 11).astype(str)])
    index = NearIndex(400, np.zeros(0, np.uint64), texts.__getitem__)
    for number, text in enumerate(texts):
        index.add(number, text)
    candidates = set(index.candidates())
    near = [(k, 200 + k) for k in range(200) if index.similarity(k, 200 + k) >= NEAR]
    assert len(near) == 200
    assert sum(pair in candidates for pair in near) >= 195
    assert len(candidates) < 260


def test_case_punctuation_and_width_do_not_make_a_row_new():
    assert jaccard(word_sequences("Hello, World — again!"), word_sequences("hello world ａgain")) == 1
    assert jaccard(word_sequences("大海航行靠舵手"), word_sequences("大海航行靠水手")) < 1
    assert len(word_sequences("?!")) == 0


# --- lengths, samples, epochs ---------------------------------------------------------------------------------------


def test_length_summary_counts_every_row_once():
    lengths = [*range(1, 100), 5000]
    summary = length_summary(lengths, 64)
    assert (summary.shortest, summary.median, summary.longest) == (1, 50.5, 5000)
    assert (summary.over_max_seq_length, summary.keeps_99) == (36, 99)
    assert sum(length <= summary.keeps_99 for length in lengths) == 99
    assert sum(summary.histogram_counts) == 100
    assert summary.last_bar_is_wider
    assert summary.histogram_counts[-1] == 1


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(2, 10**6))
def test_keeps_99_is_the_smallest_that_does(lengths, limit):
    summary = length_summary(lengths, limit)
    whole = [
        sum(length <= cut for length in lengths) / len(lengths) for cut in (summary.keeps_99, summary.keeps_99 - 1)
    ]
    assert whole[0] >= 0.99 > whole[1]
    assert sum(summary.histogram_counts) == len(lengths)


def test_a_sample_depends_on_the_number_of_rows_alone():
    assert sampled_rows(100, None).tolist() == sampled_rows(100, 100).tolist() == list(range(100))
    first = sampled_rows(10**6, 50)
    assert first.tolist() == sampled_rows(10**6, 50).tolist() == sorted(set(first.tolist()))
    assert len(first) == 50


def test_a_sample_reads_all_rows_tokenizes_some_and_says_so(tokenizer):
    rows = [chat(f"say {i}", f"{i}") for i in range(200)]
    rows[199] = {"nothing": 1}
    result = check(tokenizer, rows, rows=20)
    assert found(result, "unreadable").rows == (199,)
    assert (result.splits[0].checked, result.splits[0].rows) == (20, 200)
    assert result.epoch.estimated
    assert "checked 20 of 200 rows" in render_text(result)
    assert "checked 20 of 200 rows" in render_html(result)


def test_the_epoch_is_what_the_trainer_would_do(tiny_folder):
    settings = {"batch_size": 5, "grad_accumulation_steps": 2, "epochs": 2.0, "val_set_size": 0}
    run = Run(RunConfig(model=str(tiny_folder), data="rows", **settings), namespace={"rows": tiny_rows(23)})
    epoch = run.check().epoch
    examples = [run.rows()[row].example for row in range(23)]
    assert (epoch.updates, epoch.rows, epoch.estimated) == (3, 23, False)
    assert epoch.run_updates == run.trainer.iters == 6
    assert epoch.run_epochs == 2.0
    assert epoch.tokens == sum(len(example.tokens) for example in examples)
    assert epoch.trained_tokens == sum(int((example.loss_mask > 0).sum()) for example in examples)


def test_the_epoch_counts_the_pieces_of_split_texts(tiny_folder):
    rows = [{"text": "red green blue " * (3 + 4 * number)} for number in range(9)]
    settings = {"truncate": "split", "max_seq_length": 16, "batch_size": 2, "val_set_size": 0}
    run = Run(RunConfig(model=str(tiny_folder), data="rows", **settings), namespace={"rows": rows})
    result = run.check()
    pieces = result.epoch.examples
    assert result.epoch.rows == 9
    assert pieces == len(run.trainer.examples.train)
    assert result.epoch.updates == result.epoch.run_updates == run.trainer.iters > 9
    assert f"{result.epoch.updates} updates of 2 pieces ({pieces} pieces of 9 rows)" in render_text(result)


def test_the_check_loads_no_weights(tiny_folder):
    run = Run(RunConfig(model=str(tiny_folder), data="rows"), namespace={"rows": tiny_rows()})
    run.check()
    assert "loaded" not in run.inputs.__dict__


# --- template -------------------------------------------------------------------------------------------------------


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def test_template_facts_come_from_renders(tokenizer):
    facts = probe_template(tokenizer)
    assert (facts.end_of_turn, facts.ends_generation) == (("<|end|>",), True)
    assert (facts.system, facts.tools, facts.tool_results) == ("written", "left out", "written")
    assert (facts.reasoning, facts.thinking_switch, facts.writes_bos) == (None, None, False)


def test_a_template_that_refuses_or_forgets_the_system_is_told_apart(tokenizer):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    forgets = CHAT_TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    assert probe_template(with_template(tokenizer, refuses)).system == "refused"
    assert probe_template(with_template(tokenizer, forgets)).system == "left out"


def test_thinking_tools_and_their_switch_are_found(tokenizer):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.reasoning_content is defined and loop.last %}({{ m.reasoning_content }}){% endif %}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{{ m.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}()"
        "{% endif %}{% endif %}"
    )
    facts = probe_template(with_template(tokenizer, template))
    assert (facts.tools, facts.tool_calls) == ("written", "written")
    assert (facts.reasoning, facts.reasoning_kept, facts.thinking_switch) == (
        "reasoning_content",
        False,
        "enable_thinking",
    )


def test_a_template_without_end_of_turn_is_a_warning(tokenizer):
    result = check(with_template(tokenizer, CHAT_TEMPLATE.replace("<|end|>\n", "")), tiny_rows())
    assert found(result, "no_end_of_turn", None).severity == "warning"


def test_an_end_of_turn_at_which_generation_continues_is_a_warning(tokenizer):
    result = check(with_template(tokenizer, CHAT_TEMPLATE.replace("<|end|>", "<|system|>")), tiny_rows())
    assert "<|system|>" in found(result, "end_does_not_stop", None).what


def test_a_doubled_bos_is_a_note_and_a_missing_template_an_error(tokenizer):
    from tokenizers import processors

    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))]
    )
    result = check(with_template(tokenizer, "<|system|>" + CHAT_TEMPLATE), tiny_rows())
    assert found(result, "double_bos", None).severity == "note"
    bare = check(with_template(tokenizer, None), tiny_rows())
    assert found(bare, "no_chat_template", None).severity == "error"
    assert bare.template is None
    assert "no_chat_template" not in kinds(check(tokenizer, [{"text": "plain"}]))


# --- on screen ------------------------------------------------------------------------------------------------------

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'\u202e"


def test_whatever_a_row_says_is_escaped(tokenizer):
    result = check(tokenizer, [*tiny_rows(), {"messages": [{"role": NASTY, "content": "x"}]}, {NASTY: NASTY}])
    shown = render_html(result)
    assert "<script" not in shown
    assert "<img" not in shown
    assert "\u202e" not in shown + render_text(result)
    assert "&lt;script&gt;alert(1)" in shown
    assert set(re.findall(r"<(\w+)", shown)) <= {"div", "span", "details", "summary"}


def test_html_and_text_say_the_same(tokenizer):
    rows = [*tiny_rows(), *(bad for bad, _, _ in FINDINGS.values())]
    display = CheckDisplay(check(tokenizer, rows, max_seq_length=1500))
    text, shown = " ".join(repr(display).split()), html.unescape(display._repr_html_())
    assert "1 error" in text
    assert "1 error" in shown
    for item in display.check.findings:
        assert " ".join(item.what.split()) in text
        assert item.what[1:] in shown
    assert "<|end|> is trained; generation stops there" in text


def test_a_check_is_json_with_the_same_shape_whatever_was_found(tokenizer):
    good, bad = check(tokenizer, tiny_rows()), check(tokenizer, [chat("a question")], valid=tiny_rows(3))
    for result in (good, bad):
        document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert set(document) == {
            *("counts", "model", "data", "kind", "loss_on", "max_seq_length", "truncate", "findings"),
            *("splits", "overlaps", "epoch", "template", "notes"),
        }
        assert set(document["counts"]) == set(SEVERITIES)
        for item in document["findings"]:
            assert set(item) == {
                *("kind", "severity", "split", "what", "next", "count", "looked_at", "rows", "examples")
            }


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    def write(rows, name="train.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path)

    return write


def test_the_command_prints_a_report_and_fails_on_errors_only(folder, tiny_folder, capsys):
    warned = folder([*tiny_rows(), chat("one", "", "two")])
    assert main(["check", warned, "--model", str(tiny_folder), "val_set_size=0"]) == 0
    assert "Data check: " in capsys.readouterr().out
    assert main(["check", folder([*tiny_rows(), {"foo": 1}]), "--model", str(tiny_folder), "val_set_size=0"]) == 1
    assert "train.jsonl line 25" in capsys.readouterr().out


def test_settings_after_options_are_read_and_json_is_one_document(folder, tiny_folder, capsys):
    data = folder(tiny_rows(40))
    assert (
        main(["check", data, "--model", str(tiny_folder), "--json", "val_set_size=0", "rows=10", "max_seq_length=99"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert (document["max_seq_length"], document["splits"][0]["checked"], document["splits"][0]["rows"]) == (99, 10, 40)


def test_rows_are_printed_as_training_sees_them(folder, tiny_folder, capsys, tokenizer):
    data = folder([chat("say red", "redred"), chat("a question"), chat("say", "word " * 60)])
    assert (
        main(["check", data, "--model", str(tiny_folder), "--rows", "--json", "val_set_size=0", "max_seq_length=60"])
        == 0
    )
    first, refused, cut = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(first) == set(refused) == {"row", "tokens", "loss_mask", "spans", "problems"}
    trained = [token for token, weight in zip(first["tokens"], first["loss_mask"]) if weight]
    assert tokenizer.decode(trained) == "redred<|end|>"
    text = tokenizer.decode(first["tokens"])
    start, end, role, message, weight = first["spans"][1]
    assert (text[start:end], role, message, weight) == ("redred<|end|>", "assistant", 1, 1)
    assert (refused["row"], refused["tokens"], refused["loss_mask"]) == (1, None, None)
    assert any("no token is trained" in problem for problem in refused["problems"])
    assert len(cut["tokens"]) == len(cut["loss_mask"]) == 60
    assert cut["problems"][-1].endswith("tokens were cut at max_seq_length=60.")


def test_prompts_are_checked_without_rewards(folder, tiny_folder, capsys):
    data = folder([{"prompt": f"add 1 to {number}", "answer": str(number + 1)} for number in range(6)])
    assert main(["check", data, "--model", str(tiny_folder), "val_set_size=0", "method=grpo"]) == 0
    assert "6 rows" in capsys.readouterr().out


def test_rows_that_would_stop_a_run_fail_the_command(folder, tiny_folder, capsys):
    base = ["--model", str(tiny_folder), "--rows", "val_set_size=0"]
    assert main(["check", folder([*tiny_rows(3), {"foo": 1}]), *base]) == 1
    long = folder([*tiny_rows(3), chat("say", "word " * 60)])
    assert main(["check", long, *base, "max_seq_length=60", "truncate=error"]) == 1
    assert main(["check", long, *base, "max_seq_length=60"]) == 0
    assert main(["check", folder([chat("a question")]), *base]) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rows=no"], "whole number"),
        (["rows=0"], "whole number"),
        (["max_seq_lenght=3"], "max_seq_length"),
        (["max_seq_length"], "not key=value"),
        (["--rows", "--split", "test"], "no test split"),
    ],
)
def test_a_wrong_word_is_one_line_that_says_what_next(words, said, folder, tiny_folder, capsys):
    assert main(["check", folder(tiny_rows()), "--model", str(tiny_folder), *words]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_other_commands_still_refuse_unknown_words(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "nonsense=1"])
    with pytest.raises(SystemExit):
        main(["check", "data", "--nonsense"])
    capsys.readouterr()


def test_the_magic_shows_the_check_of_the_current_run(tiny_folder):
    session = Session()
    run = Run(RunConfig(model=str(tiny_folder), data="rows"), namespace={"rows": tiny_rows()})
    session.add(run)
    shown = run_line(session, "check")
    assert isinstance(shown, CheckDisplay)
    assert json.loads(run_line(session, "check --json rows=4"))["splits"][0]["checked"] == 4
    with pytest.raises(CommandError, match="rows="):
        run_line(session, "check 4")


# The same remarks in the check and in the row view

SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ODD = {
    "sft": [
        {"prompt": "Name: ", "completion": "Bob"},
        {"prompt": " ", "completion": "Bob"},
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a " * 600}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "system", "content": "x"}, *SAID], "system": "y"},
        {"messages": SAID, "label": "False"},
        {"text": "Say <|im_end|> now"},
    ],
    "dpo": [
        {"prompt": "Name: ", "chosen": "Bob", "rejected": "Al"},
        {"prompt": "a", "chosen": " ", "rejected": "b"},
        {
            "prompt": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
            "chosen": "c",
            "rejected": "d",
        },
    ],
    "kto": [
        {"prompt": "Name: ", "completion": "Bob", "label": True},
        {"prompt": "a", "completion": "", "label": False},
    ],
    "grpo": [{"prompt": "Name: "}, {"prompt": [{"role": "user", "content": ""}], "answer": "b"}],
}
OF_SEVERAL_ROWS = (
    "mixed_shapes",
    "mixed_formats",
    "exact_duplicates",
    "near_duplicates",
    "repeated_prompts",
    "lopsided_labels",
    "answer_length",
    "truncated",
)


@pytest.mark.parametrize("method", ODD)
@pytest.mark.parametrize("prompt_format", ["raw", "chat"])
def test_what_the_check_says_about_a_row_is_reported_where_the_row_is_shown(method, prompt_format, tiny_folder):
    settings = {"rewards": ["number_match"]} if method == "grpo" else {}
    config = RunConfig(
        method=method,
        model=str(tiny_folder),
        data=ODD[method],
        val_set_size=0,
        max_seq_length=64,
        prompt_format=prompt_format,
        **settings,
    )
    run = Run(config)
    rows, shown = run.rows("train"), []
    for finding in run.check(rows=None).findings:
        if finding.split is None or finding.kind in OF_SEVERAL_ROWS:
            continue
        assert finding.examples, finding.kind
        for row, words in finding.examples:
            assert words.removesuffix(".") in " ".join(rows[row].problems), (finding.kind, row)
            assert any(part in repr(rows[row]) for part in (words, words[:40])), (finding.kind, row)
            shown.append(finding.kind)
    assert len(shown) >= 2


def tokenizer_of_words():
    """One that has ` Bob`, with its space, as a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, vocab_size=280)
    made.train_from_iterator(["Name: Bob"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def test_a_raw_prompt_that_ends_in_a_space_is_named_where_the_row_is_shown():
    words, rows = tokenizer_of_words(), [{"prompt": "Name: ", "completion": "Bob"}]
    said = "one token, ' Bob', reaches across the edge of message 1 (completion): it is trained."
    (example,) = found(check(words, rows, prompt_format="raw"), "mask_problem").examples
    assert example == (0, said)
    settings = ExampleSettings.of(RunConfig(prompt_format="raw"))
    view = Examples(open_splits(rows, val_set_size=0).train, words, settings).view(0)
    assert view.problems == [said]
    assert said in repr(ShownRow.of(view, words, "train"))
