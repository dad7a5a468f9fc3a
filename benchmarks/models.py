"""The networks of a Stable Diffusion in two sizes, with random weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slam_jax.diffusion import parameterization, schedule
from slam_jax.distill import step
from slam_jax.nets import clip, unet, vae

GAMMA_DIM = 256
SCALING_FACTOR = 0.18215
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


class Size(NamedTuple):
    """What a model folder's config.json files say of the networks, and the image's side."""

    unet: dict
    vae: dict
    text_encoder: dict
    image_size: int


TINY = Size(
    unet={
        "block_out_channels": [48, 96],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
    },
    vae={"block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8},
    text_encoder={
        "vocab_size": 700,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
    image_size=32,
)
SD15 = Size(
    unet={"attention_head_dim": 8, "cross_attention_dim": 768},
    vae={"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
    image_size=512,
)
SIZES = {"tiny": TINY, "sd15": SD15}


class Models(NamedTuple):
    """The four modules, all of one compute dtype."""

    student: unet.UNet2DConditionModel
    teacher: unet.UNet2DConditionModel
    vae: vae.AutoencoderKL
    text_encoder: clip.CLIPTextModel


def build(size: Size, dtype: DTypeLike, remat: bool) -> Models:
    """The modules of a size; the student alone is differentiated, so it alone takes remat."""
    student = {**size.unet, "time_cond_proj_dim": GAMMA_DIM}
    return Models(
        student=unet.from_config(student, dtype=dtype, remat=remat),
        teacher=unet.from_config(size.unet, dtype=dtype),
        vae=vae.from_config(size.vae, dtype=dtype),
        text_encoder=clip.from_config(size.text_encoder, dtype=dtype),
    )


def diffusion() -> tuple[schedule.Schedule, parameterization.Prediction]:
    """Stable Diffusion 1.5's schedule and parameterization."""
    return schedule.from_config(SCHEDULE), parameterization.prediction_from_config(SCHEDULE)


def latent_shape(size: Size) -> tuple[int, int, int]:
    """[h, w, C] of one latent."""
    side = size.image_size // 2 ** (len(size.vae["block_out_channels"]) - 1)
    return side, side, 4


def parameter_shapes(models: Models, size: Size) -> dict[str, Any]:
    """Trees of ShapeDtypeStruct, one for each network; nothing is allocated."""
    side = size.image_size
    sample = _floats(1, *latent_shape(size))
    text = _floats(1, 77, size.unet["cross_attention_dim"])
    return {
        "student": _shapes(models.student, sample, _integers(1), text, _floats(1, GAMMA_DIM)),
        "teacher": _shapes(models.teacher, sample, _integers(1), text),
        "vae": _shapes(models.vae, _floats(1, side, side, 3)),
        "text_encoder": _shapes(models.text_encoder, _integers(1, 77)),
    }


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _shapes(net: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(lambda *x: net.init(jax.random.key(0), *x), *inputs)["params"]


def random_parameters(shapes: Any) -> Any:
    """Numbers of mean 0 and deviation 1 / sqrt(fan in): activations neither vanish nor grow.

    Drawn on the host: on a device each of the hundred shapes would be compiled first.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.random(leaf.shape, np.float32)
        values -= np.float32(0.5)
        values *= np.float32((12 / np.prod(leaf.shape[:-1])) ** 0.5)
        return values

    return jax.tree.map(draw, shapes)


def student(models: Models) -> Callable:
    """(params, x, t, text, gamma) -> raw output."""

    def call(params, x, t, text, gamma):
        embedding = parameterization.gamma_embedding(gamma, GAMMA_DIM)
        return models.student.apply({"params": params}, x, t, text, embedding)

    return call


def encode_text(models: Models) -> Callable:
    """(params, batch) -> text."""
    return lambda params, batch: models.text_encoder.apply({"params": params}, batch["input_ids"])


def decode(models: Models) -> Callable:
    """(params, scaled latent) -> image in about [-1, 1]."""

    def call(params, latent):
        latent = latent / SCALING_FACTOR
        return models.vae.apply({"params": params}, latent, method=models.vae.decode)

    return call


def training_nets(models: Models) -> step.Nets:
    """The networks as the train step takes them."""

    def teacher(params, x, t, text):
        return models.teacher.apply({"params": params}, x, t, text)

    def encode_image(params, batch, posterior_key):
        image = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        posterior = models.vae.apply({"params": params}, image, method=models.vae.encode)
        noise = jax.random.normal(posterior_key, posterior.mean.shape)
        return SCALING_FACTOR * (posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise)

    return step.Nets(student(models), step.all_trained, teacher, encode_image, encode_text(models))
