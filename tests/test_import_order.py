"""The house has one reading order: a module imports only from modules before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_nb

PACKAGE = Path(mlx_nb.__file__).parent
ORDER = [
    "errors",
    "own_code",
    "turns",
    "yaml_loader",
    "settings",
    "methods",
    "config_optimizers",
    "config_sources",
    "neighbor_words",
    "config_templates",
    "config_hints",
    "config_checks",
    "config_commands",
    "config",
    "config_help",
    "events",
    "pieces",
    "signal_watch",
    "exits",
    "data.plain_values",
    "data.row_source",
    "data.compression",
    "data.folders",
    "data.files",
    "data.tables",
    "data.mixtures",
    "data.sources",
    "data.message_lists",
    "data.row_roles",
    "data.row_values",
    "data.row_forms",
    "data.rows",
    "data.preference_rows",
    "data.prompt_rows",
    "data.row_kinds",
    "data.rendering",
    "data.row_turns",
    "data.template_facts",
    "data.tool_values",
    "data.template_windows",
    "data.template_tags",
    "data.template_spans",
    "data.template_location",
    "data.control_tokens",
    "data.template_render",
    "data.token_edges",
    "data.tool_messages",
    "data.chat_template",
    "data.limits",
    "data.token_examples",
    "data.prompt_examples",
    "data.preference_examples",
    "data.row_remarks",
    "data.examples",
    "data.effects",
    "data.tokenizing",
    "data.row_finder",
    "data.batches",
    "data.duplicates",
    "data.findings",
    "data.template_probes",
    "data.token_counts",
    "data.row_reading",
    "data.checks",
    "model.files",
    "history_file",
    "folder_lock",
    "written_files",
    "run_folder",
    "model.cache",
    "model.blas_symbols",
    "model.backend",
    "model.memory",
    "model.mlx_lm_import",
    "model.trees",
    "model.lanes",
    "model.randomness",
    "model.finite",
    "model.gguf_tokenizer",
    "model.gguf",
    "model.passes",
    "model.fingerprint",
    "model.loading",
    "model.limits",
    "model.adapter_files",
    "model.adapters",
    "model.trained",
    "model.sharing",
    "model.batch_memory",
    "model.logprobs",
    "model.reference",
    "rollouts.reward_functions",
    "rollouts.rewards",
    "rollouts.reward_calls",
    "rollouts.scoring",
    "rollouts.advantages",
    "rollouts.drawing",
    "rollouts.completion_rows",
    "rollouts.sampling",
    "rollouts.generation",
    "objectives.base",
    "objectives.sft",
    "objectives.preference",
    "objectives.dpo",
    "objectives.cpo",
    "objectives.orpo",
    "objectives.kto",
    "objectives.grpo",
    "objectives.binding",
    "objectives.battery",
    "train.optimizer",
    "train.vectors",
    "train.step",
    "train.inbox",
    "train.tripwires",
    "train.interrupts",
    "train.checkpoint",
    "train.parking",
    "train.reference",
    "train.feeds",
    "train.rollout_feed",
    "train.trainer",
    "view.closing",
    "view.theme",
    "view.quantities",
    "view.history",
    "view.plots",
    "view.token_cells",
    "view.token_text",
    "view.batch_table",
    "view.token_html",
    "view.mask_overlay",
    "view.answer_diff",
    "view.pair_overlay",
    "view.text_report",
    "view.completions_table",
    "view.row_display",
    "view.row_browser",
    "view.check_report",
    "view.curve_groups",
    "view.curve_points",
    "view.curves",
    "view.panel_head",
    "view.panel_tabs",
    "view.completions_tab",
    "view.panel",
    "view.report",
    "resuming",
    "keeper",
    "material",
    "background",
    "run",
    "notebook.outcome",
    "notebook.session",
    "notebook.driver",
    "notebook.templating",
    "notebook.interrupted",
    "notebook.commands",
    "notebook.completion",
    "notebook.magics",
    "notebook.extension",
    "quickstart",
    "cli",
]
HEAVY = ("mlx_lm", "transformers", "datasets", "matplotlib", "pandas", "torch")


def module_files() -> dict[str, Path]:
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in files.items() if not name.endswith("__init__") and name != "__main__"}


def imported_modules(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the mlx_nb modules that a file imports, without the package's name."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not top_level_only else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mlx_nb":
            inner = node.module.removeprefix("mlx_nb").lstrip(".")
            names = [f"{inner}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in ORDER else inner for name in names}
    return found - {""}


def test_every_module_has_its_place_in_the_order():
    assert set(module_files()) == set(ORDER) & set(module_files())
    assert sorted(set(module_files()) - set(ORDER)) == []


@pytest.mark.parametrize("name", sorted(module_files()))
def test_a_module_imports_only_from_modules_before_it(name):
    later = {other for other in imported_modules(module_files()[name]) if ORDER.index(other) >= ORDER.index(name)}
    assert later == set()


@pytest.mark.parametrize("name", sorted(name for name in module_files() if name.startswith("data.")))
def test_data_does_not_know_mlx(name):
    tree = ast.parse(module_files()[name].read_text())
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"mlx", "mlx_lm"}


@pytest.mark.parametrize("name", sorted(name for name in module_files() if name.startswith("view.")))
def test_views_do_not_know_the_trainer(name):
    assert not {other for other in imported_modules(module_files()[name]) if other.startswith("train")}


def test_loading_the_extension_imports_nothing_heavy():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S; import sys; before = set(sys.modules);"
        "shell = S.instance(); shell.run_line_magic('load_ext', 'mlx_nb');"
        f"loaded = [name for name in {HEAVY!r} if name in set(sys.modules) - before]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
