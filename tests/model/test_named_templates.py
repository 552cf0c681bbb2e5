"""Chat templates by name: what they write, which tokenizers they go with, and that answers end where turns do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

import mlx_nb
from mlx_nb import RunConfig
from mlx_nb.config.named_templates import NAMED_TEMPLATES
from mlx_nb.errors import ModelError
from runs import rows_run
from tiny import save_tiny_model

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "say red"},
    {"role": "assistant", "content": "redred"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "red"},
]


@pytest.fixture
def folder_with(tmp_path):
    """A tiny base model without a chat template, whose tokenizer has these control tokens."""

    def made(*tokens):
        folder = save_tiny_model(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # In the place of tokens that are there already: the model gets no longer.
        for old, new in zip(("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), tokens, strict=False):
            for file in folder.glob("*.json"):
                file.write_text(file.read_text().replace(old, new))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert tokenizer is not None
        return folder

    return made


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_what_the_assistant_says_is_trained_with_the_end_of_its_turn(folder_with, name):
    template = NAMED_TEMPLATES[name]
    folder = folder_with(*template.tokens)
    row = mlx_nb.rows([{"messages": TALK}] * 3, model=str(folder), chat_template=name, val_set_size=0)[0]
    assert row.error is None
    trained = "".join(
        row.text[start:stop]
        for (start, stop), weight in zip(row.conversation.offsets, row.loss_mask, strict=True)
        if weight
    )
    assert "redred" in trained
    assert "again" not in trained
    assert "Be brief." in row.text
    ends = template.end or "<|end|>"
    assert trained.count(ends) == 2
    assert np.count_nonzero(row.loss_mask) > 4


@pytest.mark.parametrize("name", [name for name, one in NAMED_TEMPLATES.items() if one.tokens])
def test_a_tokenizer_without_its_tokens_is_refused_by_their_names(tiny_folder, name):
    with pytest.raises(ModelError) as caught:
        mlx_nb.rows([{"messages": TALK}] * 3, model=str(tiny_folder), chat_template=name, val_set_size=0)[0]
    for token in NAMED_TEMPLATES[name].tokens:
        assert token in str(caught.value)
    assert str(caught.value).endswith("Templates that it supports: mistral.")


@pytest.mark.long
def test_a_base_model_is_trained_and_asked_with_it_and_an_answer_ends_with_its_turn(folder_with, tmp_path):
    folder = folder_with(*NAMED_TEMPLATES["chatml"].tokens)
    rows = [{"prompt": "say red", "completion": "red"}] * 8
    run = rows_run(tmp_path, folder, data=rows, chat_template="chatml", iters=40, learning_rate=1e-2, val_set_size=2)
    run.run()
    assert run.generate("say red", max_tokens=20) == "red"
    assert mlx_nb.load(run.folder).generate("say red", max_tokens=20) == "red"
    assert RunConfig.from_yaml(run.config.to_yaml()).chat_template == "chatml"
