"""Signal and noise levels of the forward diffusion x_t = alpha_t x_0 + sigma_t noise."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slam_jax.errors import UserError
from slam_jax.shapes import Coeff, Timestep

# What diffusers assumes where an old scheduler_config.json is silent (Stable Diffusion 1.5's
# own file has no prediction_type). Keys that only steer sampling (clip_sample, steps_offset,
# timestep_spacing, set_alpha_to_one, …) play no part in the schedule.
_DIFFUSERS_DEFAULTS = {
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
_MOST_TIMESTEPS = 10**6
_REQUIRED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


class Schedule(NamedTuple):
    """Levels at the integer times 0 … T-1, float32; alpha² + sigma² = 1 (METHOD.md §1.1)."""

    alpha: Float[Array, "T"]
    sigma: Float[Array, "T"]

    def __call__(self, t: Timestep) -> tuple[Coeff, Coeff]:
        """(alpha_t, sigma_t), shaped to multiply a latent; 0 <= t < T."""
        return (
            self.alpha[t][:, None, None, None],
            self.sigma[t][:, None, None, None],
        )


def from_config(scheduler: Mapping) -> Schedule:
    """The schedule that a diffusers scheduler_config.json describes, computed in float64.

    Raises UserError for a schedule that we do not know, and for epsilon-prediction with zero
    terminal SNR.
    """
    settings = {**_DIFFUSERS_DEFAULTS, **scheduler}
    alpha_bar = np.cumprod(1.0 - _betas(settings))
    if settings["rescale_betas_zero_snr"]:
        alpha_bar = _with_zero_terminal_snr(alpha_bar)
    if alpha_bar[-1] == 0.0 and settings["prediction_type"] == "epsilon":
        raise UserError(
            "scheduler config: prediction_type 'epsilon' with zero terminal SNR: at the last time "
            "x_t is noise alone, so x_0 = (x_t - sigma_t eps) / alpha_t divides by zero; use a "
            "v_prediction model, or set rescale_betas_zero_snr to false if the model was trained so"
        )
    return Schedule(
        alpha=jnp.asarray(np.sqrt(alpha_bar), jnp.float32),
        sigma=jnp.asarray(np.sqrt(1.0 - alpha_bar), jnp.float32),
    )


def num_timesteps(scheduler: Mapping) -> int:
    """How many times that schedule has; UserError as from_config raises it."""
    return _betas({**_DIFFUSERS_DEFAULTS, **scheduler}).size


def _betas(settings: Mapping) -> np.ndarray:
    """Noise added at each training time, float64 [T]; names as in diffusers' schedulers."""
    if settings["trained_betas"] is not None:
        return _trained(settings["trained_betas"])
    missing = [key for key in _REQUIRED if key not in settings]
    if missing:
        kind = settings.get("_class_name", "without a _class_name")
        raise UserError(
            f"scheduler config ({kind}) has no {missing[0]}: not a scheduler of the Stable "
            "Diffusion 1.x/2.x family; use the scheduler_config.json the model was trained with"
        )
    num_timesteps, first, last = (_number(settings, key) for key in _REQUIRED[:3])
    num_timesteps = int(num_timesteps)
    match settings["beta_schedule"]:
        case "linear":
            return _checked(np.linspace(first, last, num_timesteps))
        case "scaled_linear":
            return _checked(np.linspace(first**0.5, last**0.5, num_timesteps) ** 2)
        case "squaredcos_cap_v2":
            return _cosine_betas(num_timesteps)
        case unknown:
            raise UserError(
                f"scheduler config: beta_schedule {unknown!r} is not known; "
                "use linear, scaled_linear, squaredcos_cap_v2 or trained_betas"
            )


def _number(settings: Mapping, key: str) -> float:
    """A number from 0; UserError for anything else, or for what no schedule can be made of."""
    value = settings[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _MOST_TIMESTEPS:
        raise UserError(
            f"scheduler config: {key} {value!r} must be a number and not negative; use the "
            "scheduler_config.json the model was trained with"
        )
    return float(value)


def _trained(betas: object) -> np.ndarray:
    try:
        array = np.asarray(betas, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UserError("scheduler config: trained_betas must be a list of numbers") from None
    return _checked(array)


def _checked(betas: np.ndarray) -> np.ndarray:
    if betas.ndim != 1 or betas.size < 2 or not ((betas > 0) & (betas <= 1)).all():
        raise UserError(
            "scheduler config: every beta must lie in (0, 1] and there must be two or more; "
            "check beta_start, beta_end, num_train_timesteps and trained_betas"
        )
    return betas


def _cosine_betas(num_timesteps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, Eq. 17, each beta capped at 0.999."""
    time = np.arange(num_timesteps + 1) / num_timesteps
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _with_zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, Algorithm 1: shift and scale alpha so that the last one is 0."""
    alpha = np.sqrt(alpha_bar)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
