"""The demo's teacher and drawings, for training many students on the very same sub-paths.

The teacher never changes, so the ends of the sub-paths that it walks are computed once for all
students of a seed: the same algorithm as slam_jax.main, at a fraction of the time.
"""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import tiny
from slam_jax import experiment, pipeline, settings
from slam_jax.data import shapes2d, text_inputs
from slam_jax.diffusion import parameterization, sampler, schedule
from slam_jax.distill import loss, optimizer
from slam_jax.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]
BATCH_SIZE = 32
_AT_A_TIME = 64  # examples, where nothing is trained


class Laboratory(NamedTuple):
    """What all students have in common."""

    settings: settings.Settings
    teacher: pretrained.Pretrained  # its parameters on the device
    tokens: text_inputs.Tokenizers
    null_text: jax.Array


class Examples(NamedTuple):
    """Sub-paths with their captions, N of them, on the host."""

    ends: loss.Pair
    text: np.ndarray


def enter() -> Laboratory:
    """Reads assets/tiny_sd."""
    chosen = settings.from_config(tiny.get_config().to_dict())
    model = str(ROOT / chosen.teacher.model)
    chosen = chosen._replace(teacher=chosen.teacher._replace(model=model))
    teacher = pretrained.load(experiment.teacher(chosen), place=lambda _, x: jax.device_put(x))
    tokens = text_inputs.read(teacher.tokenizer, teacher.tokenizer_2)
    bare = Laboratory(chosen, teacher, tokens, jnp.zeros(()))
    return bare._replace(null_text=jax.device_put(texts(bare, [""])))


def texts(lab: Laboratory, captions: list[str]) -> np.ndarray:
    """What the text encoder says of captions, [N, L, D]."""
    encode = jax.jit(pipeline.encode_text(lab.teacher, jnp.float32))
    encoded = lab.tokens.encode(captions, experiment.image_size(lab.settings))
    return in_batches(partial(encode, lab.teacher.text_encoder.params), encoded, len(captions))


def method(lab: Laboratory, **distill: Any) -> loss.Method:
    """The loss of configs/tiny.py, but for what is given."""
    return experiment.method(lab.settings.distill._replace(**distill), lab.teacher.scheduler)


def examples(lab: Laboratory, method: loss.Method, seed: int, count: int) -> Examples:
    """Sub-paths of `count` drawings. Of the method, all that the teacher knows of counts."""
    source = shapes2d.Shapes2D(lab.settings.data.size, count, 1000 + seed)
    drawn = [source[i] for i in range(count)]
    text = texts(lab, [each.caption for each in drawn])
    encode_image = pipeline.encode_image(lab.teacher.vae.config, jnp.float32)
    teacher = pipeline.teacher(lab.teacher.unet.config, jnp.float32)

    @jax.jit
    def ends(unet, vae, null_text, inputs):
        posterior_key, draw_key = jax.random.split(jax.random.fold_in(inputs["key"][0], 0))
        x_0 = encode_image(vae, {"image": inputs["image"]}, posterior_key)
        draw = loss.draw_subpath(draw_key, x_0, method, 0.0)
        net = partial(teacher, unet)
        return loss.pair(net, method, x_0, inputs["text"], null_text, draw)

    inputs = {
        "image": np.stack([each.image for each in drawn]),
        "text": text,
        "key": jax.random.split(jax.random.key(seed), count),
    }
    run = partial(ends, lab.teacher.unet.params, lab.teacher.vae.params, lab.null_text)
    return Examples(in_batches(run, inputs, count), text)


def in_batches(function: Callable, inputs: Any, count: int) -> Any:
    """function, for a few examples at a time; what it gives, on the host."""
    parts = []
    for first in range(0, count, _AT_A_TIME):
        chosen = jax.tree.map(lambda x, first=first: x[first : first + _AT_A_TIME], inputs)
        parts.append(jax.device_get(function(jax.device_put(chosen))))
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)


def start(lab: Laboratory, cond_proj: str, seed: int) -> Any:
    """The parameters of a student that nothing was done to."""
    chosen = lab.settings.student._replace(cond_proj=cond_proj)
    student = experiment.student(lab.settings._replace(student=chosen, seed=seed), lab.teacher.unet)
    # Copies: training gives its buffers away.
    return jax.tree.map(jnp.array, student.params)


def network(lab: Laboratory) -> Callable:
    """(params, x, t, text, gamma) -> raw output."""
    gamma_dim = lab.settings.student.gamma_dim
    config = {**lab.teacher.unet.config, "time_cond_proj_dim": gamma_dim}
    return pipeline.student(config, jnp.float32)


def mean_loss(net: Callable, method: loss.Method) -> Callable:
    """(student's parameters, target's, ends, text, gamma) -> scalar."""

    def of(student: Any, target: Any, ends: loss.Pair, text: jax.Array, gamma: jax.Array):
        bound = (partial(net, student), partial(net, target))
        return jnp.mean(loss.slam_loss(*bound, method, ends, text, gamma))

    return of


def train(
    lab: Laboratory, method: loss.Method, student: Any, found: Examples, *, seed: int,
    num_steps: int, ema_rate: float,
) -> tuple[Any, np.ndarray]:  # fmt: skip
    """The target after num_steps batches of the examples, and the loss of each step."""
    adamw = optimizer.adamw(**lab.settings.optimizer._asdict())
    gradient = jax.value_and_grad(mean_loss(network(lab), method))

    @partial(jax.jit, donate_argnums=0)
    def step(state, number, ends, text, key):
        student, target, opt_state = state
        gamma = method.gamma_law(jax.random.fold_in(key, number), BATCH_SIZE, number / num_steps)
        value, grads = gradient(student, target, ends, text, gamma)
        updates, opt_state = adamw.update(grads, opt_state, student)
        student = optax.apply_updates(student, updates)
        target = jax.tree.map(
            lambda old, new: ema_rate * old + (1.0 - ema_rate) * new, target, student
        )
        return (student, target, opt_state), value

    state = (student, jax.tree.map(jnp.copy, student), adamw.init(student))
    key, losses = jax.random.key(seed), []
    for number in range(num_steps):
        rows = slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        ends, text = jax.tree.map(lambda x, rows=rows: jax.device_put(x[rows]), tuple(found))
        state, value = step(state, jax.device_put(np.float32(number)), ends, text, key)
        losses.append(value)
    return state[1], np.asarray(jax.device_get(losses))


def few_step(lab: Laboratory, num_steps: int) -> Callable:
    """(student's parameters, VAE's, text, noise) -> (latents, images in [0, 1]), compiled."""
    levels = schedule.from_config(lab.teacher.scheduler)
    prediction = parameterization.prediction_from_config(lab.teacher.scheduler)
    times = sampler.few_step_times(num_steps)
    net, decode = network(lab), pipeline.decode(lab.teacher.vae.config, jnp.float32)

    @jax.jit
    def sample(params, vae, text, noise):
        bound = partial(net, params)
        x_0 = sampler.consistency_sample(bound, levels, prediction, times, noise, text)
        return x_0, decode(vae, x_0)

    return sample
