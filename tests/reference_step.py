"""Replay one recorded training step of the released SPLAM script through slam_jax.

    python tests/reference_step.py DIR

DIR holds step.json, tensors.safetensors and the folders scheduler, teacher_unet, student_unet and
target_unet. Prints the relative error ||ours - recorded|| / ||recorded|| of every recorded tensor,
the losses and the gradient. Exit status: 0 if all are within 1e-4, 1 if one is not, 2 if DIR is
malformed.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from slam_jax.diffusion import guidance, parameterization, schedule, solver, subpath
from slam_jax.distill import gamma, loss
from slam_jax.errors import UserError
from slam_jax.nets import unet
from slam_jax.weights import pretrained, translate

TOLERANCE = 1e-4
INPUTS = ("latents", "noise", "prompt_embeds", "uncond_embeds", "index", "gamma")
SETTINGS = ("w_scale", "num_ddim_timesteps", "skip", "huber_c", "prediction_type")
GRADIENT = "grad_huber_"


class Recording(NamedTuple):
    """A directory's content: settings, method, networks and torch-layout tensors."""

    settings: dict
    method: loss.Method
    teacher: pretrained.Component
    student: pretrained.Component
    target: pretrained.Component
    tensors: dict[str, np.ndarray]


class Batch(NamedTuple):
    """The inputs of the step, as slam_jax takes them."""

    x_0: jax.Array
    text: jax.Array
    null_text: jax.Array
    draw: loss.Draw


def read(folder: Path) -> Recording:
    """Everything in the directory; UserError if something is missing or does not fit."""
    settings = read_json(folder / "step.json")
    missing = [key for key in SETTINGS if key not in settings]
    if missing:
        raise UserError(f"{folder / 'step.json'} lacks {missing[0]}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    levels = schedule.from_config(scheduler)
    prediction = parameterization.prediction_from_config(scheduler)
    if prediction != parameterization.prediction_from_config(settings):
        raise UserError(f"{folder}: step.json and scheduler_config.json differ in prediction_type")
    method = loss.Method(
        schedule=levels,
        prediction=prediction,
        times=solver.start_grid(settings["num_ddim_timesteps"], levels.alpha.size),
        length=settings["skip"],
        stride=settings["skip"],
        w=float(settings["w_scale"]),
        sigma=subpath.sigma_markov,
        distance=loss.pseudo_huber(settings["huber_c"]),
        gamma_law=gamma.uniform,
    )
    networks = [
        pretrained.read_unet(folder / f"{name}_unet") for name in ("teacher", "student", "target")
    ]
    for network in networks[1:]:
        if not network.config.get("time_cond_proj_dim"):
            raise UserError(f"{folder}: student and target need time_cond_proj_dim, to take gamma")
    return Recording(settings, method, *networks, read_tensors(folder / "tensors.safetensors"))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def to_batch(tensors: dict[str, np.ndarray], num_times: int) -> Batch:
    """The inputs in our layout; UserError if one is missing or of another shape."""
    missing = [name for name in INPUTS if name not in tensors]
    if missing:
        raise UserError(f"tensors.safetensors lacks {missing[0]}")
    latents, noise, text, null_text, index, position = (tensors[name] for name in INPUTS)
    batch = len(latents)
    if latents.ndim != 4 or noise.shape != latents.shape:
        raise UserError(f"latents {latents.shape} and noise {noise.shape} must be equal [B,C,H,W]")
    if text.ndim != 3 or len(text) != batch or null_text.shape != text.shape:
        raise UserError(
            f"prompt_embeds {text.shape} and uncond_embeds {null_text.shape} must be equal [B,L,D]"
        )
    if index.shape != (batch,) or position.shape != (batch,):
        raise UserError(f"index {index.shape} and gamma {position.shape} must be [B]")
    if index.dtype.kind != "i" or index.min() < 0 or index.max() >= num_times:
        raise UserError(f"index {index.tolist()} must hold integers from 0 to {num_times - 1}")
    draw = loss.Draw(
        index=jnp.asarray(index, jnp.int32),
        noise=to_nhwc(noise),
        gamma=jnp.asarray(position.reshape(-1, 1, 1, 1), jnp.float32),
    )
    return Batch(
        to_nhwc(latents), jnp.asarray(text, jnp.float32), jnp.asarray(null_text, jnp.float32), draw
    )


def to_nhwc(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.transpose(0, 2, 3, 1), jnp.float32)


def to_nchw(array: jax.Array) -> np.ndarray:
    return np.asarray(array).transpose(0, 3, 1, 2)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: unet.UNet2DConditionModel, params: dict, *inputs: jax.Array) -> jax.Array:
    return model.apply({"params": params}, *inputs)


def plain_network(network: pretrained.Component) -> Callable:
    """(params, x, t, text) -> output."""
    return functools.partial(apply, unet.from_config(network.config))


def gamma_network(network: pretrained.Component) -> Callable:
    """(params, x, t, text, gamma) -> output."""
    model = unet.from_config(network.config)

    def call(params, x, t, text, position):
        # Outside of jit, where XLA could not round its large phases in another way.
        embedding = parameterization.gamma_embedding(position, model.time_cond_proj_dim)
        return apply(model, params, x, t, text, embedding)

    return call


