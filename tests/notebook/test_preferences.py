"""`%config Finetune`."""

from __future__ import annotations

import os

from mlx_nb.files.cache_folder import cache_folder


def test_preferences_are_set_by_config_and_given_back(shell, tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_NB_CACHE", raising=False)
    shell.run_line_magic("reload_ext", "mlx_nb")
    preferences = shell.magics_manager.registry["FinetuneMagics"].preferences
    assert preferences.wait is None
    shell.run_line_magic("config", "Finetune.background = 'never'")
    assert preferences.wait is True
    shell.run_line_magic("config", "Finetune.background = 'always'")
    assert preferences.wait is False
    shell.run_line_magic("config", f"Finetune.cache_folder = {str(tmp_path / 'models')!r}")
    assert cache_folder() == tmp_path / "models"
    shell.run_line_magic("unload_ext", "mlx_nb")
    assert "MLX_NB_CACHE" not in os.environ
    assert not [one for one in shell.configurables if "Finetune" in type(one).__name__]
    shell.run_line_magic("load_ext", "mlx_nb")


def test_the_extension_can_be_loaded_by_the_first_use_of_its_magic(shell):
    shell.run_line_magic("unload_ext", "mlx_nb")
    shell.magics_manager.lazy_magics = {"finetune": "mlx_nb"}
    try:
        assert "no runs yet" in str(shell.run_line_magic("finetune", "runs"))
    finally:
        shell.magics_manager.lazy_magics = {}
