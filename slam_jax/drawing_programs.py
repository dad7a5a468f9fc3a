"""Programs that draw, as functions of arrays: what interactive.py compiles and keeps.

Each function here makes one, from a model without its parameters and other values that JSON can
hold, and from nothing else: runtime/executables.py knows a program by them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, UInt8, UInt32

from slam_jax import pipeline
from slam_jax.diffusion import parameterization, sampler, schedule
from slam_jax.nets import kernels
from slam_jax.runtime import apart
from slam_jax.shapes import Image, Pixels
from slam_jax.weights import pretrained

ORIGINAL_STEPS = 50
# Apart from those of the images, whose numbers are the first keys.
_POSTERIOR_STREAM = 2**32 - 1


class Seeds(NamedTuple):
    """What an image's noise is drawn from: a seed, and the image's number under that seed."""

    seed: UInt32[np.ndarray | Array, "B"]
    number: UInt32[np.ndarray | Array, "B"]


class Start(NamedTuple):
    """A picture to start from, and what its latents are drawn from."""

    picture: UInt8[np.ndarray | Array, "1 H W 3"]
    seeds: Seeds


class Drawn(NamedTuple):
    """The same images twice: as they are, in [0, 1], and of 8 bits."""

    images: Image
    pixels: Pixels


for _name, _type in (("Seeds", Seeds), ("Start", Start), ("Drawn", Drawn)):
    export.register_namedtuple_serialization(_type, serialized_name=f"slam_jax.{_name}")


def text(model: pretrained.Pretrained, dtype: str) -> Callable:
    """(text_params, tokens) -> what the UNet is told."""
    return pipeline.encode_text(model, pipeline.dtype(dtype))


def null_text(model: pretrained.Pretrained, dtype: str) -> Callable:
    """(text_params, the empty prompt's tokens) -> what guidance leads away from."""
    return pipeline.encode_null_text(model, pipeline.dtype(dtype))


def few_step(
    model: pretrained.Pretrained, dtype: str, attention: str, latent_shape: tuple[int, int, int]
) -> Callable[..., Drawn]:
    """(unet_params, vae_params, text, noise, times [S], count, begin) -> images.

    noise: [S, B, h, w, C], or Seeds. count: how many of the times are visited. begin: None or a
    Start.
    """
    computed = pipeline.dtype(dtype)
    student = pipeline.student(
        model.unet.config, computed, attend=kernels.by_name(attention, apart.on_own_examples)
    )
    decode, *known = _shared(model, computed)
    encode = pipeline.encode_image(model.vae.config, computed)

    def draw(unet_params, vae_params, text, noise, times, count, begin) -> Drawn:
        if isinstance(noise, Seeds):
            noise = _noise(noise, (times.size, *latent_shape))
        start = None
        if begin is not None:
            keys = jax.vmap(_posterior_key)(*begin.seeds)
            picture = {"image": begin.picture}
            start = jax.vmap(lambda key: encode(vae_params, picture, key)[0])(keys)
        net = partial(student, unet_params)
        x_0 = sampler.consistency_sample(net, *known, times, noise, text, start, count)
        return _drawn(decode(vae_params, x_0))

    return draw


def guided(
    model: pretrained.Pretrained, dtype: str, attention: str, latent_shape: tuple[int, int, int],
    steps: int,
) -> Callable[..., Drawn]:  # fmt: skip
    """(unet_params, vae_params, text, null_text, noise, w) -> images, by DDIM.

    noise: [S, B, h, w, C], of which the first counts, or Seeds.
    """
    computed = pipeline.dtype(dtype)
    teacher = pipeline.teacher(
        model.unet.config, computed, kernels.by_name(attention, apart.on_own_examples)
    )
    shared = _shared(model, computed)

    def draw(unet_params, vae_params, text, null_text, noise, w) -> Drawn:
        if isinstance(noise, Seeds):
            noise = _noise(noise, (1, *latent_shape))
        sample = pipeline.ddim(teacher, *shared, steps, ORIGINAL_STEPS, w)
        return _drawn(sample(unet_params, vae_params, text, null_text, noise[0]))

    return draw


def _shared(model: pretrained.Pretrained, dtype: np.dtype) -> tuple:
    return (
        pipeline.decode(model.vae.config, dtype),
        schedule.from_config(model.scheduler),
        parameterization.prediction_from_config(model.scheduler),
    )


def _noise(seeds: Seeds, shape: tuple[int, ...]) -> Float[Array, "S B h w C"]:
    """As evaluation/noise.py draws it; the first steps' is the same whatever S."""

    def of_one(seed, number):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)

    return jax.vmap(of_one, out_axes=1)(*seeds)


def _posterior_key(seed: UInt32[Array, ""], number: UInt32[Array, ""]) -> jax.Array:
    stream = jax.random.fold_in(jax.random.key(seed), np.uint32(_POSTERIOR_STREAM))
    return jax.random.fold_in(stream, number)


def _drawn(images: Image) -> Drawn:
    images = images.astype(jnp.float32)
    return Drawn(images, jnp.round(255 * images).astype(jnp.uint8))
