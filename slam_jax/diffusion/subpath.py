"""The linear sub-path between the drifted x_s (gamma = 0) and x_t (gamma = 1), s < t.

A point on it has signal level alpha_t for every gamma. Its noise level depends on how the
noises of x_s and x_t hang together; the three answers agree at gamma = 1 (METHOD.md §1.4).
"""

import jax.numpy as jnp

from slam_jax.shapes import Coeff, Latent


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
