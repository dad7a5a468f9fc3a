"""Which times a sampler visits, as diffusers' schedulers choose them from their config."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.errors import UserError

# What diffusers draws otherwise with these set is not what our samplers draw.
_ONLY = {
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "lambda_min_clipped": -float("inf"),
    "thresholding": False,
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
}
_DIFFUSERS_DEFAULTS = {"timestep_spacing": "linspace", "steps_offset": 0}
_KINDS = ("leading", "linspace", "trailing")


class Spacing(NamedTuple):
    """Lin et al. 2023, Table 2: only linspace and trailing begin with training's last time."""

    kind: str  # leading, linspace or trailing
    offset: int  # added to leading times


def from_config(scheduler: Mapping) -> Spacing:
    """The timestep_spacing and steps_offset of a diffusers scheduler_config.json.

    linspace where it names none, as diffusers' Euler, Heun and DPM-Solver do. Raises UserError
    for a spacing of other levels than the training's, which our samplers do not have.
    """
    settings = {**_DIFFUSERS_DEFAULTS, **scheduler}
    for key, only in _ONLY.items():
        if {key: only, **settings}[key] not in (only, None):
            raise UserError(
                f"scheduler config: {key} {settings[key]!r} is not supported when sampling with "
                f"euler, heun or dpm++2m; set it to {only!r}, or sample with ddim"
            )
    if settings["timestep_spacing"] not in _KINDS:
        raise UserError(
            f"scheduler config: timestep_spacing {settings['timestep_spacing']!r} is not known; "
            f"use {', '.join(_KINDS)}"
        )
    return Spacing(settings["timestep_spacing"], settings["steps_offset"])


def single_step_times(
    num_steps: int, num_timesteps: int, spacing: Spacing
) -> Float[np.ndarray, "S"]:
    """Falling times of EulerDiscreteScheduler and HeunDiscreteScheduler; linspace's are fractions.

    One step of leading or linspace is at the clean end, and no image: use trailing for few steps.
    """
    _check(num_steps, num_timesteps)
    match spacing.kind:
        case "linspace":
            times = np.linspace(0, num_timesteps - 1, num_steps)[::-1].astype(np.float32)
        case "leading":
            multiple = num_timesteps // num_steps
            times = multiple * np.arange(num_steps)[::-1] + spacing.offset
        case _:
            times = _trailing(num_steps, num_timesteps)
    return _within(times.astype(np.float64), num_steps, num_timesteps)


def multistep_times(num_steps: int, num_timesteps: int, spacing: Spacing) -> Float[np.ndarray, "S"]:
    """Falling times of DPMSolverMultistepScheduler, whole numbers."""
    _check(num_steps, num_timesteps - 1)
    match spacing.kind:
        case "linspace":
            times = np.linspace(0, num_timesteps - 1, num_steps + 1).round()[:0:-1]
        case "leading":
            multiple = num_timesteps // (num_steps + 1)
            times = multiple * np.arange(1, num_steps + 1)[::-1] + spacing.offset
        case _:
            times = _trailing(num_steps, num_timesteps)
    return _within(times.astype(np.float64), num_steps, num_timesteps)


def _trailing(num_steps: int, num_timesteps: int) -> np.ndarray:
    # arange accumulates its own rounding errors, which decide halves; and may go one too far.
    return np.arange(num_timesteps, 0, -num_timesteps / num_steps).round()[:num_steps] - 1


def _check(num_steps: int, most: int) -> None:
    if not 1 <= num_steps <= most:
        raise UserError(f"{num_steps} sampling steps: choose from 1 to {most}")


def _within(times: np.ndarray, num_steps: int, num_timesteps: int) -> np.ndarray:
    if times[0] > num_timesteps - 1:
        raise UserError(
            f"scheduler config: steps_offset leads {num_steps} sampling steps to time "
            f"{times[0]:g}, past the {num_timesteps} of the training; take fewer steps"
        )
    return times
