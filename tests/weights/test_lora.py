"""LoRA files against diffusers and PEFT: what they load from ours, and what we read of theirs."""

import copy
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict
from safetensors import numpy as safetensors
from safetensors import torch as safetensors_torch

from slam_jax.errors import UserError
from slam_jax.nets import lora as lora_tree
from slam_jax.nets import unet
from slam_jax.weights import ldm_names, lora, lora_names, pretrained, student, translate

TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
    "time_emb_proj", "conv_in", "conv_out", "time_embedding.linear_1",
]  # fmt: skip
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PROMPTS = ["at a", "b"]
SDXL = dict(
    sample_size=128, block_out_channels=[320, 640, 1280], transformer_layers_per_block=[1, 2, 10],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(torch_folder):
    return pretrained.read(torch_folder)


@pytest.fixture(scope="module")
def additions(model):
    """A LoRA of rank 3 for the UNet, nothing in it zero."""
    tree = lora_tree.init(np.random.default_rng(0), model.unet.params, TARGETS, 3)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), tree)


@pytest.fixture
def theirs(pipeline):
    """The same model in torch, to be changed."""
    pipe = diffusers.StableDiffusionPipeline(
        **{name: copy.deepcopy(part) for name, part in pipeline.components.items()},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _weights(module) -> dict:
    """A torch network's tensors as if its fused adapters had never been there."""
    return {
        name.replace(".base_layer.", "."): tensor.numpy()
        for name, tensor in module.state_dict().items()
        if "lora_" not in name
    }


def _assert_same(component: pretrained.Component, module) -> None:
    ours, expected = translate.to_tensors(component.params), _weights(module)
    if component.bare_names:
        ours = {name.removeprefix("text_model."): ours[name] for name in ours}
    assert ours.keys() == expected.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("file", [lora.DIFFUSERS_FILE, lora.KOHYA_FILE])
def test_diffusers_fuses_our_file_to_our_merged_network(file, model, additions, theirs, tmp_path):
    lora.write(tmp_path, additions)
    theirs.load_lora_weights(tmp_path, weight_name=file)
    theirs.fuse_lora()
    merged = lora.merged(model.unet, additions)
    _assert_same(merged, theirs.unet)

    rng = np.random.default_rng(2)
    x, text = rng.normal(size=(2, 4, 8, 8)), rng.normal(size=(2, 5, 16))
    t = np.array([999, 19])
    with torch.no_grad():
        expected = theirs.unet(
            torch.tensor(x, dtype=torch.float32), torch.tensor(t),
            torch.tensor(text, dtype=torch.float32),
        ).sample  # fmt: skip
    found = jax.jit(unet.from_config(merged.config).apply)(
        {"params": merged.params}, jnp.float32(x.transpose(0, 2, 3, 1)), t, jnp.float32(text)
    )
    error = found.transpose(0, 3, 1, 2) - expected.numpy()
    assert np.linalg.norm(error) <= 1e-5 * np.linalg.norm(expected)


def test_diffusers_draws_the_same_from_base_and_file_as_from_our_merged_folder(
    model, additions, theirs, tmp_path
):
    lora.write(tmp_path / "student_lora", additions)
    pretrained.write(
        tmp_path / "student", student.student(model, lora.merged(model.unet, additions))
    )
    merged = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "student", safety_checker=None
    )
    merged.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path / "student_lora")
    theirs.fuse_lora()
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    images = [
        pipe(
            PROMPTS, num_inference_steps=2, guidance_scale=1, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipe in (merged, theirs)
    ]  # fmt: skip
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_file_of_diffusers_is_read(with_metadata, model, theirs, tmp_path):
    """alpha is not the rank and differs between modules, which only the metadata tells."""
    patterns = dict(rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 5}) if with_metadata else {}
    nets = {
        "unet": (theirs.unet, dict(target_modules=TARGETS, **patterns)),
        "text_encoder": (theirs.text_encoder, dict(target_modules=TEXT_TARGETS)),
    }
    torch.manual_seed(1)
    layers, metadata = {}, {}
    for part, (net, settings) in nets.items():
        alpha = 8 if with_metadata else 4
        config = peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights=False, **settings)
        net.add_adapter(config)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(net, adapter_name="default")
        if with_metadata:
            metadata[f"{part}_lora_adapter_metadata"] = net.peft_config["default"].to_dict()
    theirs.save_lora_weights(tmp_path, **layers, **metadata)
    theirs.fuse_lora(lora_scale=0.7)
    ours = lora.apply(model, tmp_path / lora.DIFFUSERS_FILE, 0.7)
    _assert_same(ours.unet, theirs.unet)
    _assert_same(ours.text_encoder, theirs.text_encoder)
    assert ours.vae is model.vae
    changed = ours.unet.params["conv_in"]["kernel"] - model.unet.params["conv_in"]["kernel"]
    assert np.abs(changed).max() > 0.01


