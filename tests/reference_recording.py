"""Reading a recorded training step: settings, networks and tensors, all checked.

The format is that of tests/reference/reference_step: step.json, tensors.safetensors and the folders
scheduler, teacher_unet, student_unet and target_unet as diffusers writes them.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from slam_jax.diffusion import parameterization, schedule, solver
from slam_jax.errors import UserError
from slam_jax.nets import unet
from slam_jax.weights import pretrained

INPUTS = ("latents", "noise", "prompt_embeds", "uncond_embeds", "index", "gamma")
OUTPUTS = (
    "c_out_end", "c_out_start", "c_skip_end", "c_skip_start", "end_timesteps", "gamma_embedding",
    "grad_global_norm_huber", "interpolated", "loss_huber", "loss_l2", "noisy_latents",
    "solver_pred_noise", "solver_pred_x0", "start_timesteps", "student_eps", "student_output",
    "student_x0", "target", "target_eps", "teacher_eps_cond", "teacher_eps_uncond", "w", "x_prev",
)  # fmt: skip
GRADIENT = "grad_huber_"  # and the end of a module's name


class Settings(NamedTuple):
    """What step.json says."""

    w_scale: float
    num_ddim_timesteps: int
    skip: int
    huber_c: float
    prediction_type: str


class Networks(NamedTuple):
    """One of each: modules, or parameters."""

    teacher: object
    student: object
    target: object


class Recording(NamedTuple):
    """A directory's content; the tensors are in torch's layout."""

    settings: Settings
    levels: schedule.Schedule
    models: Networks
    params: Networks
    tensors: dict[str, np.ndarray]


def read(folder: Path) -> Recording:
    """Everything in the directory; UserError if something is missing or does not fit."""
    settings = read_settings(folder / "step.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    levels = schedule.from_config(scheduler)
    prediction = parameterization.prediction_from_config(scheduler)
    if prediction != parameterization.prediction_from_config(settings._asdict()):
        raise UserError(f"{folder}: step.json and scheduler_config.json differ in prediction_type")
    parts = [
        pretrained.read_component(folder / f"{name}_unet", pretrained.UNET)
        for name in Networks._fields
    ]
    models = Networks(*(unet.from_config(part.config) for part in parts))
    if not models.student.time_cond_proj_dim or not models.target.time_cond_proj_dim:
        raise UserError(f"{folder}: student and target need time_cond_proj_dim, to take gamma")
    params = Networks(*(part.params for part in parts))
    tensors = read_tensors(folder / "tensors.safetensors")
    recording = Recording(settings, levels, models, params, tensors)
    check_inputs(recording)
    return recording


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_settings(path: Path) -> Settings:
    content = read_json(path)
    for key, kind in Settings.__annotations__.items():
        if not isinstance(content.get(key), (int, float) if kind is float else kind):
            raise UserError(f"{path}: {key} is {content.get(key)!r}, not of type {kind.__name__}")
    return Settings(*(kind(content[key]) for key, kind in Settings.__annotations__.items()))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors, none missing and none unknown."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for name in (*INPUTS, *OUTPUTS):
        if name not in tensors:
            raise UserError(f"{path} lacks tensor {name!r}")
    for name in tensors:
        if name not in (*INPUTS, *OUTPUTS) and not name.startswith(GRADIENT):
            raise UserError(f"{path} holds an unknown tensor {name!r}")
    return tensors


def check_inputs(recording: Recording) -> None:
    """UserError unless the inputs fit each other, the grid and the networks."""
    shapes = {name: recording.tensors[name].shape for name in INPUTS}
    if len(shapes["latents"]) != 4 or len(shapes["prompt_embeds"]) != 3:
        raise UserError(f"latents must be [B,C,H,W] and prompt_embeds [B,L,D]: {shapes}")
    (batch, channels, *_), (_, length, width) = shapes["latents"], shapes["prompt_embeds"]
    text = (batch, length, width)
    fitting = (shapes["latents"], shapes["latents"], text, text, (batch,), (batch,))
    if tuple(shapes.values()) != fitting:
        raise UserError(f"the inputs' shapes do not fit each other: {shapes}")
    for model in recording.models:
        if (model.in_channels, model.cross_attention_dim) != (channels, width):
            raise UserError(
                f"latents of {channels} channels and prompt_embeds of width {width} do not fit a "
                f"network that takes {model.in_channels} and {model.cross_attention_dim}"
            )
    index = recording.tensors["index"]
    grid = solver.start_grid(recording.settings.num_ddim_timesteps, recording.levels.alpha.size)
    if index.dtype.kind != "i" or index.min() < 0 or index.max() >= grid.size:
        raise UserError(f"index {index.tolist()} must hold integers from 0 to {grid.size - 1}")
