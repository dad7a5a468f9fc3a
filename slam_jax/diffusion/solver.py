"""The DDIM step, and the times at which a training sub-path may start."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slam_jax.errors import UserError
from slam_jax.shapes import Coeff, Latent


def ddim_step(
    x_0hat: Latent,
    eps: Latent,
    alpha_s: Coeff | Float[Array, ""],
    sigma_s: Coeff | Float[Array, ""],
) -> Latent:
    """Deterministic step to the levels of time s (Song et al. 2020, Eq. 12 with eta = 0)."""
    return alpha_s * x_0hat + sigma_s * eps


def start_grid(num_subpaths: int, num_timesteps: int) -> Int[Array, "N"]:
    """Evenly spaced times that end with training's last: 19, 39 … 999 for (50, 1000)."""
    if not 1 <= num_subpaths <= num_timesteps:
        raise UserError(
            f"num_subpaths {num_subpaths} must lie between 1 and the {num_timesteps} training times"
        )
    spacing = num_timesteps // num_subpaths
    return jnp.asarray(spacing * np.arange(1, num_subpaths + 1) - 1, jnp.int32)


def all_times(num_timesteps: int) -> Int[Array, "T"]:
    """Every training time 0 … T-1; time 0, where the boundary condition is exact, costs nothing."""
    return jnp.arange(num_timesteps)
