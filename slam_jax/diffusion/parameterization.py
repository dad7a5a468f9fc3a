"""From a network's raw output to x_0 and noise, and from x_0 to the consistency function."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slam_jax.errors import UserError
from slam_jax.shapes import Coeff, Latent, PerExample, Timestep

# Boundary coefficients of every released LCM and SPLAM model: times are multiplied by 10, and
# c_out lacks the factor sigma_data of the consistency-models paper (huggingface/diffusers#8547).
# Kept as they are, since samplers everywhere share them; f(x, 0) = x holds all the same.
_SIGMA_DATA = 0.5
_TIME_SCALING = 10.0


class Prediction(NamedTuple):
    """What a network predicts: (x, output, alpha, sigma) -> x_0, and the same -> noise.

    x = alpha x_0 + sigma noise, with any alpha and sigma. An output of lower precision is
    raised to that of x first.
    """

    to_x0: Callable[[Latent, Latent, Coeff, Coeff], Latent]
    to_eps: Callable[[Latent, Latent, Coeff, Coeff], Latent]


def _x0_from_eps(x: Latent, eps: Latent, alpha: Coeff, sigma: Coeff) -> Latent:
    return (x - sigma * eps.astype(x.dtype)) / alpha


def _eps_from_eps(x: Latent, eps: Latent, alpha: Coeff, sigma: Coeff) -> Latent:
    del alpha, sigma
    return eps.astype(x.dtype)


def _x0_from_v(x: Latent, v: Latent, alpha: Coeff, sigma: Coeff) -> Latent:
    # v = (alpha eps - sigma x_0) / n; n = 1 except inside a sub-path (METHOD.md §1.5).
    n = jnp.sqrt(alpha**2 + sigma**2)
    return alpha / n**2 * x - sigma / n * v.astype(x.dtype)


def _eps_from_v(x: Latent, v: Latent, alpha: Coeff, sigma: Coeff) -> Latent:
    n = jnp.sqrt(alpha**2 + sigma**2)
    return sigma / n**2 * x + alpha / n * v.astype(x.dtype)


EPSILON = Prediction(to_x0=_x0_from_eps, to_eps=_eps_from_eps)
V_PREDICTION = Prediction(to_x0=_x0_from_v, to_eps=_eps_from_v)


def prediction_from_config(scheduler: Mapping) -> Prediction:
    """The parameterization named in a diffusers scheduler_config.json; epsilon if it names none."""
    match {"prediction_type": "epsilon", **scheduler}["prediction_type"]:
        case "epsilon":
            return EPSILON
        case "v_prediction":
            return V_PREDICTION
        case unknown:
            raise UserError(
                f"scheduler config: prediction_type {unknown!r} is not known; "
                "use a model with epsilon or v_prediction"
            )


def boundary(t: Timestep) -> tuple[Coeff, Coeff]:
    """(c_skip, c_out) at integer times; (1, 0) at t = 0 (METHOD.md §1.5)."""
    # float32 whatever the networks' dtype: (10 · 999)² overflows float16.
    scaled = _TIME_SCALING * t.astype(jnp.float32)[:, None, None, None]
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / jnp.sqrt(scaled**2 + _SIGMA_DATA**2)
    return c_skip, c_out


def consistency(x: Latent, x_0hat: Latent, t: Timestep) -> Latent:
    """f = c_skip(t) x + c_out(t) x_0hat; t is the noisy end of the sub-path for every gamma."""
    c_skip, c_out = boundary(t)
    return c_skip * x + c_out * x_0hat


def gamma_cond(gamma: Coeff) -> PerExample:
    """10 - 10 gamma: in the slot of LCM's guidance embedding, gamma = 1 reads as scale 1."""
    return 10.0 - 10.0 * gamma[:, 0, 0, 0]


def gamma_embedding(gamma: Coeff, dim: int) -> Float[Array, "B dim"]:
    """What `timestep_cond` is fed: sines, then cosines, of 1000 gamma_cond (METHOD.md §1.6).

    gamma in [0, 1]; dim (even, 256 in the released models) is the net's time_cond_proj_dim.
    """
    assert dim % 2 == 0 and dim >= 4, dim
    # Phases reach 10,000, where a frequency's last bit in float32 is worth 1e-3. So exponents are
    # rounded to float32 before exp, as PyTorch pipelines round them: both embed gamma alike.
    step = np.float32(-np.log(10000.0) / (dim // 2 - 1))
    exponent = np.arange(dim // 2, dtype=np.float32) * step
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = jnp.outer(1000.0 * gamma_cond(gamma), frequency)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
