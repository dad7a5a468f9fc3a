"""Single-file checkpoints: diffusers reads what is written, and so do we; names at real sizes."""

import tracemalloc

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils

from slam_jax.errors import UserError
from slam_jax.weights import ldm, pretrained, single_file, tensorfile, translate

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


# Small models: SD 1.x and SDXL are the pipelines of conftest.py.


@pytest.fixture(scope="module")
def sd2(pipeline) -> diffusers.StableDiffusionPipeline:
    """A v-prediction SD 2.x of as many text layers as real ones have, attention on odd levels."""
    torch.manual_seed(1)
    config = dict(num_hidden_layers=23, intermediate_size=8, hidden_act="gelu")
    config = {**pipeline.text_encoder.config.to_dict(), **config}
    nets = dict(
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=(2, 4, 4),
            norm_num_groups=4,
            use_linear_projection=True,
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            sample_size=32,
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config)),
    )
    for net in nets.values():
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    return diffusers.StableDiffusionPipeline(
        **nets,
        tokenizer=pipeline.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def sd2_folder(sd2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd2") / "model"
    sd2.save_pretrained(folder)
    return folder


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def family(request):
    """(torch's pipeline, its folder)"""
    names = {
        "sd1": ("pipeline", "torch_folder"),
        "sd2": ("sd2", "sd2_folder"),
        "sdxl": ("sdxl_pipeline", "sdxl_folder"),
    }[request.param]
    return tuple(map(request.getfixturevalue, names))


@pytest.fixture(scope="module")
def file(torch_folder, tmp_path_factory):
    """The SD 1.x as a single file. Read only."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    single_file.write(path, pretrained.read(torch_folder))
    return path


def configs_only(folder, target):
    """What `hf download --include "*.json" "*/merges.txt"` leaves of `folder`."""
    for path in folder.rglob("*"):
        if path.suffix == ".json" or path.name == "merges.txt":
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def params_of(model: pretrained.Pretrained) -> dict:
    parts = [part for part in PARTS if getattr(model, part) is not None]
    return {part: getattr(model, part).params for part in parts}


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("at a", num_inference_steps=2, generator=generator, output_type="np").images


def test_diffusers_reads_what_is_written_and_draws_the_same(family, tmp_path):
    pipe, folder = family
    single_file.write(tmp_path / "model.safetensors", pretrained.read(folder))
    read = type(pipe).from_single_file(
        str(tmp_path / "model.safetensors"),
        config=str(configs_only(folder, tmp_path / "configs")),
        local_files_only=True,
    )
    parts = [part for part in PARTS if part in pipe.components]
    assert parts == [part for part in PARTS if part in read.components]
    for part in parts:
        ours, theirs = getattr(read, part).state_dict(), getattr(pipe, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), (part, name)
    np.testing.assert_array_equal(draw(read), draw(pipe))
    assert [path.name for path in tmp_path.iterdir()].count("model.safetensors") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_reads_back_what_is_written_without_the_folders_weights(family, tmp_path):
    _, folder = family
    model = pretrained.read(folder)
    single_file.write(tmp_path / "model.safetensors", model)
    configs = configs_only(folder, tmp_path / "configs")
    assert not list(configs.rglob("*.safetensors"))
    again = pretrained.read(tmp_path / "model.safetensors", config=configs)
    assert_same(params_of(again), params_of(model))
    assert again.scheduler == model.scheduler and again.unet.config == model.unet.config
    assert again.tokenizer == configs / "tokenizer"
    assert again.tokenizer_2 == (model.tokenizer_2 and configs / "tokenizer_2")
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(params_of(again)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(torch_folder, tmp_path, dtype):
    model = pretrained.read(torch_folder)
    single_file.write(tmp_path / "half.safetensors", model, dtype=dtype)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params_of(model))
    read = pretrained.read(tmp_path / "half.safetensors", config=torch_folder, dtype=None)
    assert_same(params_of(read), cast)
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), cast)
    read = pretrained.read(tmp_path / "half.safetensors", config=torch_folder)
    assert_same(params_of(read), in_float32)


EXTRAS = {
    "sd1": dict(
        alphas_cumprod=torch.ones(1000), betas=torch.ones(1000), lvlb_weights=torch.ones(1000)
    )
    | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
        "model_ema.diffusion_modelinput_blocks00bias": torch.ones(8),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
    },
    "sd2": {
        "sqrt_recipm1_alphas_cumprod": torch.ones(1000),
        "cond_stage_model.model.text_projection": torch.ones(16, 16),
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
        # Real files have weights in the layer that is not used.
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.ones(16),
    },
    "sdxl": {
        "denoiser.sigmas": torch.ones(1000),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    },
}


def test_what_other_programs_add_is_passed_over(family, request, tmp_path):
    _, folder = family
    model, path = pretrained.read(folder), tmp_path / "model.safetensors"
    single_file.write(path, model)
    extras = EXTRAS[request.node.callspec.params["family"]]
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **extras}, path)
    assert_same(params_of(pretrained.read(path, config=folder)), params_of(model))


def test_reads_the_older_names_of_the_text_encoder(file, torch_folder, tmp_path):
    old = "cond_stage_model.transformer."
    tensors = safetensors.torch.load_file(file)
    tensors = {key.replace(f"{old}text_model.", old): tensors[key] for key in tensors}
    assert f"{old}embeddings.token_embedding.weight" in tensors
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors")
    read = pretrained.read(tmp_path / "old.safetensors", config=torch_folder)
    assert_same(params_of(read), params_of(pretrained.read(torch_folder)))


def test_the_unused_layer_is_the_identity():
    """Of a loader that runs all the layers of the file."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_attention_heads=2,
        hidden_act="gelu", eos_token_id=1,
    )  # fmt: skip
    two, three = (
        transformers.CLIPTextModel(transformers.CLIPTextConfig(num_hidden_layers=n, **config))
        for n in (2, 3)
    )
    written = ldm.to_ldm(
        {f"text_model.{name}": tensor.numpy() for name, tensor in two.state_dict().items()},
        ldm.text_layout(ldm.SD_2, "text_encoder", 2),
    )
    tensors = {key: torch.tensor(np.asarray(written[key])) for key in written}
    converted = single_file_utils.convert_open_clip_checkpoint(three, tensors)
    three.load_state_dict({k.removeprefix("text_model."): v for k, v in converted.items()})
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(three(ids).last_hidden_state, two(ids).last_hidden_state)


def test_fused_tensors_are_read_and_written_one_at_a_time(tmp_path):
    config = dict(
        vocab_size=8, hidden_size=256, intermediate_size=8, num_hidden_layers=12,
        num_attention_heads=2, max_position_embeddings=8, layer_norm_eps=1e-5, hidden_act="gelu",
    )  # fmt: skip
    shapes = pretrained.TEXT_ENCODER.template(config)
    torch_shapes = translate.torch_shapes(shapes)
    layout = ldm.text_layout(ldm.SD_2, "text_encoder", 12)
    tensors = {name: np.ones(shape, np.float32) for name, shape in torch_shapes.items()}
    size, fused = sum(t.nbytes for t in tensors.values()), 3 * 256 * 256 * 4
    tracemalloc.start()
    tensorfile.write(tmp_path / "file", ldm.to_ldm(tensors, layout))
    assert tracemalloc.get_traced_memory()[1] < 4 * fused
    tracemalloc.reset_peak()
    tensors = ldm.from_ldm(tensorfile.read(tmp_path / "file"), torch_shapes, layout)
    params = translate.to_params(tensors, shapes, "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(jax.tree.leaves(params)) == len(torch_shapes)
    assert size < peak < size + 3 * fused


# Real sizes, names and shapes only.


UNET_1 = dict(cross_attention_dim=768, attention_head_dim=8)
UNET_2 = dict(
    cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
)
UNET_XL = dict(
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    transformer_layers_per_block=[1, 2, 10],
    cross_attention_dim=2048,
    attention_head_dim=[5, 10, 20],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)


CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
OPEN_CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23)
OPEN_CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, projection_dim=1280
)