def _of_processors(key: str) -> str | None:
    """As attention processors were saved, diffusers < 0.18, where the UNet had no prefix."""
    key = (
        key.removeprefix("unet.")
        .replace(".lora_down", "_lora.down")
        .replace(".lora_up", "_lora.up")
    )
    if ".attn" in key:
        return key.replace(".to_", ".processor.to_").replace(".to_out.0_", ".to_out_")
    for ours, theirs in (
        ("q_proj", "to_q"),
        ("k_proj", "to_k"),
        ("v_proj", "to_v"),
        ("out_proj", "to_out"),
    ):
        key = key.replace(ours, theirs)
    return key if ".self_attn." in key else None


def _of_scripts(key: str) -> str:
    """As diffusers' training scripts saved LoRAs before PEFT."""
    key = key.replace(".lora_down", ".lora.down").replace(".lora_up", ".lora.up")
    return key.replace(".lora.", ".lora_linear_layer.") if key.startswith("text_encoder") else key


@pytest.mark.parametrize("respell", [_of_processors, _of_scripts])
def test_older_files_of_diffusers_are_read(respell, model, additions, theirs, tmp_path):
    text = lora_tree.init(np.random.default_rng(4), model.text_encoder.params, TEXT_TARGETS, 3)
    text = jax.tree.map(lambda leaf: leaf + np.float32(0.1), text)
    tensors = {
        respell(f"{part}.{name}"): np.ascontiguousarray(tensor)
        for part, tree in (("unet", additions), ("text_encoder", text))
        for name, tensor in translate.to_tensors(tree).items()
    }
    tensors.pop(None, None)
    safetensors.save_file(tensors, tmp_path / "old.safetensors")
    ours = lora.apply(model, tmp_path / "old.safetensors", 1.0)
    theirs.load_lora_weights(
        {
            key if key.startswith(("unet.", "text_encoder.")) else f"unet.{key}": torch.tensor(
                tensor
            )
            for key, tensor in tensors.items()
        }
    )
    theirs.fuse_lora()
    _assert_same(ours.unet, theirs.unet)
    _assert_same(ours.text_encoder, theirs.text_encoder)


def _kohya(model, ldm: bool) -> dict[str, torch.Tensor]:
    """A file as kohya's scripts write it: LDM's block names for SDXL, diffusers' for the others."""
    net = unet.from_config(model.unet.config)
    modules = ldm_names.unet((net.layers_per_block,) * 2, (False, True)) if ldm else {}
    trees = {"lora_unet_": (model.unet, TARGETS)}
    trees["lora_te1_" if ldm else "lora_te_"] = (model.text_encoder, TEXT_TARGETS)
    rng, tensors = np.random.default_rng(3), {}
    for prefix, (component, targets) in trees.items():
        tree = lora_tree.init(rng, component.params, targets, 2)
        for name, tensor in translate.to_tensors(tree).items():
            module, half, _ = name.rsplit(".", 2)
            # diffusers takes an upsampler below a level without attention for an attention.
            if not (ldm and "upsamplers" in module):
                key = prefix + ldm_names.rename(module, modules).replace(".", "_")
                value = rng.normal(0, 0.1, tensor.shape)
                tensors[f"{key}.{half}.weight"] = torch.tensor(value, dtype=torch.float32)
                tensors[f"{key}.alpha"] = torch.tensor(1)
    return tensors


@pytest.mark.parametrize("ldm", [False, True])
def test_file_of_kohya_is_read(ldm, model, theirs, tmp_path):
    tensors = _kohya(model, ldm)
    safetensors_torch.save_file(tensors, tmp_path / "kohya.safetensors")
    ours = lora.apply(model, tmp_path / "kohya.safetensors", -0.5)
    # The pipeline of SDXL is the one that knows LDM's names.
    reader = diffusers.StableDiffusionXLPipeline if ldm else diffusers.StableDiffusionPipeline
    state, alphas = reader.lora_state_dict(dict(tensors), unet_config=theirs.unet.config)
    reader.load_lora_into_unet(state, alphas, theirs.unet)
    reader.load_lora_into_text_encoder(state, alphas, theirs.text_encoder, prefix="text_encoder")
    theirs.fuse_lora(lora_scale=-0.5)
    _assert_same(ours.unet, theirs.unet)
    _assert_same(ours.text_encoder, theirs.text_encoder)


