"""Folders of transformers' CLIPModel, read: all their forms, and bad ones."""

import json
import shutil

import flax.serialization
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import torch as safetensors_torch

from slam_jax.errors import UserError
from slam_jax.weights import clip, hub, translate


@pytest.fixture
def folder(clip_folder, tmp_path):
    """One that may be changed."""
    return shutil.copytree(clip_folder, tmp_path / "clip")


def tensors(folder) -> dict[str, np.ndarray]:
    """What the scores stand on, by torch's own reading."""
    model = transformers.CLIPModel.from_pretrained(folder)
    return {
        name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "logit_scale"
    }


def assert_reads_as(found: clip.CLIP, expected: dict[str, np.ndarray]) -> None:
    ours = {**translate.to_tensors(found.text.params), **translate.to_tensors(found.image.params)}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor)


def rewrite(path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: content[key] for key in content if content[key] != "GONE"}))


def test_reads_what_transformers_saves(clip_folder):
    found = clip.read(clip_folder)
    assert_reads_as(found, tensors(clip_folder))
    assert all(name.startswith("text") for name in found.text.params)
    assert found.text.config["projection_dim"] == found.image.config["projection_dim"] == 12
    assert found.preprocessor["size"] == {"shortest_edge": 24}
    assert found.tokenizer == clip_folder


def test_reads_shards(folder):
    expected = tensors(folder)
    model = transformers.CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_reads_as(clip.read(folder), expected)


def test_reads_half_precision_and_the_buffers_of_older_files(folder):
    path = folder / "model.safetensors"
    stored = {name: tensor.half() for name, tensor in safetensors_torch.load_file(path).items()}
    expected = {name: t.float().numpy() for name, t in stored.items() if name != "logit_scale"}
    for tower, length in (("text", 77), ("vision", 10)):
        stored[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    safetensors_torch.save_file(stored, path)
    found = clip.read(folder)
    assert_reads_as(found, expected)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found.image.params))


def test_reads_flaxs_msgpack_where_there_are_no_safetensors(folder):
    expected = tensors(folder)
    found = clip.read(folder)
    flat = {**found.text.params, **found.image.params}
    tree: dict = {"logit_scale": np.ones((), np.float32)}
    for module, leaves in flat.items():
        *parents, last = module.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
        level.setdefault(last, {}).update(leaves)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_reads_as(clip.read(folder), expected)


def in_open_clips_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As OpenCLIP keeps a CLIPModel's tensors: queries, keys and values in one, and so on."""
    renamed = {"logit_scale": torch.tensor(1.0), "attn_mask": torch.zeros(77, 77)}
    simple = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for name, tensor in tensors.items():
        if name.endswith("_projection.weight"):
            key = "visual.proj" if name.startswith("visual") else "text_projection"
            renamed[key] = tensor.T.contiguous()
            continue
        if ".k_proj." in name or ".v_proj." in name or name == "logit_scale":
            continue
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensor = torch.cat(parts)
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for ours, theirs in simple.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def to_open_clip(folder) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    renamed = in_open_clips_layout(safetensors_torch.load_file(path))
    path.unlink()
    safetensors_torch.save_file(renamed, folder / "open_clip_model.safetensors")
    return renamed


def test_reads_open_clips_layout(folder):
    expected = tensors(folder)
    to_open_clip(folder)
    assert_reads_as(clip.read(folder), expected)


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("visual.proj", lambda t: t[1:], "tensor 'visual.proj' has shape"),
        ("transformer.resblocks.1.attn.in_proj_weight", lambda t: t[3:], "_weight' has shape"),
        ("visual.ln_pre.bias", lambda t: None, "lacks tensor 'visual.ln_pre.bias'"),
        ("visual.head.weight", lambda t: torch.zeros(1), "'visual.head.weight' is unknown"),
    ],
)
def test_open_clip_tensors_of_another_model_are_refused(folder, key, change, message):
    renamed = to_open_clip(folder)
    renamed[key] = change(renamed.get(key))
    stored = {name: t.contiguous() for name, t in renamed.items() if t is not None}
    safetensors_torch.save_file(stored, folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=f"open_clip_model.safetensors.*{message}"):
        clip.read(folder)