def on_meta(
    unet: dict, text_encoder: dict, text_encoder_2: dict | None
) -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        nets = dict(
            unet=diffusers.UNet2DConditionModel(**unet),
            vae=diffusers.AutoencoderKL(**VAE),
            text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_encoder)),
        )
        if text_encoder_2 is not None:
            config = transformers.CLIPTextConfig(
                architectures=["CLIPTextModelWithProjection"], **text_encoder_2
            )
            nets["text_encoder_2"] = transformers.CLIPTextModelWithProjection(config)
    return nets


def shapes_of(part: str, net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """By the hub's names."""
    prefix = "text_model." if part == "text_encoder" else ""
    return {prefix + name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def written(family: ldm.Family, nets: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The single file's tensors, without numbers."""
    configs = {
        part: net.config.to_dict() if part.startswith("text") else dict(net.config)
        for part, net in nets.items()
    }
    tensors = {}
    for part, layout in ldm.layouts(family, configs).items():
        shapes = shapes_of(part, nets[part])
        empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        tensors |= ldm.to_ldm(empty, layout)
    return {key: torch.empty(tensor.shape, device="meta") for key, tensor in tensors.items()}


def converted(tensors: dict[str, torch.Tensor], nets: dict[str, torch.nn.Module]):
    """By part: what diffusers makes of a single file's tensors."""
    theirs = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(tensors, nets["unet"].config),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(tensors, nets["vae"].config),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(tensors),
    }
    if single_file_utils.is_open_clip_model(tensors):
        net = nets["text_encoder"]
        theirs["text_encoder"] = single_file_utils.convert_open_clip_checkpoint(net, tensors)
    if "text_encoder_2" in nets:
        theirs["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            nets["text_encoder_2"], tensors, prefix="conditioner.embedders.1.model."
        )
    return theirs


# As published files have them by github.com/arenasys/stable-diffusion-webui-model-toolkit, which
# lists every tensor in components/. What is left out is no weight of ours: position_ids,
# logit_scale, and OpenCLIP-H's text_projection.
REAL = {
    "sd1": (ldm.SD_1, (UNET_1, CLIP_L, None), "v1", 1130),
    "sd2": (ldm.SD_2, (UNET_2, OPEN_CLIP_H, None), "v2", 1226),
    "sdxl": (ldm.SDXL, (UNET_XL, CLIP_L, OPEN_CLIP_G), "xl_base", 2513),
}
KNOWN = {
    "sd1": {
        "model.diffusion_model.time_embed.0.weight": [1280, 320],
        "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320, 1, 1],
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
        "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
        "model.diffusion_model.input_blocks.4.0.emb_layers.1.weight": [640, 1280],
        "model.diffusion_model.middle_block.1.proj_out.weight": [1280, 1280, 1, 1],
        "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.8.2.conv.weight": [640, 640, 3, 3],
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": [320, 640, 1, 1],
        "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
        "first_stage_model.encoder.down.0.downsample.conv.weight": [128, 128, 3, 3],
        "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
        "first_stage_model.decoder.up.3.upsample.conv.bias": [512],
        "first_stage_model.quant_conv.weight": [8, 8, 1, 1],
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
    },
    "sd2": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320],
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": [1280, 1024],
        "cond_stage_model.model.positional_embedding": [77, 1024],
        "cond_stage_model.model.token_embedding.weight": [49408, 1024],
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": [3072],
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": [3072, 1024],
        "cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight": [4096, 1024],
        "cond_stage_model.model.ln_final.bias": [1024],
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
        "model.diffusion_model.label_emb.0.2.bias": [1280],
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight":
            [1280, 2048],
        "model.diffusion_model.output_blocks.2.2.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.3.1.proj_in.weight": [640, 640],
        "model.diffusion_model.output_blocks.5.0.skip_connection.weight": [640, 960, 1, 1],
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": [320, 640, 1, 1],
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [768],
        "conditioner.embedders.1.model.text_projection": [1280, 1280],
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
    },
}  # fmt: skip


