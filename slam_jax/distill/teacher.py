"""The teacher's way down a sub-path: one guided DDIM step, or several ("multiple estimation")."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slam_jax.diffusion import guidance, solver
from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.shapes import Conditioning, Latent, Timestep


def walk(
    teacher: Callable[[Latent, Timestep, Conditioning], Latent],
    x_t: Latent,
    t: Timestep,
    text: Conditioning,
    null_text: guidance.NullText,
    w: float,
    schedule: Schedule,
    prediction: Prediction,
    length: int,
    stride: int,
) -> tuple[Latent, Timestep]:
    """(x_s, s) with s = max(t - length, 0), by length / stride guided DDIM steps (METHOD.md §1.9).

    `stride` divides `length`; equal, they give the one step of the released code. A sample that
    reaches time 0 early rests there. w = 0 is conditional only.
    """
    assert length % stride == 0, (length, stride)

    def step(_, carry):
        x, q = carry
        q_next = jnp.maximum(q - stride, 0)
        x_0hat, eps = guidance.guided(teacher, x, q, text, null_text, w, schedule, prediction)
        x_next = solver.ddim_step(x_0hat, eps, *schedule(q_next))
        return jax.vmap(jnp.where)(q > 0, x_next, x), q_next

    return jax.lax.fori_loop(0, length // stride, step, (x_t, t))
