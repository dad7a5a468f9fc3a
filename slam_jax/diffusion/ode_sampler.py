"""Guided samplers of the probability-flow ODE, each one scan over its network calls.

Every one is a row of DDIM steps. The higher orders differ in the (x_0, noise) with which a step
is made: not those that the network just estimated, but corrected by what it estimated before.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from slam_jax.diffusion import guidance, solver, spacing
from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.shapes import Conditioning, Guidance, Latent, Time

# With zero terminal SNR diffusers takes this alpha for the last time, where it is none.
_LEAST_ALPHA = 2.0**-12


class Estimate(NamedTuple):
    """What is known of an x = alpha x_0 + sigma eps."""

    x_0: Latent
    eps: Latent


class Path(NamedTuple):
    """The N network calls of a sampler."""

    times: Real[Array, "N"]  # as the network is told
    alpha: Float[Array, "N"]
    sigma: Float[Array, "N"]
    weight: Float[Array, "N"]  # of the correction after each call, for Sampler.correct
    start: float  # the first x is so much noise


class Sampler(NamedTuple):
    """A solver of the ODE, whatever the network."""

    path: Callable[[int, Schedule, Mapping], Path]  # (steps, levels, scheduler config)
    # (estimate, the one remembered, weight, sigma / alpha) -> (to step with, to remember)
    correct: Callable[..., tuple[Estimate, Estimate]]
    network_calls: Callable[[int], int]  # steps -> calls for an image, guidance counted twice


def sample(
    teacher: Callable[[Latent, Time, Conditioning], Latent],
    prediction: Prediction,
    path: Path,
    correct: Callable[..., tuple[Estimate, Estimate]],
    x_T: Latent,
    text: Conditioning,
    null_text: guidance.NullText,
    w: Guidance,
) -> Latent:
    """From standard normal x_T along the path to x_0; w = 0 is conditional only."""
    batch = x_T.shape[0]

    def step(carry, inputs):
        estimate, memory = carry
        formed, time, alpha, sigma, weight = inputs
        x = solver.ddim_step(*estimate, *formed)
        levels = (jnp.full((batch, 1, 1, 1), level) for level in (alpha, sigma))
        estimate = guidance.guided_at(
            teacher, x, jnp.full((batch,), time), text, null_text, w, *levels, prediction
        )
        return correct(Estimate(*estimate), memory, weight, sigma / alpha), None

    # The first x is noise alone.
    formed = path.alpha.at[0].set(0.0), path.sigma.at[0].set(path.start)
    begin = Estimate(jnp.zeros_like(x_T), x_T)
    inputs = (formed, path.times, path.alpha, path.sigma, path.weight)
    (estimate, _), _ = jax.lax.scan(step, (begin, begin), inputs)
    return estimate.x_0


def uncorrected(
    estimate: Estimate, memory: Estimate, weight: Float[Array, ""], ratio: Float[Array, ""]
) -> tuple[Estimate, Estimate]:
    """Order 1: DDIM."""
    del weight, ratio
    return estimate, memory


def _average(
    estimate: Estimate, memory: Estimate, weight: Float[Array, ""], ratio: Float[Array, ""]
) -> tuple[Estimate, Estimate]:
    """Heun's: after a trial step, the mean of the noise at both its ends, from where it began.

    weight is half the sigma / alpha at which it began, and 0 if the call was no trial.
    """
    del ratio
    trial = weight > 0
    base = jax.tree.map(lambda new, old: jnp.where(trial, old, new), estimate, memory)
    eps = 0.5 * (base.eps + estimate.eps)
    return Estimate(base.x_0 + weight * (base.eps - estimate.eps), eps), base


def _extrapolate(
    estimate: Estimate, memory: Estimate, weight: Float[Array, ""], ratio: Float[Array, ""]
) -> tuple[Estimate, Estimate]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): x_0 on a line through the last two."""
    change = weight * (estimate.x_0 - memory.x_0)
    return Estimate(estimate.x_0 + change, estimate.eps - change / ratio), estimate


def _path(times: np.ndarray, levels: Schedule, weight: np.ndarray, start: float) -> Path:
    """weight: of the correction; the network is told integers where all of them are."""
    ratio = _ratio(times, levels)
    alpha = 1.0 / np.sqrt(1.0 + ratio**2)
    whole = (times == times.round()).all()
    return Path(
        jnp.asarray(times, jnp.int32 if whole else jnp.float32),
        *(jnp.asarray(row, jnp.float32) for row in (alpha, ratio * alpha, weight)), start,
    )  # fmt: skip


def _ratio(times: np.ndarray, levels: Schedule) -> np.ndarray:
    """sigma / alpha at `times`, on straight lines between the training's."""
    alpha, sigma = (row.astype(np.float64) for row in jax.device_get(levels))
    return np.interp(times, np.arange(alpha.size), sigma / np.maximum(alpha, _LEAST_ALPHA))


def _first_sigma(times: np.ndarray, levels: Schedule, kind: str) -> float:
    """What Euler and Heun start with in diffusers: noise of the first time's level, or leading 1.

    The latter is the input scaled to variance 1.
    """
    ratio = _ratio(times[:1], levels).item()
    return 1.0 if kind == "leading" else ratio / np.sqrt(1.0 + ratio**2)


def _euler_path(num_steps: int, levels: Schedule, scheduler: Mapping) -> Path:
    rule = spacing.from_config(scheduler)
    times = spacing.single_step_times(num_steps, levels.alpha.size, rule)
    start = _first_sigma(times, levels, rule.kind)
    return _path(times, levels, np.zeros(num_steps), start)


def _heun_path(num_steps: int, levels: Schedule, scheduler: Mapping) -> Path:
    """Every time but the first twice: for the trial step that ends there, and for good."""
    rule = spacing.from_config(scheduler)
    times = spacing.single_step_times(num_steps, levels.alpha.size, rule)
    weight = np.zeros(2 * num_steps - 1)
    weight[1::2] = 0.5 * _ratio(times[:-1], levels)
    start = _first_sigma(times, levels, rule.kind)
    return _path(np.repeat(times, 2)[1:], levels, weight, start)


def _dpm_solver_path(num_steps: int, levels: Schedule, scheduler: Mapping) -> Path:
    """weight = h_i / (2 h_(i-1)), h being steps in log(alpha / sigma).

    The first step has no predecessor and the last ends at infinity: both are of order 1.
    """
    rule = spacing.from_config(scheduler)
    times = spacing.multistep_times(num_steps, levels.alpha.size, rule)
    h = -np.diff(np.log(_ratio(times, levels)))
    weight = np.zeros(num_steps)
    weight[1:-1] = 0.5 * h[1:] / h[:-1]
    return _path(times, levels, weight, 1.0)


EULER = Sampler(_euler_path, uncorrected, lambda num_steps: 2 * num_steps)
HEUN = Sampler(_heun_path, _average, lambda num_steps: 2 * (2 * num_steps - 1))
DPM_SOLVER = Sampler(_dpm_solver_path, _extrapolate, lambda num_steps: 2 * num_steps)
