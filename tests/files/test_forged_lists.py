"""What a run's folder says of itself may be anything: it counts where it is of its kind, and breaks nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import FolderError, MlxNbError
from mlx_nb.files.written_files import WrittenFiles, run_in
from odd_values import nested
from tiny import tiny_rows

VALUES = [None, 7, True, [], ["a"], {}, {"x": 1}, 10**30, float("nan"), nested(900), "\ud800", "../../x"]
BEGINNING = '{"run": "'  # of a lock of mlx_nb
ENTRIES = [{"run": "id", "name": "a", "kind": "run"}, {"file": "x", "bytes": 1, "sha256": "0"}]
LINES = [
    *(json.dumps({**entry, key: value}) for entry in ENTRIES for key in entry for value in VALUES),
    *(json.dumps({k: v for k, v in entry.items() if k != key}) for entry in ENTRIES for key in entry),
    *("[" * 5000, "[]", "3", "null", '"x"', "{", "\x00", '{"run": "a", "run": "b"}'),
]


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    values = {"model": str(tiny_folder), "data": tiny_rows(8), "iters": 2, "val_set_size": 0}
    run = Run(RunConfig.from_dict({**values, "lora_parameters": {"rank": 2}, "adapter_path": str(folder)}))
    run.step(1)
    run.save()
    run.release()
    return folder


def test_a_forged_line_of_the_list_is_passed_over(made, tmp_path):
    shutil.copytree(made, tmp_path / "a")
    path = tmp_path / "a" / ".mlx_nb" / "written.jsonl"
    before = path.read_bytes()
    ours = WrittenFiles(tmp_path / "a").own()
    assert "adapters.safetensors" in ours
    for line in LINES:
        path.write_bytes(before + line.encode("utf-8", "surrogatepass") + b"\n")
        assert set(ours) <= {*WrittenFiles(tmp_path / "a").own()} or WrittenFiles(tmp_path / "a").run != "id"
        path.write_bytes(line.encode("utf-8", "surrogatepass") + b"\n" + before)
        run_in(tmp_path / "a")
        WrittenFiles(tmp_path / "a").in_the_way()


@pytest.mark.long
def test_a_forged_lock_keeps_no_run_from_its_folder_and_a_file_that_is_no_lock_is_named(made, tmp_path):
    holder = {"run": "a", "pid": 1, "host": "x", "started": None, "since": ""}
    forged = [json.dumps({**holder, key: value}) for key in holder for value in VALUES[:10:2]]
    for number, line in enumerate([*forged, "[" * 5000, "[]", "3", ""]):
        folder = tmp_path / f"{number}"
        shutil.copytree(made, folder)
        lock = folder / ".mlx_nb" / "lock"
        lock.write_text(line)
        if not BEGINNING.startswith(line[: len(BEGINNING)]):
            with pytest.raises(FolderError, match="lock would be overwritten, but mlx_nb did not write it") as refused:
                Run.resume(folder, data=tiny_rows(8))
            assert "\n" not in str(refused.value)
            assert lock.read_text() == line
            continue
        run = Run.resume(folder, data=tiny_rows(8))
        assert run.step_count == 1
        run.release()


def test_a_forged_list_ends_a_resume_in_one_line_at_most(made, tmp_path):
    for number, line in enumerate(LINES[::9]):
        folder = tmp_path / f"{number}"
        shutil.copytree(made, folder)
        (folder / ".mlx_nb" / "written.jsonl").write_bytes(line.encode("utf-8", "surrogatepass") + b"\n")
        try:
            Run.resume(folder, data=tiny_rows(8)).release()
        except MlxNbError as error:
            said = str(error)
        else:
            continue
        assert "\n" not in said
