"""Replay one recorded training step of the released SPLAM script through slam_jax.

    python tests/reference_step.py DIR

DIR holds step.json, tensors.safetensors and the folders scheduler, teacher_unet, student_unet and
target_unet. Prints the relative error ||ours - recorded|| / ||recorded|| of every recorded tensor,
the losses and the gradient. Exit status: 0 if all are within 1e-4, 1 if one is not, 2 if DIR is
malformed.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import reference_recording

from slam_jax.diffusion import guidance, parameterization, schedule, solver, subpath
from slam_jax.distill import gamma as laws
from slam_jax.distill import loss
from slam_jax.errors import UserError
from slam_jax.weights import translate

TOLERANCE = 1e-4


def to_batch(tensors: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array, jax.Array, loss.Draw]:
    """x_0, text, null_text and draw, in our layout."""
    text, null_text, gamma = (
        jnp.asarray(tensors[name], jnp.float32)
        for name in ("prompt_embeds", "uncond_embeds", "gamma")
    )
    index = jnp.asarray(tensors["index"], jnp.int32)
    draw = loss.Draw(index, to_nhwc(tensors["noise"]), gamma.reshape(-1, 1, 1, 1))
    return to_nhwc(tensors["latents"]), text, null_text, draw


def to_nhwc(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.transpose(0, 2, 3, 1), jnp.float32)


def to_torch(array: jax.Array) -> np.ndarray:
    """Images as NCHW, coefficients and scalars as vectors, the rest as it is."""
    array = np.asarray(array)
    if array.ndim == 4 and array.shape[1:] != (1, 1, 1):
        return array.transpose(0, 3, 1, 2)
    return array if array.ndim == 2 else array.ravel()


def method_of(settings: reference_recording.Settings, levels: schedule.Schedule) -> loss.Method:
    """The released script's method: one solver step, its own noise level."""
    return loss.Method(
        schedule=levels,
        prediction=parameterization.prediction_from_config(settings._asdict()),
        times=solver.start_grid(settings.num_ddim_timesteps, levels.alpha.size),
        length=settings.skip,
        stride=settings.skip,
        w=settings.w_scale,
        point=subpath.told_t(subpath.sigma_markov),
        distance=loss.pseudo_huber(settings.huber_c),
        gamma_law=laws.uniform,
    )


def replay(recording: reference_recording.Recording) -> dict[str, np.ndarray]:
    """Our value of every tensor that a recording holds beyond its inputs, in torch's layout."""
    settings, levels, models, params, tensors = recording
    *inputs, draw = to_batch(tensors)
    # Outside of jit, where XLA would round these large phases in another way than torch.
    embedding = parameterization.gamma_embedding(draw.gamma, models.student.time_cond_proj_dim)
    values, gradient = step(settings, models, levels, params, inputs, draw, embedding)
    return {
        "w": np.full(draw.index.shape, settings.w_scale),
        "gamma_embedding": embedding,
        **{name: to_torch(value) for name, value in values.items()},
        **gradients(translate.to_tensors(gradient), tensors),
    }


# It runs once, on small networks: most of the time goes into compiling.
@functools.partial(
    jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0}
)
def step(
    settings: reference_recording.Settings,
    models: reference_recording.Networks,
    levels: schedule.Schedule,
    params: reference_recording.Networks,
    inputs: list[jax.Array],
    draw: loss.Draw,
    embedding: jax.Array,
) -> tuple[dict[str, jax.Array], dict]:
    """Every value of the step in our layout, and the gradient of the student's parameters."""
    method = method_of(settings, levels)

    def teacher(x, t, text):
        return models.teacher.apply({"params": params.teacher}, x, t, text)

    def target(x, t, text, position):
        ones = parameterization.gamma_embedding(position, models.target.time_cond_proj_dim)
        return models.target.apply({"params": params.target}, x, t, text, ones)

    def huber(student_params):
        def student(x, t, text, position):
            assert position is draw.gamma
            return models.student.apply({"params": student_params}, x, t, text, embedding)

        ends = loss.pair(teacher, method, *inputs, draw)
        values = loss.terms(student, target, method, ends, inputs[1], draw.gamma)
        return jnp.mean(method.distance(values.f_student, values.f_target)), values

    (loss_huber, values), gradient = jax.value_and_grad(huber, has_aux=True)(params.student)
    found = {
        "loss_huber": loss_huber,
        "loss_l2": jnp.mean(loss.squared(values.f_student, values.f_target)),
        **named(values),
        **inside_solver(teacher, method, values, *inputs[1:]),
    }
    return found, gradient


def named(values: loss.Terms) -> dict[str, jax.Array]:
    """The loss's intermediate values under the recording's names."""
    c_skip_start, c_out_start = parameterization.boundary(values.t)
    c_skip_end, c_out_end = parameterization.boundary(values.s)
    return {
        "start_timesteps": values.t,
        "end_timesteps": values.s,
        "noisy_latents": values.x_t,
        "x_prev": values.x_s,
        "target_eps": values.target_output,
        "target": values.f_target,
        "interpolated": values.x_gamma,
        "student_eps": values.student_output,
        "student_x0": values.student_x0,
        "student_output": values.f_student,
        "c_skip_start": c_skip_start,
        "c_out_start": c_out_start,
        "c_skip_end": c_skip_end,
        "c_out_end": c_out_end,
    }


def inside_solver(
    teacher: Callable,
    method: loss.Method,
    values: loss.Terms,
    text: jax.Array,
    null_text: jax.Array,
) -> dict[str, jax.Array]:
    """What goes on inside the one solver step from x_t to x_s."""
    outputs = []

    def watched(*inputs):
        outputs.append(teacher(*inputs))
        return outputs[-1]

    x_0hat, eps = guidance.guided(
        watched, values.x_t, values.t, text, null_text,
        method.w, method.schedule, method.prediction,
    )  # fmt: skip
    eps_cond, eps_uncond = outputs[0][::2], outputs[0][1::2]
    return {
        "teacher_eps_cond": eps_cond,
        "teacher_eps_uncond": eps_uncond,
        "solver_pred_x0": x_0hat,
        "solver_pred_noise": eps,
    }


def gradients(
    gradient: dict[str, np.ndarray], recorded: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The gradient's norm, and its part for each module whose recorded name ends a weight's."""
    squares = [np.sum(np.square(part, dtype=np.float64)) for part in gradient.values()]
    found = {"grad_global_norm_huber": np.sqrt([np.sum(squares)])}
    for name in recorded:
        if name.startswith(reference_recording.GRADIENT):
            module = name.removeprefix(reference_recording.GRADIENT)
            weights = [key for key in gradient if f".{key}".endswith(f".{module}.weight")]
            if len(weights) != 1:
                raise UserError(f"{name}: {len(weights)} weights of the student are called so")
            found[name] = gradient[weights[0]]
    return found


def relative_error(ours: np.ndarray, recorded: np.ndarray) -> float:
    """||ours - recorded|| / ||recorded||; ||ours|| if the recorded tensor is all zeros."""
    ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    if ours.shape != recorded.shape:
        return np.inf
    norm = np.linalg.norm(recorded)
    return float(np.linalg.norm(ours - recorded) / (norm if norm > 0 else 1.0))


def compare(folder: Path) -> dict[str, float]:
    """Relative error of every recorded tensor, inputs excepted."""
    recording = reference_recording.read(folder)
    ours = replay(recording)
    outputs = sorted(recording.tensors.keys() - set(reference_recording.INPUTS))
    return {name: relative_error(ours[name], recording.tensors[name]) for name in outputs}


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
