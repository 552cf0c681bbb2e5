"""A model folder that was found intact is not read again until one of its files changes."""

from __future__ import annotations

from mlx_nb.files import cache_folder


def test_an_intact_folder_is_read_once_and_again_after_a_change(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    read = []
    json_of = cache_folder._json_of
    monkeypatch.setattr(cache_folder, "_json_of", lambda path: (read.append(path.name), json_of(path))[1])
    assert cache_folder.damage(folder) is None
    assert "tokenizer.json" in read
    read.clear()
    assert cache_folder.damage(folder) is None
    assert read == []
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:-9])
    assert "tokenizer.json" in cache_folder.damage(folder)
