"""SDXL folders: read what torch's libraries write, write what they load; parts that do not fit."""

import filecmp
import json
import shutil

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

from slam_jax.errors import UserError
from slam_jax.weights import fit, pretrained, tensorfile, translate

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_reads_what_diffusers_writes(sdxl_pipeline, sdxl_folder):
    model = pretrained.read(sdxl_folder)
    for part in PARTS:
        ours = translate.to_tensors(getattr(model, part).params)
        prefix = "text_model." if part == "text_encoder" else ""
        theirs = getattr(sdxl_pipeline, part).state_dict()
        assert ours.keys() == {prefix + name for name in theirs}
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(ours[prefix + name], tensor, err_msg=name)
    assert model.tokenizer_2 == sdxl_folder / "tokenizer_2"
    assert model.force_zeros_for_empty_prompt is True


@pytest.mark.parametrize("force_zeros", [True, False])
def test_round_trip_gives_the_same_files(sdxl_folder, tmp_path, force_zeros):
    source = shutil.copytree(sdxl_folder, tmp_path / "model")
    edit_json(source / "model_index.json", force_zeros_for_empty_prompt=force_zeros)
    pretrained.write(tmp_path / "copy", pretrained.read(source))
    assert files(tmp_path / "copy") == files(source)
    for name in files(source) - {"model_index.json"}:
        assert filecmp.cmp(source / name, tmp_path / "copy" / name, shallow=False), name
    index = json.loads((source / "model_index.json").read_text())
    ours = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert ours | {"_diffusers_version": index["_diffusers_version"]} == index


def test_diffusers_loads_what_is_written(sdxl_pipeline, sdxl_folder, tmp_path):
    model = pretrained.read(sdxl_folder)
    bare = {k: v for k, v in model.text_encoder_2.config.items() if k != "architectures"}
    model = model._replace(text_encoder_2=model.text_encoder_2._replace(config=bare))
    pretrained.write(tmp_path / "ours", model)
    ours = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", add_watermarker=False)
    assert type(ours) is diffusers.StableDiffusionXLPipeline
    for part in PARTS:
        one, other = getattr(ours, part).state_dict(), getattr(sdxl_pipeline, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), part
    assert ours.tokenizer_2.pad_token_id == 0 != ours.tokenizer.pad_token_id


# What is refused: each time one line, naming what was found and what was expected.


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def sdxl(sdxl_folder, tmp_path):
    """A copy of sdxl_folder to break."""
    return shutil.copytree(sdxl_folder, tmp_path / "model")


def refusal(folder, monkeypatch) -> str:
    """What read says; no tensor may have been read."""
    monkeypatch.setattr(tensorfile.Stored, "__array__", None)
    with pytest.raises(UserError) as caught:
        pretrained.read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_second_encoder_is_named(sdxl, monkeypatch):
    shutil.rmtree(sdxl / "text_encoder_2")
    message = refusal(sdxl, monkeypatch)
    assert f"cannot read {sdxl}/text_encoder_2/config.json: No such file" in message
    edit_json(sdxl / "model_index.json", text_encoder_2=[None, None])
    message = refusal(sdxl, monkeypatch)
    assert "text_encoder_2 is [None, None], not a CLIPTextModelWithProjection" in message


def test_a_missing_second_tokenizer_is_named(sdxl, monkeypatch):
    shutil.rmtree(sdxl / "tokenizer_2")
    assert f"{sdxl}/tokenizer_2 has neither vocab.json" in refusal(sdxl, monkeypatch)


def test_the_first_encoder_is_no_second_one(sdxl, monkeypatch):
    shutil.rmtree(sdxl / "text_encoder_2")
    shutil.copytree(sdxl / "text_encoder", sdxl / "text_encoder_2")
    message = refusal(sdxl, monkeypatch)
    assert f"{sdxl}/text_encoder_2/config.json is of a CLIPTextModel, not a CLIPText" in message


def test_an_inpainting_unet_is_refused(model, monkeypatch):
    """With weights that fit its config, as such models have."""
    edit_json(model / "unet" / "config.json", in_channels=9)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "conv_in.weight": torch.zeros(8, 9, 3, 3)}, path)
    message = refusal(model, monkeypatch)
    assert message.startswith(
        f"{model}: the UNet has in_channels 9 (9 are an inpainting model's), but the VAE's "
        "latent_channels are 4;"
    )


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vae", {"latent_channels": 16}, "in_channels 4, but the VAE's latent_channels are 16;"),
        ("unet", {"out_channels": 8}, "out_channels 8, but the VAE's latent_channels are 4;"),
        (
            "text_encoder",
            {"hidden_size": 8},
            "the text is 8 + 24 wide (hidden_size), but the UNet's cross_attention_dim is 40;",
        ),
        (
            "text_encoder_2",
            {"projection_dim": 10},
            "the pooled text is 10 wide (projection_dim of text_encoder_2), but the UNet's "
            "addition_embed_type 'text_time' takes 12;",
        ),
        ("unet", {"addition_embed_type": None}, "addition_embed_type None takes None;"),
    ],
)
def test_parts_that_do_not_fit_are_refused(sdxl, monkeypatch, part, changes, words):
    edit_json(sdxl / part / "config.json", **changes)
    message = refusal(sdxl, monkeypatch)
    assert message.startswith(f"{sdxl}: ") and words in message


def test_an_sdxl_unet_does_not_fit_one_encoder(sdxl_folder, torch_folder):
    xl, sd = pretrained.read(sdxl_folder), pretrained.read(torch_folder)
    unet = {**xl.unet.config, "cross_attention_dim": 16}
    with pytest.raises(UserError, match="the pooled text is None wide.* takes 12"):
        fit.check("here", unet, sd.vae.config, sd.text_encoder.config)
    with pytest.raises(UserError, match="here: the text is 16 wide.*cross_attention_dim is 40"):
        fit.check("here", xl.unet.config, sd.vae.config, sd.text_encoder.config)
