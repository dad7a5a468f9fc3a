"""Fingerprints: the same for the same numbers, however they are kept, and others for others."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from slam_jax.data import text_inputs
from slam_jax.weights import fingerprint, pretrained

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def vae(tiny_folder):
    return pretrained.read(tiny_folder).vae


@pytest.fixture(scope="module")
def digest(vae):
    return fingerprint.of_params(vae.params)


def test_read_unread_and_on_devices_are_the_same(tiny_folder, vae, digest):
    assert len(digest) == 64
    assert fingerprint.of_params(pretrained.find(tiny_folder).vae.params) == digest
    assert fingerprint.of_params(jax.device_put(vae.params)) == digest


def test_shards_are_the_same(tiny_folder, tmp_path, digest):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    whole = folder / "vae" / f"{STEM}.safetensors"
    tensors = safetensors.numpy.load_file(whole)
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"{STEM}-{number:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in chosen}, folder / "vae" / file)
        weight_map |= dict.fromkeys(chosen, file)
    whole.unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "vae" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint.of_params(pretrained.find(folder).vae.params) == digest


def test_a_wider_type_is_the_same_and_a_narrower_one_is_not(vae, digest):
    def cast(dtype):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), vae.params)

    assert fingerprint.of_params(cast(np.float64)) == digest
    half = cast(ml_dtypes.bfloat16)
    assert fingerprint.of_params(half) != digest
    widened = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    assert fingerprint.of_params(half) == fingerprint.of_params(widened)


def test_one_number_or_name_or_shape_makes_another():
    params = {"a": {"kernel": np.arange(6, dtype=np.float32)}, "b": np.zeros(2, np.float32)}
    others = [
        {"a": {"kernel": np.arange(6, dtype=np.float32) + 1e-3}, "b": np.zeros(2, np.float32)},
        {"a": {"bias": np.arange(6, dtype=np.float32)}, "b": np.zeros(2, np.float32)},
        {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": params["b"]},
    ]
    digests = [fingerprint.of_params(each) for each in (params, *others)]
    assert len(set(digests)) == 4
    # The order in memory and in the tree says nothing.
    matrix = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    again = {"b": params["b"], "a": {"kernel": matrix}}
    assert fingerprint.of_params(again) == digests[3]


def test_tokenizers(tiny_folder, tiny_sdxl_folder, tmp_path):
    first = text_inputs.fingerprints(text_inputs.read(tiny_folder / "tokenizer", None))
    both = text_inputs.fingerprints(
        text_inputs.read(tiny_sdxl_folder / "tokenizer", tiny_sdxl_folder / "tokenizer_2")
    )
    assert len(first) == 1 and both[0] == first[0] and both[1] != first[0]
    changed = tmp_path / "tokenizer"
    shutil.copytree(tiny_folder / "tokenizer", changed)
    (changed / "merges.txt").write_text("#version: 0.2\nc a\n")
    vocab = json.loads((changed / "vocab.json").read_text())
    (changed / "vocab.json").write_text(json.dumps({**vocab, "ca": len(vocab)}))
    second = text_inputs.fingerprints(text_inputs.read(changed, None))
    (changed / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 50}))
    third = text_inputs.fingerprints(text_inputs.read(changed, None))
    assert len({first, second, third}) == 3
