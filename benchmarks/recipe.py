"""The train step that is measured: SPLAM as released, its inputs, and what it draws."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks import models
from slam_jax.diffusion import solver, subpath
from slam_jax.distill import gamma, loss, optimizer, state, step
from slam_jax.shapes import Latent

LEARNING_RATE, CLIP_NORM, EMA_RATE, HUBER_C, W = 8e-6, 1.0, 0.95, 1e-3, 8.0
SPACING = 20  # of the times at which sub-paths start, and of the teacher's solver
_ADAMW = optimizer.adamw(LEARNING_RATE, 0, CLIP_NORM, 0.0, 0.9, 0.999, 1e-8)
_NUM_STEPS, _SEED = 1000, 0


def method(size: models.Size, solver_steps: int) -> loss.Method:
    """SPLAM as released, with sub-paths of `solver_steps` steps of the teacher's solver."""
    return loss.checked(
        loss.Method(
            *models.diffusion(size), solver.start_grid(1000 // SPACING, 1000),
            SPACING * solver_steps, SPACING, W, subpath.told_t(subpath.sigma_markov),
            loss.pseudo_huber(HUBER_C), gamma.uniform,
        )
    )  # fmt: skip


def train_step(
    nets: step.Nets, chosen: loss.Method, over_devices: Callable[[Callable], Callable] | None = None
) -> Any:
    """(state, frozen, batch, key) -> (state, metrics)."""
    return partial(
        step.train_step, nets=nets, method=chosen, optimizer=_ADAMW, ema_rate=EMA_RATE,
        num_steps=_NUM_STEPS, max_grad_norm=1e3, over_devices=over_devices,
    )  # fmt: skip


def arguments(
    size: models.Size, nets: step.Nets, dtype: DTypeLike, examples: dict, parameters: dict
) -> tuple:
    """(state, frozen, batch, key); parameters: float32, like models.parameter_shapes.

    examples: [B, ...] arrays, which become one microbatch.
    """
    start = models.start(size, dtype, parameters)
    text = models.null_text(size, nets)
    frozen = state.Frozen(start.teacher, start.vae, start.text_encoder, text)
    first = jax.jit(state.init, static_argnums=1)(start.student, _ADAMW)
    return first, frozen, {name: x[None] for name, x in examples.items()}, jax.random.key(_SEED)


def draws(number: int, x_0: Latent, chosen: loss.Method) -> tuple[Latent, loss.Draw]:
    """(noise of the posterior, the rest) of step `number`, as step.train_step draws them."""
    step_key = jax.random.fold_in(jax.random.key(_SEED), number)
    posterior_key, draw_key = jax.random.split(jax.random.fold_in(step_key, 0))
    posterior = jax.random.normal(posterior_key, x_0.shape)
    return posterior, loss.draw_subpath(draw_key, x_0, chosen, jnp.float32(number / _NUM_STEPS))
