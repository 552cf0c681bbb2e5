"""The form of a new run: the cell that it stands for, what it shows of the rows, and where the cell is written."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

import mlx_nb
from mlx_nb import RunConfig
from mlx_nb.errors import CommandError, ConfigError, MlxNbError
from mlx_nb.notebook import new_run, new_run_plan
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.help_text import TEN
from mlx_nb.notebook.new_run import NewRun
from mlx_nb.notebook.new_run_cell import cell_text, fields_of
from panel_pages import open_widget
from tiny import tiny_pairs, tiny_rows

TYPED = {
    "lora_parameters.rank": "16",
    "learning_rate": "1e-4",
    "name": "bees",
    "data": "my rows: new #1.jsonl",
    "iters": "60",
    "sample_prompts": "Who are you?\nSay {hello}",
    "model": "smollm2-135m",
}


def test_the_cell_is_what_one_would_have_typed():
    assert cell_text(TYPED).splitlines() == [
        "%%finetune --name bees",
        "model: smollm2-135m",
        'data: "my rows: new #1.jsonl"',
        "iters: 60",
        "learning_rate: 1e-4",
        "lora_parameters: {rank: 16}",
        'sample_prompts: ["Who are you?", "Say {{hello}}"]',
    ]
    assert cell_text({"iters": " ", "data": "bees"}) == "%%finetune\ndata: bees"


def test_the_run_of_the_cell_has_the_settings_that_were_typed(shell):
    run = mlx_nb.notebook.new_run.checked_run({**TYPED, "data": "bees"}, {"bees": tiny_rows()})
    assert run.name == "bees"
    assert run.config.lora_parameters.rank == 16
    assert run.config.learning_rate == 1e-4
    assert run.config.sample_prompts == ("Who are you?", "Say {hello}")


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_the_form_has_the_settings_that_people_change_and_the_method_needs(method):
    fields = {field.name: field for field in fields_of({"method": method}, {"bees": tiny_rows()})}
    assert set(TEN) <= set(fields)
    assert ("beta" in fields) == (method != "sft")
    assert ("rewards" in fields) == (method == "grpo")
    assert ["bees", "24 rows"] in fields["data"].choices
    assert fields["method"].only_these
    assert not fields["data"].only_these


def test_a_form_says_what_the_cell_would_say_and_shows_the_rows(tiny_folder):
    namespace = {"bees": tiny_rows(), "pairs": tiny_pairs()}
    form = NewRun({"data": "bees", "model": str(tiny_folder)}, namespace)
    sent = []
    form.send = lambda message, buffers=None: sent.append(message)
    assert form.problems == []
    form.answer({"show": "row", "row": 3, "id": 1})
    form.answer({"show": "check", "id": 2})
    assert (sent[0]["row"], sent[0]["rows"]) == (3, 22)  # a tenth is held out
    assert "assistant" in sent[0]["html"]
    assert "Data check" in sent[1]["html"]
    form.values = {"data": "bess", "iters": "many", "model": str(tiny_folder)}
    assert any("`iters`" in line for line in form.problems)
    form.values = {"data": "bess", "model": str(tiny_folder)}
    assert "Did you mean 'bees'?" in form.problems[0]
    form.answer({"show": "row", "row": 0, "id": 3})
    assert "Did you mean 'bees'?" in sent[2]["error"]
    form.values = {"data": "pairs", "method": "dpo", "model": str(tiny_folder)}
    assert "method: dpo" in form.cell
    assert form.problems == []
    form.close()


def planned(form):
    """The last plan of a form in a process without an event loop."""
    *_, last = form.plans()
    return last


def test_a_form_shows_the_plan_that_the_run_would_be_judged_by(tiny_folder):
    form = NewRun({"data": "bees", "model": str(tiny_folder)}, {"bees": tiny_rows()})
    run = form._preview()
    shown = planned(form)
    plan = run.plan()  # of the rows, which are tokenized now
    assert shown["complete"]
    assert shown["sizes"] == [list(one) for one in plan.sizes]
    assert [change[0] for change in shown["changes"]] == [one.line for one in plan.suggestions]
    assert shown["limits"] == [list(one) for one in plan.limits]
    assert shown["state"] == "fits"
    assert f"{plan.shape.tokens} tokens" in shown["verdict"]
    assert plan.shape.tokens < 100  # not what max_seq_length allows
    form.values = {**form.values, "memory_limit": "1MB"}
    shown = planned(form)
    assert shown["state"] == "too large"
    assert "0.001 GB may be used (memory_limit)" in shown["verdict"]
    form.close()


def test_a_suggestion_fills_the_fields_which_the_form_then_shows(tiny_folder):
    given = {"batch_size": "16", "snapshot_memory": "0", "lora_parameters.rank": "16"}
    form = NewRun({"data": "bees", "model": str(tiny_folder), **given}, {"bees": tiny_rows()})
    changes = {line: typed for line, _, typed in planned(form)["changes"]}
    batches = "batch_size: 1, grad_accumulation_steps: 16"
    assert changes[batches] == {"batch_size": "1", "grad_accumulation_steps": "16"}
    assert new_run_plan._typed("lora_parameters: {rank: 8}") == {"lora_parameters.rank": "8"}
    form.values = {**form.values, **changes[batches]}
    assert {"grad_accumulation_steps", "snapshot_memory"} <= {field["name"] for field in form.fields}
    assert "grad_accumulation_steps: 16" in form.cell.splitlines()
    assert form.problems == []
    form.close()


def test_without_the_model_nothing_is_downloaded_for_the_plan(tiny_folder, tmp_path, monkeypatch):
    from mlx_nb.model import model_source

    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path))
    monkeypatch.setattr(model_source.subprocess, "run", None)
    form = NewRun({"data": "bees", "model": "smollm2-135m"}, {"bees": tiny_rows()})
    assert planned(form)["state"] == "unknown"
    assert "is downloaded by" in planned(form)["verdict"]
    form.close()


def test_model_code_that_fails_is_one_line_in_the_form(tiny_folder, monkeypatch):
    from mlx_nb.train import memory_plan

    form = NewRun({"data": "bees", "model": str(tiny_folder)}, {"bees": tiny_rows()})
    monkeypatch.setattr(memory_plan, "unloaded_model", None)
    assert planned(form)["verdict"].startswith("The memory could not be planned: 'NoneType'")
    form.close()


def test_a_plan_is_made_between_other_work_and_only_for_changes_that_it_depends_on(tiny_folder, monkeypatch):
    made = []
    monkeypatch.setattr(new_run_plan, "SECONDS_OF_REST", 0.05)
    monkeypatch.setattr(new_run, "shown_plans", lambda run: made.append(run) or new_run_plan.shown_plans(run))

    async def complete(form):
        turns, end = 0, time.monotonic() + 60
        while not form.plan.get("complete"):
            assert time.monotonic() < end
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    async def use():
        form = NewRun({"model": str(tiny_folder)}, {"bees": tiny_rows()})

        async def put(**typed):
            form.values = {**form.values, **typed}
            await asyncio.sleep(0.01)  # a change arrives in the next turn of the loop

        assert form.plan == {}  # there are no data yet
        await put(data="bees", batch_size="2")
        await put(batch_size="4")  # before the planning has begun
        assert form.plan["state"] == "planning"
        assert await complete(form) > 10
        assert len(made) == 1
        assert "4 sequences" in form.plan["verdict"]
        await put(learning_rate="1e-4", name="hive")
        assert form.plan["complete"]
        await put(batch_size="2")
        assert form.plan["state"] == "planning"
        await complete(form)
        assert "2 sequences" in form.plan["verdict"]
        assert len(made) == 2
        await put(iters="many")
        assert form.plan == {}
        form.close()
        form = NewRun({"model": str(tiny_folder), "data": "bees"}, {"bees": tiny_rows()})
        form.close()
        await asyncio.sleep(0.2)
        assert len(made) == 2

    asyncio.run(use())


def test_the_command_writes_the_cell_below_or_at_the_next_prompt(shell, tiny_folder):
    shell.user_ns["bees"] = tiny_rows()
    session = shell.magics_manager.registry["FinetuneMagics"].session
    written = []
    shell.set_next_input = lambda text, replace=False: written.append(text)
    shown = run_line(session, f"new data=bees model={tiny_folder} iters=40")
    session.form = mlx_nb.new(data="bees", model=str(tiny_folder), iters=50)
    run_line(session, "new --write")
    cells = [f"%%finetune\nmodel: {tiny_folder}\ndata: bees\niters: {iters}" for iters in (40, 50)]
    assert written == cells
    assert shown == cells[0]  # no widgets here
    assert RunConfig.from_yaml(written[0].partition("\n")[2]).iters == 40
    for line in ("new data=bess", "new data=bees itres=3", "new bees"):
        with pytest.raises(MlxNbError):
            run_line(session, line)
    with pytest.raises(CommandError, match="is not a text or a number"):
        mlx_nb.new(data=[{"text": "x"}])
    with pytest.raises(ConfigError, match="iters"):
        run_line(session, "new data=bees itres=3")
    assert written == cells
    session.form.close()


@pytest.mark.browser
@pytest.mark.parametrize(("theme", "width"), [("light", 700), ("dark", 1100), ("light", 1600)])
def test_the_page_gives_what_was_typed_and_shows_what_the_kernel_says(
    theme, width, browser, screenshot, tiny_folder, monkeypatch
):
    form = NewRun({"model": str(tiny_folder)}, {"bees": tiny_rows(), "pairs": tiny_pairs()})
    wrong = []
    page = open_widget(browser, form, theme, width, wrong=wrong)

    def answer():
        page.wait_for_timeout(30)
        for saved in page.evaluate("window.saved.splice(0)"):
            for name, value in saved.items():
                setattr(form, name, value)
        for message in page.requests:
            form.answer(message)
        page.requests.clear()
        reported = {name: getattr(form, name) for name in ("fields", "cell", "problems", "plan")}
        page.evaluate("told => { for (const [name, value] of Object.entries(told)) change(name, value); }", reported)

    page.get_by_label("data", exact=True).fill("bees")
    page.get_by_label("iters").fill("many")
    page.get_by_label("iters").blur()
    answer()
    assert "`iters`" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("button", name="Show the rows").is_disabled()
    page.get_by_label("iters").fill("60")
    page.get_by_label("learning_rate").fill("1e-4")
    page.get_by_label("learning_rate").blur()
    answer()
    assert not page.get_by_role("alert").is_visible()
    assert page.locator(".mlx-nb-cell").inner_text() == form.cell
    assert form.cell.splitlines()[2:] == ["data: bees", "iters: 60", "learning_rate: 1e-4"]
    assert page.get_by_role("region", name="plan of the memory").count() == 0
    form.show_plan({"state": "planning", "verdict": "planning the memory …"})
    answer()
    assert page.locator(".mlx-nb-verdict").inner_text() == "planning the memory …"
    form.values = {**form.values, "memory_limit": "5MB"}
    form.show_plan(planned(form))
    answer()
    plan = page.get_by_role("region", name="plan of the memory")
    assert plan.locator(".mlx-nb-verdict").inner_text().startswith("✗ It does not fit: it needs")
    assert re.search(r"^weights\t0\.\d+ GB$", plan.inner_text(), re.MULTILINE)
    assert "largest batch_size that fits" in plan.inner_text()
    screenshot(page, f"new_run_plan_{theme}_{width}")
    plan.get_by_role("button", name="use batch_size: 1, grad_accumulation_steps: 4").click()
    answer()
    assert {"batch_size: 1", "grad_accumulation_steps: 4"} <= set(form.cell.splitlines())
    assert page.get_by_label("grad_accumulation_steps", exact=True).input_value() == "4"
    page.get_by_label("grad_accumulation_steps", exact=True).fill("")
    page.get_by_label("grad_accumulation_steps", exact=True).blur()
    answer()
    assert "grad_accumulation_steps" not in form.cell
    page.get_by_role("button", name="Show the rows").click()
    answer()
    page.get_by_role("button", name="Next row").click()
    answer()
    page.get_by_role("button", name="Check the rows").click()
    answer()
    assert "row 1 (0 to 21)" in page.locator(".mlx-nb-new").inner_text()
    assert "Data check" in page.locator(".mlx-nb-new").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    screenshot(page, f"new_run_{theme}_{width}")
    page.get_by_label("method").select_option("dpo")
    answer()
    assert "method: dpo" in page.locator(".mlx-nb-cell").inner_text()
    assert page.get_by_label("beta").is_visible()
    page.get_by_role("button", name="Copy the cell").click()
    page.wait_for_selector("text=%finetune new --write")
    page.close()
    form.close()
    assert wrong == []


def test_a_cell_or_a_line_takes_the_settings_of_a_file_and_the_lines_of_the_cell_replace_them(
    shell, tmp_path, tiny_folder, capsys
):
    import json

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny_rows())))
    (tmp_path / "lora.yaml").write_text(f"model: {tiny_folder}\ntrain: true\ndata: rows.jsonl\niters: 3\n")
    session = shell.magics_manager.registry["FinetuneMagics"].session
    shell.run_cell_magic("finetune", "-c lora.yaml --paused", "batch_size: 2\nnum_layers: 1\n")
    config = session.get().config
    assert (config.iters, config.batch_size, config.num_layers, config.optimizer) == (3, 2, 1, "adam")
    assert "default              optimizer: adam. ours is adamw" in capsys.readouterr().out
    shell.run_line_magic("finetune", "-c lora.yaml --paused --name line")
    assert (session.get().name, session.get().config.num_layers) == ("line", 16)
    exported = str(run_line(session, "config --export mlx-lm ours.yaml"))
    assert exported.endswith("`mlx_lm.lora --config ours.yaml` trains with it.")
    assert (tmp_path / "ours.yaml").read_text().startswith(f"model: {tiny_folder}\ntrain: true\n")
