"""What the text encoders of a model are given for a prompt."""

import json

import numpy as np
import pytest
import transformers

from slam_jax.data import text_inputs, tokenizer
from slam_jax.errors import UserError
from slam_jax.weights import pretrained

PROMPTS = ["a red cat!", "", "x" * 90]


def test_sdxls_inputs_are_those_of_transformers(tiny_sdxl_folder):
    model = pretrained.read(tiny_sdxl_folder)
    inputs = text_inputs.read(model.tokenizer, model.tokenizer_2).encode(PROMPTS, (48, 32))
    assert inputs.keys() == {"input_ids", "input_ids_2", "time_ids"}
    for name, folder in (("input_ids", model.tokenizer), ("input_ids_2", model.tokenizer_2)):
        theirs = transformers.CLIPTokenizer.from_pretrained(folder)
        ids = theirs(PROMPTS, padding="max_length", truncation=True, max_length=77).input_ids
        np.testing.assert_array_equal(inputs[name], ids)
    np.testing.assert_array_equal(inputs["time_ids"], [[48, 32, 0, 0, 48, 32]] * 3)
    assert inputs["time_ids"].dtype == np.int32
    assert (inputs["input_ids"][1] != inputs["input_ids_2"][1]).sum() == 75


def test_one_tokenizer_gives_tokens_alone(tiny_folder):
    tokenizers = text_inputs.read(pretrained.read(tiny_folder).tokenizer, None)
    assert tokenizers.encode(PROMPTS, (32, 32)).keys() == {"input_ids"}
    assert tokenizers.cut(PROMPTS) == ["", "", "x" * 15]


def test_tokenizers_of_two_lengths_are_refused(tiny_sdxl_folder, tmp_path):
    source = tiny_sdxl_folder / "tokenizer_2"
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 50}))
    assert tokenizer.Tokenizer.from_folder(tmp_path).length == 50
    with pytest.raises(UserError, match=r"77 tokens \(model_max_length\) and .* 50;"):
        text_inputs.read(source, tmp_path)
