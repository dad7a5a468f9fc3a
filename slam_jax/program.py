"""The train step of an experiment on a mesh, before any array is there to run it on."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from slam_jax import experiment
from slam_jax.distill import loss, optimizer, state, step
from slam_jax.runtime import mesh
from slam_jax.settings import Settings
from slam_jax.weights import pretrained


class Parts(NamedTuple):
    """What settings and a teacher decide, wherever it will run."""

    student: pretrained.Component  # its config, and what is trained of it, as it starts, unread
    nets: step.Nets
    method: loss.Method
    optimizer: optax.GradientTransformation


class Program(NamedTuple):
    """The same on a mesh."""

    first: Callable  # trained parameters, float32 -> TrainState of step 0
    like: state.TrainState  # shapes, with the sharding of each array
    layout: state.TrainState  # shardings alone
    replicated: NamedSharding
    step: Callable  # jitted: (TrainState, Frozen, batch, key) -> (TrainState, metrics)


class Piece(NamedTuple):
    """A part of the train step that can be compiled apart."""

    name: str
    traced: jax.stages.Traced
    times: int  # that a step runs it
    beside: int  # bytes on a device that lie beside its arguments or are no part of the state


def parts(settings: Settings, teacher: pretrained.Pretrained) -> Parts:
    """Touches no device; of the teacher, configs and shapes alone are looked at."""
    student = experiment.student(settings, teacher.unet)
    return Parts(
        student=student,
        nets=experiment.nets(settings, teacher, student.config),
        method=experiment.method(settings.distill, teacher.scheduler),
        optimizer=optimizer.adamw(**settings.optimizer._asdict()),
    )


def build(settings: Settings, parts: Parts, devices: Mesh) -> Program:
    """The train step and the layout of its state."""
    first = partial(state.init, optimizer=parts.optimizer)
    bare = jax.eval_shape(first, _shapes(parts.student.params))
    like = mesh.placed(bare, devices, settings.mesh.rules)
    layout = jax.tree.map(lambda leaf: leaf.sharding, like)
    replicated = mesh.replicated(devices)
    nets = _spread(parts.nets, devices, settings.mesh.rules)
    train_step = jax.jit(
        partial(
            step.train_step, nets=nets, method=parts.method, optimizer=parts.optimizer,
            ema_rate=settings.ema_rate, num_steps=settings.num_steps,
            max_grad_norm=settings.faults.max_grad_norm,
        ),
        donate_argnums=0, out_shardings=(layout, replicated),
    )  # fmt: skip
    return Program(first, like, layout, replicated, train_step)


def pieces(
    settings: Settings, parts: Parts, built: Program, devices: Mesh, frozen: state.Frozen,
    batch: Mapping, key: jax.ShapeDtypeStruct,
) -> list[Piece]:  # fmt: skip
    """The three functions that the train step is made of, from the shapes of its arguments."""
    rows, like, layout = mesh.rows_sharding(devices), built.like, built.layout
    method = {"nets": _spread(parts.nets, devices, settings.mesh.rules), "method": parts.method}
    microbatch = {
        name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=rows)
        for name, leaf in batch.items()
    }
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=built.replicated)

    prepare = jax.jit(partial(step.prepare, **method), out_shardings=rows)
    inputs = (frozen, microbatch, key, scalar)
    lesson = jax.tree.map(lambda x: x.update(sharding=rows), jax.eval_shape(prepare, *inputs))
    gradient = jax.jit(
        partial(step.gradient, **method), out_shardings=(built.replicated, layout.student)
    )
    update = jax.jit(
        partial(
            step.update, optimizer=parts.optimizer, ema_rate=settings.ema_rate,
            max_grad_norm=settings.faults.max_grad_norm,
        ),
        donate_argnums=0, out_shardings=(layout, built.replicated),
    )  # fmt: skip
    times = settings.accumulate
    summed = mesh.bytes_per_device(like.student)
    total = summed if times > 1 else 0
    learnt = gradient.trace(like.student, like.target, frozen.teacher, lesson)
    return [
        Piece("prepare", prepare.trace(*inputs), times, total),
        Piece("gradient", learnt, times, total + mesh.bytes_per_device(lesson)),
        Piece("update", update.trace(like, scalar, like.student), 1, summed),
    ]


def _spread(nets: step.Nets, devices: Mesh, rules: mesh.Rules) -> step.Nets:
    """The networks, each device computing whole layers on its own examples."""

    def on_examples(net: Callable, name: str) -> Callable:
        def call(params, *inputs):
            whole = mesh.fetched(params, name, devices, rules)
            return net(whole, *(mesh.spread(each, devices) for each in inputs))

        return call

    return nets._replace(
        student=on_examples(nets.student, "student"),
        teacher=on_examples(nets.teacher, "unet"),
        encode_text=on_examples(nets.encode_text, "text_encoder"),
        encode_image=lambda params, batch, key: nets.encode_image(
            mesh.fetched(params, "vae", devices, rules), mesh.spread(batch, devices), key
        ),
    )


def _shapes(params: Mapping) -> Mapping:
    """What jax.eval_shape takes for parameters, read or unread, that will be float32."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), params)
