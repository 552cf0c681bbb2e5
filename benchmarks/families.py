"""Every family of mlx-lm, trained in every way for a few updates on a tiny model: what is so of each, as a page.

    python benchmarks/families.py [FAMILY ...] [--json FILE] [--page docs/families.md]

LoRA, DoRA, full and a 4-bit base, SFT and DPO: the loss falls, the gradient is finite and the whole model's own,
padding changes nothing, a resumed run ends with the same bits, mlx_lm.load reads the adapter, and the model answers
with and without it; or it is refused by name before the first update. Takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

HEAD = """# Families

Every model family of mlx-lm {mlx_lm}, and whether it can be fine-tuned with LoRA, DoRA, full weights, or LoRA on a
4-bit base. `python benchmarks/families.py` wrote this page from tiny models with random weights in float32, mlx {mlx}
on {machine}.

- **A number** means that everything worked in {updates} updates of SFT and of DPO: the loss fell, the gradient was
  finite and equal to that of the whole model, padding changed nothing, a resumed run ended with the same bits,
  `mlx_lm.load` read the adapter, and the model generated with and without it. The number is the largest difference
  between a gradient and that of the whole model, or that with other padding, as a fraction of the largest gradient.
- *refused* means that one line says why, before anything is written. [The reasons](#refused-and-why) are below, and so
  are [trained tensors that never get a gradient](#notes).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--json", default=str(Path(tempfile.gettempdir()) / "mlx_nb_families.jsonl"))
    parser.add_argument("--page", help="write the page here when all is done")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measured(chosen.child)))
        return
    from every_family import EVERY_FAMILY

    lines = Path(chosen.json)
    known = {one["family"]: one for one in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    for family in chosen.family or EVERY_FAMILY:
        if family not in known:
            known[family] = in_a_process(family)
            with lines.open("a") as file:
                file.write(json.dumps(known[family]) + "\n")
            print(family, words(known[family], "lora"), flush=True)
    if chosen.page:
        Path(chosen.page).write_text(page(known))


def in_a_process(family: str) -> dict:
    """A family whose code ends the process ends none of the others."""
    command = [sys.executable, __file__, "--child", family]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"family"')]
    return json.loads(lines[-1]) if lines else {"family": family, "crashed": done.returncode, "cells": {}}


def measured(family: str) -> dict:
    """The figures of one family by `kind/method`."""
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from family_sweep import KINDS, METHODS, examine
    from tiny import save_tiny_model

    cells = {}
    with tempfile.TemporaryDirectory() as root:
        tokenizer = Path(root, "tokenizer")
        tokenizer.mkdir()
        save_tiny_model(tokenizer)
        for kind in KINDS:
            for method in METHODS:
                try:
                    own, models = Path(root, family), Path(root, "models")
                    cells[f"{kind}/{method}"] = examine(family, kind, method, own, models, tokenizer)
                except Exception as error:
                    cells[f"{kind}/{method}"] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {"family": family, "cells": cells}


def words(found: dict, kind: str) -> str:
    """One cell of the table."""
    cells = [cell for name, cell in found["cells"].items() if name.startswith(f"{kind}/")]
    if not cells:
        return "crashes mlx"
    if any("failed" in cell for cell in cells):
        return "**fails**"
    if any("refused" in cell for cell in cells):
        return "refused"
    return f"{max(max(cell['gradient'], cell['padding']) for cell in cells):.0e}"


def page(known: dict[str, dict]) -> str:
    """The page, in Markdown."""
    from family_sweep import KINDS, UPDATES

    machine = f"an {platform.machine()} CPU"
    head = HEAD.format(mlx_lm=version("mlx-lm"), mlx=version("mlx"), machine=machine, updates=UPDATES)
    rows = [f"| {' | '.join([name, *(words(found, kind) for kind in KINDS)])} |" for name, found in known.items()]
    titles = {"lora": "LoRA", "dora": "DoRA", "full": "full", "quantized": "LoRA, 4-bit base"}
    table = [f"| family | {' | '.join(titles[kind] for kind in KINDS)} |", f"|---|{'---|' * len(KINDS)}", *rows]
    return head + "\n".join(table) + "\n\n## Refused, and why\n\n" + reasons(known) + "\n## Notes\n\n" + remarks(known)


def reasons(known: dict[str, dict]) -> str:
    """Each refusal and failure once, with who is meant."""
    by_reason: dict[str, list[str]] = {}
    for name, found in known.items():
        if "crashed" in found:
            by_reason.setdefault("its own code ends the process in mlx", []).append(name)
        for cell in found["cells"].values():
            if (line := cell.get("refused") or cell.get("failed")) is not None:
                reason = line.split("mlx-lm: ", 1)[-1].split(". Choose", 1)[0].replace(f"{name}: ", "")
                reason = reason.split(" (they differ by", 1)[0]
                way = re.search("cannot be trained by (.+?) with", line)
                who = f"{name} ({way[1]})" if way else name
                if who not in by_reason.setdefault(reason, []):
                    by_reason[reason].append(who)
    return "".join(f"- {reason}: {', '.join(who)}\n" for reason, who in by_reason.items())


def remarks(known: dict[str, dict]) -> str:
    """What the runs said about their models, each line once."""
    lines = [note for found in known.values() for cell in found["cells"].values() for note in cell.get("notes", ())]
    return "".join(f"- {line}\n" for line in dict.fromkeys(lines)) or "None.\n"


if __name__ == "__main__":
    main()
