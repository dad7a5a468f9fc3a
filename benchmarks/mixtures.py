"""Gaussian mixtures, whose noise is known exactly, and the energy distance between samples."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slam_jax.diffusion import schedule

_SPREAD = 0.15


class Mixture(NamedTuple):
    """Equal shares of K Gaussians in D dimensions."""

    means: Float[Array, "K D"]
    spread: float  # standard deviation of each, in every direction


def make(dim: int) -> Mixture:
    """8 modes: on a ring in 2-D, at random elsewhere; root mean square radius sqrt(2 D)."""
    if dim == 2:
        angle = 2 * np.pi * np.arange(8) / 8
        return Mixture(jnp.asarray(2.0 * np.stack([np.cos(angle), np.sin(angle)], 1)), _SPREAD)
    means = np.random.default_rng(0).normal(size=(8, dim)) * np.sqrt(2.0)
    return Mixture(jnp.asarray(means), _SPREAD)


def draw(data: Mixture, key, count: int):
    """[count, 1, 1, D] of the mixture."""
    mode_key, noise_key = jax.random.split(key)
    mode = jax.random.randint(mode_key, (count,), 0, data.means.shape[0])
    noise = jax.random.normal(noise_key, (count, 1, 1, data.means.shape[1]))
    return data.means[mode][:, None, None] + data.spread * noise


def exact_noise(data: Mixture, levels: schedule.Schedule, x, t, _text):
    """E[noise | x_t = x], from the mixture's own density."""
    alpha, sigma = levels(t)
    variance = (alpha * data.spread) ** 2 + sigma**2
    away = x - alpha * data.means[None, None]  # [B, 1, K, D]
    share = nn.softmax(-0.5 * jnp.sum(away**2, -1, keepdims=True) / variance, axis=2)
    return sigma * jnp.sum(share * away, axis=2, keepdims=True) / variance


def mean_distance(x, y):
    """E|X - Y|, X and Y independent: [N, D], [M, D]."""

    def from_one(row):
        return jnp.sum(jnp.linalg.norm(y - row[None], axis=-1))

    return jnp.sum(jax.lax.map(from_one, x, batch_size=32)) / (x.shape[0] * y.shape[0])


def energy_distance(x, y, within_y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: nothing is paired with itself."""
    return 2.0 * mean_distance(x, y) - within(x) - within_y


def within(x):
    """E|X - X'| of two different rows of x [N, D]."""
    return mean_distance(x, x) * x.shape[0] / (x.shape[0] - 1)
