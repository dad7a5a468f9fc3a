"""The linear sub-path between the drifted x_s (gamma = 0) and x_t (gamma = 1), s < t.

A point on it has signal level alpha_t for every gamma. Its noise level depends on how the
noises of x_s and x_t hang together; all answers agree at gamma = 1 (METHOD.md §1.4).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from slam_jax.diffusion.schedule import Schedule
from slam_jax.shapes import Coeff, Latent, Timestep


class Point(NamedTuple):
    """A point on the sub-path as the student meets it."""

    x: Latent
    t: Timestep  # what the student is told
    alpha: Coeff  # signal level of x
    sigma: Coeff  # noise level of x
    gamma: Coeff  # what the student is told


# (schedule, x_s, s, x_t, t, gamma) -> the point at gamma
PointOf = Callable[[Schedule, Latent, Timestep, Latent, Timestep, Coeff], Point]


def interpolate(x_s: Latent, x_t: Latent, alpha_s: Coeff, alpha_t: Coeff, gamma: Coeff) -> Latent:
    """x_gamma = gamma x_t + (1 - gamma) (alpha_t / alpha_s) x_s (METHOD.md §1.3)."""
    return gamma * x_t + (1.0 - gamma) * (alpha_t / alpha_s) * x_s


def sigma_markov(
    alpha_t: Coeff, sigma_t: Coeff, alpha_s: Coeff, sigma_s: Coeff, gamma: Coeff
) -> Coeff:
    """Spread of x_gamma when x_t is a forward-diffusion step from x_s: the released code's.

    Training feeds a DDIM pair, whose spread is sigma_ddim: up to 3 % more at a length of 20
    (t >= 119), the same at both ends. The default all the same, as the released models have it.
    """
    del sigma_t
    drift = alpha_t / alpha_s
    return jnp.sqrt((drift * sigma_s) ** 2 + gamma**2 * (1.0 - drift**2))


def sigma_ddim(
    alpha_t: Coeff, sigma_t: Coeff, alpha_s: Coeff, sigma_s: Coeff, gamma: Coeff
) -> Coeff:
    """Spread of x_gamma when x_s is one DDIM step from x_t, both with the same noise."""
    return gamma * sigma_t + (1.0 - gamma) * (alpha_t / alpha_s) * sigma_s


def sigma_fixed(
    alpha_t: Coeff, sigma_t: Coeff, alpha_s: Coeff, sigma_s: Coeff, gamma: Coeff
) -> Coeff:
    """sigma_t for every gamma: what a network told only t expects.

    With it the samples at gamma < 1 pull the same way as those at gamma = 1 from the first
    step on; with sigma_markov they pull against them at first (GAMMA.md §5).
    """
    del alpha_t, alpha_s, sigma_s
    return jnp.broadcast_to(sigma_t, gamma.shape)


def told_t(sigma: Callable[[Coeff, Coeff, Coeff, Coeff, Coeff], Coeff]) -> PointOf:
    """The published form: x_gamma itself, told t and gamma; sigma is one of the above."""

    def point(
        schedule: Schedule, x_s: Latent, s: Timestep, x_t: Latent, t: Timestep, gamma: Coeff
    ) -> Point:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        x = interpolate(x_s, x_t, alpha_s, alpha_t, gamma)
        return Point(x, t, alpha_t, sigma(alpha_t, sigma_t, alpha_s, sigma_s, gamma), gamma)

    return point


def matched(
    schedule: Schedule, x_s: Latent, s: Timestep, x_t: Latent, t: Timestep, gamma: Coeff
) -> Point:
    """The same line, told where on it the teacher's own solution stands: SNR-matched (GAMMA.md §6).

    x_gamma has the noise-to-signal ratio of an earlier time tau in [s, t]; scaled to alpha_tau it
    is the DDIM point of that time, exactly so after a single solver step. gamma moves to where tau
    is a whole number. The student is told tau, and gamma = 1 as samplers tell it: no other gamma
    ever reaches it. t and x_t themselves at gamma = 1. Not for zero terminal SNR.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    r_t, r_s = sigma_t / alpha_t, sigma_s / alpha_s
    wanted = gamma * r_t + (1.0 - gamma) * r_s
    ratio = schedule.sigma / schedule.alpha  # rises with time
    middles = 0.5 * (ratio[1:] + ratio[:-1])
    tau = jnp.searchsorted(middles, wanted[:, 0, 0, 0]).astype(t.dtype)
    alpha, sigma = schedule(tau)
    x = interpolate(x_s, x_t, alpha_s, alpha_t, (sigma / alpha - r_s) / (r_t - r_s))
    return Point(alpha / alpha_t * x, tau, alpha, sigma, jnp.ones_like(gamma))