def replay(recording: Recording) -> dict[str, np.ndarray]:
    """Our value of every tensor that a recording holds beyond its inputs, in torch's layout."""
    method, batch = recording.method, to_batch(recording.tensors, recording.method.times.size)
    teacher_net = plain_network(recording.teacher)
    student_net, target_net = gamma_network(recording.student), gamma_network(recording.target)

    def teacher(x, t, text):
        return teacher_net(recording.teacher.params, x, t, text)

    def target(x, t, text, position):
        return target_net(recording.target.params, x, t, text, position)

    def huber(params):
        values = loss.terms(
            lambda *inputs: student_net(params, *inputs), target, teacher, method, *batch
        )
        return jnp.mean(method.distance(values.f_student, values.f_target)), values

    student_params = jax.tree.map(jnp.asarray, recording.student.params)
    (loss_huber, values), gradient = jax.value_and_grad(huber, has_aux=True)(student_params)
    width = recording.student.config["time_cond_proj_dim"]
    return {
        "w": np.full(len(batch.x_0), method.w),
        "gamma_embedding": parameterization.gamma_embedding(batch.draw.gamma, width),
        "loss_l2": jnp.mean(loss.squared(values.f_student, values.f_target)),
        "loss_huber": loss_huber,
        **named(values),
        **teacher_values(teacher, method, values, batch),
        **gradients(translate.to_tensors(gradient), recording.tensors),
    }


def named(values: loss.Terms) -> dict[str, np.ndarray]:
    """The loss's intermediate values under the recording's names."""
    c_skip_start, c_out_start = parameterization.boundary(values.t)
    c_skip_end, c_out_end = parameterization.boundary(values.s)
    return {
        "start_timesteps": values.t,
        "end_timesteps": values.s,
        "noisy_latents": to_nchw(values.x_t),
        "x_prev": to_nchw(values.x_s),
        "target_eps": to_nchw(values.target_output),
        "target": to_nchw(values.f_target),
        "interpolated": to_nchw(values.x_gamma),
        "student_eps": to_nchw(values.student_output),
        "student_x0": to_nchw(values.student_x0),
        "student_output": to_nchw(values.f_student),
        "c_skip_start": np.ravel(c_skip_start),
        "c_out_start": np.ravel(c_out_start),
        "c_skip_end": np.ravel(c_skip_end),
        "c_out_end": np.ravel(c_out_end),
    }


def teacher_values(
    teacher: Callable, method: loss.Method, values: loss.Terms, batch: Batch
) -> dict[str, np.ndarray]:
    """What goes on inside the one solver step from x_t to x_s."""
    both = (jnp.concatenate(pair) for pair in ((values.x_t,) * 2, (values.t,) * 2, batch[1:3]))
    eps_cond, eps_uncond = jnp.split(teacher(*both), 2)
    x_0hat, eps = guidance.guided(
        teacher, values.x_t, values.t, batch.text, batch.null_text,
        method.w, method.schedule, method.prediction,
    )  # fmt: skip
    return {
        "teacher_eps_cond": to_nchw(eps_cond),
        "teacher_eps_uncond": to_nchw(eps_uncond),
        "solver_pred_x0": to_nchw(x_0hat),
        "solver_pred_noise": to_nchw(eps),
    }


def gradients(
    gradient: dict[str, np.ndarray], recorded: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The gradient's norm, and its part for each module whose recorded name ends a weight's."""
    squares = [np.sum(np.square(part, dtype=np.float64)) for part in gradient.values()]
    found = {"grad_global_norm_huber": np.sqrt(np.sum(squares))}
    for name in recorded:
        if name.startswith(GRADIENT):
            module = name.removeprefix(GRADIENT)
            weights = [key for key in gradient if f".{key}".endswith(f".{module}.weight")]
            if len(weights) != 1:
                raise UserError(f"{name}: {len(weights)} weights of the student are called so")
            found[name] = gradient[weights[0]]
    return found


def relative_error(ours: np.ndarray, recorded: np.ndarray) -> float:
    """||ours - recorded|| / ||recorded||; ||ours|| if the recorded tensor is all zeros."""
    ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    if ours.ndim == 0:
        ours = ours.reshape(1)
    if ours.shape != recorded.shape:
        return np.inf
    norm = np.linalg.norm(recorded)
    return float(np.linalg.norm(ours - recorded) / (norm if norm > 0 else 1.0))


def compare(folder: Path) -> dict[str, float]:
    """Relative error of every recorded tensor, inputs excepted."""
    recording = read(folder)
    ours = replay(recording)
    recorded = {name: tensor for name, tensor in recording.tensors.items() if name not in INPUTS}
    for name in sorted(ours.keys() ^ recorded.keys()):
        where = "lacks" if name in ours else "holds an unknown"
        raise UserError(f"{folder / 'tensors.safetensors'} {where} tensor {name!r}")
    return {name: relative_error(ours[name], recorded[name]) for name in sorted(recorded)}


def main(arguments: list[str]) -> int:
    """Print the table of errors; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    folder = parser.parse_args(arguments).directory
    try:
        # TF32 or bfloat16 products of an accelerator would be an error of their own.
        with jax.default_matmul_precision("highest"):
            errors = compare(folder)
    except UserError as error:
        print(f"malformed: {error}", file=sys.stderr)
        return 2
    failed = [name for name, error in errors.items() if not error <= TOLERANCE]
    for name, error in errors.items():
        print(f"{name:<28}{error:10.2e}  {'FAIL' if name in failed else 'ok'}")
    print(f"{len(errors) - len(failed)} of {len(errors)} within {TOLERANCE:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
