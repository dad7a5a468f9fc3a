"""Classifier-free guidance in the LCM convention: weight w = 0 is the conditional prediction.

The scale that Stable Diffusion pipelines call guidance_scale is w + 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.shapes import Coeff, Conditioning, Guidance, Latent, SDXLText, Time, Timestep

# What is guided away from: one for each example, or one for all.
NullText = Float[Array, "#B L D"] | SDXLText


def cfg(
    cond: Shaped[Array, "*shape"], uncond: Shaped[Array, "*shape"], w: Guidance
) -> Shaped[Array, "*shape"]:
    """cond + w (cond - uncond); w = 0 is conditional only (METHOD.md §1.8)."""
    return cond + w * (cond - uncond)


def guided(
    teacher: Callable[[Latent, Timestep, Conditioning], Latent],
    x: Latent,
    t: Timestep,
    text: Conditioning,
    null_text: NullText,
    w: Guidance,
    schedule: Schedule,
    prediction: Prediction,
) -> tuple[Latent, Latent]:
    """The teacher's guided (x_0hat, eps) at (x, t), from one call of batch 2B.

    w = 0 is conditional only.
    """
    return guided_at(teacher, x, t, text, null_text, w, *schedule(t), prediction)


def guided_at(
    teacher: Callable[[Latent, Time, Conditioning], Latent],
    x: Latent,
    t: Time,
    text: Conditioning,
    null_text: NullText,
    w: Guidance,
    alpha: Coeff,
    sigma: Coeff,
    prediction: Prediction,
) -> tuple[Latent, Latent]:
    """The same at levels that are given, for a time between two of the schedule's.

    An SDXLText has the same sizes with and without the caption: null_text's time_ids are not read.
    """
    if isinstance(text, SDXLText):
        null_text = null_text._replace(time_ids=text.time_ids)
    both_text = jax.tree.map(
        lambda cond, null: _beside(cond, jnp.broadcast_to(null, cond.shape)), text, null_text
    )
    x, t, alpha, sigma = (_beside(each, each) for each in (x, t, alpha, sigma))
    output = teacher(x, t, both_text)
    x_0hat = prediction.to_x0(x, output, alpha, sigma)
    eps = prediction.to_eps(x, output, alpha, sigma)
    return cfg(*_apart(x_0hat), w), cfg(*_apart(eps), w)


def _beside(
    cond: Shaped[Array, "B *shape"], uncond: Shaped[Array, "B *shape"]
) -> Shaped[Array, "B2 *shape"]:
    """Each example's two, one after the other: devices that share a batch exchange nothing."""
    return jax.lax.collapse(jnp.stack([cond, uncond], axis=1), 0, 2)


def _apart(
    both: Shaped[Array, "B2 *shape"],
) -> tuple[Shaped[Array, "B *shape"], Shaped[Array, "B *shape"]]:
    return both[::2], both[1::2]