def test_of_what_a_run_trains_only_the_additions_are_baked(additions):
    trained = {**additions, "time_embedding": {
        **additions["time_embedding"], "cond_proj": {"kernel": np.ones((4, 8), np.float32)},
    }}  # fmt: skip
    baked = lora.baked(trained, 0.25)
    assert jax.tree.structure(baked) == jax.tree.structure(additions)
    found, given = (tree["conv_in"] for tree in (baked, additions))
    np.testing.assert_array_equal(found["lora_up"]["kernel"], given["lora_up"]["kernel"] / 4)
    np.testing.assert_array_equal(found["lora_down"]["kernel"], given["lora_down"]["kernel"])


def _broken(tensors: dict, name: str) -> dict:
    key = "lora_unet_conv_in.lora_down.weight"
    match name:
        case "unknown":
            del tensors["lora_unet_conv_in.alpha"]
            return {
                k.replace("lora_unet_conv_in", "lora_unet_conv_inn"): v for k, v in tensors.items()
            }
        case "shape":
            return {**tensors, key: np.zeros((3, 9, 3, 3), np.float32)}
        case "half":
            return {k: v for k, v in tensors.items() if k != key}
        case "dora":
            return {**tensors, "lora_unet_conv_in.dora_scale": np.ones(8, np.float32)}
        case "empty":
            return {}
        case "vae":
            return {"first_stage_model.encoder.conv_in.weight": np.ones(8, np.float32)}


@pytest.mark.parametrize(
    "name, said",
    [
        ("unknown", r"1 of \d+ modules are not in the model, such as lora_unet_conv_inn; give"),
        ("shape", r"conv_in is for a weight of shape \[8, 9, 3, 3\], the model's has \[8, 4, 3, 3"),
        ("half", "lora_unet_conv_in lacks lora_down"), ("dora", "conv_in.dora_scale' is of no"),
        ("empty", "holds no tensors"), ("vae", "is of no plain LoRA"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, said, model, additions, tmp_path):
    lora.write(tmp_path, additions)
    tensors = _broken(safetensors.load_file(tmp_path / lora.KOHYA_FILE), name)
    path = tmp_path / "broken.safetensors"
    safetensors.save_file(tensors, path)
    with pytest.raises(UserError, match=said) as error:
        lora.apply(model, path, 1.0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(model, additions, tmp_path):
    with pytest.raises(UserError, match=r"lora\.pt is not a .safetensors file"):
        lora.apply(model, tmp_path / "lora.pt", 1.0)
    with pytest.raises(UserError, match="cannot read .*No such file"):
        lora.apply(model, tmp_path / "lora.safetensors", 1.0)
    lora.write(tmp_path, additions)
    path = tmp_path / lora.DIFFUSERS_FILE
    tensors = safetensors.load_file(path)
    safetensors.save_file(tensors, path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="lora_adapter_metadata is not JSON"):
        lora.apply(model, path, 1.0)


def test_files_are_written_whole_or_not_at_all(additions, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match=r"cannot write .*file/lora: Not a directory"):
        lora.write(blocked / "lora", additions)
    lora.write(tmp_path / "lora", additions, dtype=np.float16)
    files = sorted(path.name for path in (tmp_path / "lora").iterdir())
    assert files == sorted([lora.DIFFUSERS_FILE, lora.KOHYA_FILE])
    header = (tmp_path / "lora" / files[0]).read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}


@pytest.mark.parametrize("spelling", ["ours", "ldm"])
def test_diffusers_knows_every_kohya_name_of_sdxl(spelling):
    """At real size; nothing is allocated."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(SDXL)
    modules = [
        name
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    halves = {
        f"{module}.{half}.weight": np.zeros((1, 1), np.float32)
        for module in modules
        for half in (lora_tree.DOWN, lora_tree.UP)
    }
    ldm = ldm_names.unet((2, 2, 2), (True, True, False)) if spelling == "ldm" else {}
    renamed = {ldm_names.rename(name, ldm): tensor for name, tensor in halves.items()}
    state, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        {key: torch.tensor(tensor) for key, tensor in lora_names.to_kohya(renamed).items()},
        unet_config=theirs.config,
    )
    found = convert_unet_state_dict_to_peft(state)
    assert len(modules) == 794 and found.keys() == lora_names.to_diffusers(halves).keys()