OLDER = {
    "text_config": {"hidden_size": 7, "bad_words_ids": None, "temperature": 1.0, "eos_token_id": 2},
    "text_config_dict": {"hidden_size": 32, "hidden_act": "gelu", "projection_dim": 9},
    "vision_config": {"image_size": 64, "torchscript": False},
    "vision_config_dict": None,
    "projection_dim": 24, "architectures": ["CLIPModel"], "torch_dtype": "float32",
    "model_type": "clip",
}  # fmt: skip


@pytest.mark.parametrize(
    "config", [OLDER, {"model_type": "clip"}, {**OLDER, "vision_config_dict": {"patch_size": 16}}]
)
def test_older_configs_mean_what_they_mean_to_transformers(config):
    theirs = transformers.CLIPConfig.from_dict(json.loads(json.dumps(config)))
    for ours, reference in zip(
        clip.tower_configs("config.json", config),
        (theirs.text_config.to_dict(), theirs.vision_config.to_dict()),
        strict=True,
    ):
        assert ours.pop("architectures", None) in (None, ["CLIPTextModelWithProjection"])
        assert ours.pop("projection_dim") == theirs.projection_dim
        assert ours == {key: reference[key] for key in ours} and len(ours) >= 9


def test_processor_config_of_transformers_5_is_read(folder):
    preprocessor = {"size": {"shortest_edge": 30}}
    content = {"processor_class": "CLIPProcessor", "image_processor": preprocessor}
    (folder / "processor_config.json").write_text(json.dumps(content))
    assert clip.read(folder).preprocessor == preprocessor


def test_a_model_of_the_hub_comes_without_pickles(clip_folder, monkeypatch):
    asked = []

    def snapshot(name, revision, patterns):
        asked.append((name, revision, patterns))
        return clip_folder

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    assert clip.locate("laion/clip", "v2") == clip_folder
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("laion/clip", "v2")
    assert {"config.json", "model.safetensors", "merges.txt"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".pt", ".msgpack")) for pattern in patterns)


def test_a_model_of_the_hub_without_safetensors_comes_as_msgpack(folder, monkeypatch):
    (folder / "model.safetensors").unlink()

    def snapshot(_name, _revision, patterns):
        if "flax_model.msgpack" in patterns:
            (folder / "flax_model.msgpack").write_bytes(b"")
        return folder

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    assert clip.locate("openai/clip") == folder
    assert (folder / "flax_model.msgpack").exists()


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _other_width(folder):
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    rewrite(folder / "config.json", vision_config={**config, "hidden_size": 32})


def _unknown_tensor(folder):
    path = folder / "model.safetensors"
    stored = safetensors_torch.load_file(path)
    safetensors_torch.save_file({**stored, "vision_model.proj": torch.zeros(2)}, path)


def _odd_text(folder):
    rewrite(folder / "config.json", text_config={"hidden_size": "wide"})


def _edits(file, **changes):
    return lambda folder: rewrite(folder / file, **changes)


def _without(file):
    return lambda folder: (folder / file).unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "there is no folder .*/clip; give a folder in the layout of transformers'"),
        (_without("config.json"), "holds no config.json; give a folder in the layout"),
        (_without("preprocessor_config.json"), "holds neither preprocessor_config.json nor"),
        (_without("merges.txt"), "has neither vocab.json with merges.txt nor tokenizer.json"),
        (_no_weights, "has no model.safetensors; copy or download the folder again"),
        (
            _only_a_pickle,
            "only pytorch_model.bin, a pickle, which is never opened; convert it once",
        ),
        (_edits("config.json", model_type="siglip"), "is of model_type 'siglip', not 'clip'"),
        (
            _edits("config.json", architectures=["CLIPVisionModel"]),
            r"is of \['CLIPVisionModel'\], not",
        ),
        (_edits("config.json", text_config=[1]), r"text_config is \[1\], not a JSON object"),
        (_edits("config.json", projection_dim="12"), "config.json: .*projection_dim '12'"),
        (_odd_text, "config.json describes no network that can be built"),
        (_other_width, r"'vision_model.*' has shape \[24.*config.json asks for \[32"),
        (_unknown_tensor, "tensor 'vision_model.proj' is unknown"),
    ],
)
def test_a_bad_folder_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        clip.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["HPS_v2_compressed.pt", "model.safetensors"])
def test_a_file_is_no_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="pickle, which is never|is no folder; give") as caught:
        clip.read(tmp_path / name)
    assert ("weights_only=True" in str(caught.value)) == name.endswith(".pt")
