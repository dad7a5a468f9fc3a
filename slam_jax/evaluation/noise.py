"""Noise that belongs to an image, whatever batch, device or host draws it."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from slam_jax.shapes import PRNGKey

Noise = Float[np.ndarray, "S B h w C"]


def keys(key: PRNGKey, numbers: np.ndarray) -> Key[Array, "B"]:
    """A key for each image, from its number."""
    return jax.vmap(partial(jax.random.fold_in, key))(jax.device_put(numbers.astype(np.uint32)))


def of_images(
    seed: int, num_steps: int, latent_shape: tuple[int, int, int]
) -> Callable[[np.ndarray], Noise]:
    """(numbers of images) -> their noise, normal, from (seed, number) alone.

    The first steps' noise is the same whatever num_steps.
    """
    draw = jax.jit(jax.vmap(
        lambda key: jax.random.normal(key, (num_steps, *latent_shape)), out_axes=1
    ))  # fmt: skip
    return lambda numbers: jax.device_get(draw(keys(jax.random.key(seed), numbers)))