@pytest.mark.parametrize("real", REAL)
def test_real_sizes_have_the_published_names_and_shapes(real):
    family, configs, kind, num_tensors = REAL[real]
    nets = on_meta(*configs)
    tensors = written(family, nets)
    assert len(tensors) == num_tensors
    assert {key: list(tensors[key].shape) for key in KNOWN[real]} == KNOWN[real]
    assert single_file_utils.infer_diffusers_model_type(tensors) == kind
    for part, theirs in converted(tensors, nets).items():
        found = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        assert found == shapes_of(part, nets[part])


# What is refused: each time one line, naming file and value.


def refusal(path, config) -> str:
    with pytest.raises(UserError) as caught:
        pretrained.read(path, config=config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(file, path, **changes):
    """A copy of `file` at `path`; None takes a tensor out."""
    tensors = {**safetensors.torch.load_file(file), **changes}
    safetensors.torch.save_file({k: v for k, v in tensors.items() if v is not None}, path)
    return path


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
Q = "first_stage_model.decoder.mid.attn_1.q.weight"


BROKEN = {
    f" lacks tensor '{CONV_IN}'; the file must be of the architecture that ": {CONV_IN: None},
    f" lacks tensor '{Q}' (and 1 more); ": {CONV_IN: None, Q: None},
    # An inpainting UNet.
    f": tensor '{CONV_IN}' has shape [8, 9, 3, 3], config.json asks for [8, 4, 3, 3]; ": {
        CONV_IN: torch.ones(8, 9, 3, 3)
    },
    f": tensor '{Q}' has shape [16, 16, 3, 3], ": {Q: torch.ones(16, 16, 3, 3)},
    ": tensor 'edm_mean' is unknown; ": {"edm_mean": torch.ones(4)},
    ": tensor 'model.diffusion_model.input_blocks.9.0.op.bias' is unknown; ": {
        "model.diffusion_model.input_blocks.9.0.op.bias": torch.ones(1)
    },
    f": tensor '{CONV_IN}' is I8": {CONV_IN: torch.ones(8, 4, 3, 3, dtype=torch.int8)},
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_tensors_are_named_with_their_file(file, torch_folder, tmp_path, words):
    path = changed(file, tmp_path / "broken.safetensors", **BROKEN[words])
    assert f"{path}{words}" in refusal(path, torch_folder)


def test_a_truncated_file_is_refused(file, torch_folder, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    message = refusal(tmp_path / "cut.safetensors", torch_folder)
    assert message.startswith(f"{tmp_path}/cut.safetensors is cut short")


def test_a_lora_is_no_model(torch_folder, tmp_path):
    path = tmp_path / "lora.safetensors"
    key = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    safetensors.torch.save_file({key: torch.ones(4, 8)}, path)
    assert refusal(path, torch_folder).startswith(f"{path} is a LoRA, not a model; ")


def test_a_part_of_a_folder_is_no_model(torch_folder):
    path = torch_folder / "unet" / "diffusion_pytorch_model.safetensors"
    message = refusal(path, torch_folder)
    assert message.startswith(f"{path} holds no model") and "'conv_in.bias'" in message


def test_the_configs_must_be_given(file):
    message = refusal(file, None)
    assert f"{file} holds the weights of a Stable Diffusion 1.x model, but no configs" in message
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include" in message


def test_the_configs_must_be_of_the_same_family(file, torch_folder, sd2_folder, tmp_path):
    message = refusal(file, sd2_folder)
    assert (
        f"{file} is a Stable Diffusion 1.x model and {sd2_folder} a Stable Diffusion 2" in message
    )
    single_file.write(tmp_path / "sd2.safetensors", pretrained.read(sd2_folder))
    message = refusal(tmp_path / "sd2.safetensors", torch_folder)
    assert f"sd2.safetensors is a Stable Diffusion 2.x model and {torch_folder} a " in message


def test_the_configs_must_be_those_of_a_model(file, tmp_path):
    assert f"{tmp_path} holds no model_index.json" in refusal(file, tmp_path)
    assert "there is no folder org/name" in refusal(file, "org/name")


def test_folders_take_no_configs_and_files_no_variant(file, torch_folder):
    assert f"{torch_folder} is no single file" in refusal(torch_folder, torch_folder)
    (file.parent / "model.ckpt").write_bytes(b"")
    assert "is a pickle" in refusal(file.parent / "model.ckpt", torch_folder)
    with pytest.raises(UserError, match="is one file, without variants; leave out .* 'fp16'"):
        pretrained.read(file, config=torch_folder, variant="fp16")


# Writing.


def test_a_failed_write_leaves_what_was_there(torch_folder, tmp_path, monkeypatch):
    model, path = pretrained.read(torch_folder), tmp_path / "model.safetensors"
    path.write_text("old")
    big = jax.tree.map(lambda leaf: leaf + 7e4, model.vae.params)
    with pytest.raises(UserError, match="first_stage_model.* too large for float16"):
        single_file.write(path, model._replace(vae=model.vae._replace(params=big)), dtype="float16")
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile.os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            single_file.write(path, model)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    single_file.write(path, model)
    assert len(tensorfile.read(path)) > 100 and list(tmp_path.iterdir()) == [path]


def interrupt(*_args):
    raise KeyboardInterrupt


def test_places_that_cannot_be_written_are_named(torch_folder, tmp_path):
    model = pretrained.read(torch_folder)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/none/x.safetensors: No such"):
        single_file.write(tmp_path / "none" / "x.safetensors", model)
    with pytest.raises(UserError, match=f"{tmp_path}/model.ckpt must end in .safetensors"):
        single_file.write(tmp_path / "model.ckpt", model)


def test_a_unet_that_takes_gamma_has_no_place(torch_folder, tmp_path):
    model = pretrained.read(torch_folder)
    config = {**model.unet.config, "time_cond_proj_dim": 256}
    with pytest.raises(AssertionError, match="fold gamma"):
        single_file.write(
            tmp_path / "x.safetensors", model._replace(unet=model.unet._replace(config=config))
        )
