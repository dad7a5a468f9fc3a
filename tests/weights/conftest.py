"""Small Stable Diffusion folders: torch's SD 1.5 and SDXL, and SD 1.5 as the hub has it."""

import json
import pathlib
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors import torch as safetensors_torch

# SD 1.5's own scheduler_config.json.
PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> diffusers.StableDiffusionPipeline:
    """A Stable Diffusion with every parameter drawn at random."""
    return diffusers.StableDiffusionPipeline(
        **randomised(unet=unet(), vae=vae(), text_encoder=text_encoder()),
        tokenizer=tokenizer(tmp_path_factory.mktemp("tokenizer")),
        scheduler=diffusers.DDIMScheduler.from_config(PNDM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def sdxl_pipeline(tmp_path_factory) -> diffusers.StableDiffusionXLPipeline:
    """An SDXL with every parameter drawn at random."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return diffusers.StableDiffusionXLPipeline(
        **randomised(
            unet=unet(**SDXL_UNET),
            vae=vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder_2(),
        ),
        tokenizer=tokenizer(folder),
        tokenizer_2=tokenizer(folder, pad_token="!"),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(PNDM),
        add_watermarker=False,
    )


def randomised(**nets: torch.nn.Module) -> dict[str, torch.nn.Module]:
    # With networks this small, torch's threads would only wait for each other.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for net in nets.values():
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return nets


def tokenizer(folder: pathlib.Path, **kwargs) -> transformers.CLIPTokenizer:
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77, **kwargs)


def vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "at</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
SDXL_UNET = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    cross_attention_dim=16 + 24,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 12,
)


def unet(**kwargs) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**UNET | kwargs)


def vae(**kwargs) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **kwargs,
    )


TEXT_ENCODER = dict(
    vocab_size=len(vocabulary()),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=16,
    bos_token_id=len(vocabulary()) - 2,
    eos_token_id=len(vocabulary()) - 1,
)


def text_encoder() -> transformers.CLIPTextModel:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER))


def text_encoder_2() -> transformers.CLIPTextModelWithProjection:
    other = dict(hidden_size=24, projection_dim=12, hidden_act="gelu", eos_token_id=2)
    config = transformers.CLIPTextConfig(**TEXT_ENCODER | other)
    return transformers.CLIPTextModelWithProjection(config)


@pytest.fixture(scope="session")
def torch_folder(pipeline, tmp_path_factory):
    """As the installed diffusers and transformers write it. Read only."""
    folder = tmp_path_factory.mktemp("torch") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(sdxl_pipeline, tmp_path_factory):
    """The same for SDXL. Read only."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    sdxl_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hub_folder(torch_folder, tmp_path_factory):
    """The same weights with the names, files and configs of SD 1.5 on the hub. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(torch_folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    safetensors_torch.save_file(tensors, path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors_torch.load_file(path)
    safetensors_torch.save_file(dict(map(as_before_diffusers_0_15, tensors.items())), path)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PNDM))
    return folder


def as_before_diffusers_0_15(item):
    """The VAE's attention matrices as 1x1 convolutions of the old names."""
    name, tensor = item
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new in old:
        if f".{new}." in name:
            name = name.replace(new, old[new])
            return name, tensor[..., None, None] if tensor.ndim == 2 else tensor
    return name, tensor


@pytest.fixture
def model(torch_folder, tmp_path):
    """A copy of torch_folder to break."""
    return shutil.copytree(torch_folder, tmp_path / "model")
