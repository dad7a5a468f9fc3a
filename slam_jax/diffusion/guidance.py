"""Classifier-free guidance in the LCM convention: weight w = 0 is the conditional prediction.

The scale that Stable Diffusion pipelines call guidance_scale is w + 1.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.shapes import Latent, Text, Timestep

# The empty prompt: one for each example, or one for all.
NullText = Float[Array, "#B L D"]


def cfg(
    cond: Shaped[Array, "*shape"], uncond: Shaped[Array, "*shape"], w: float
) -> Shaped[Array, "*shape"]:
    """cond + w (cond - uncond); w = 0 is conditional only (METHOD.md §1.8)."""
    return cond + w * (cond - uncond)


def guided(
    teacher: Callable[[Latent, Timestep, Text], Latent],
    x: Latent,
    t: Timestep,
    text: Text,
    null_text: NullText,
    w: float,
    schedule: Schedule,
    prediction: Prediction,
) -> tuple[Latent, Latent]:
    """The teacher's guided (x_0hat, eps) at (x, t), from one call of batch 2B.

    The first half of that batch is the conditional one; w = 0 is conditional only.
    """
    both_x, both_t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
    both_text = jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)])
    output = teacher(both_x, both_t, both_text)
    alpha, sigma = schedule(both_t)
    x_0hat = prediction.to_x0(both_x, output, alpha, sigma)
    eps = prediction.to_eps(both_x, output, alpha, sigma)
    return cfg(*jnp.split(x_0hat, 2), w), cfg(*jnp.split(eps, 2), w)
