"""The train step of an experiment on a mesh, before any array is there to run it on."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from slam_jax import experiment, pipeline
from slam_jax.distill import loss, optimizer, state, step
from slam_jax.runtime import apart, executables, mesh
from slam_jax.settings import Settings
from slam_jax.weights import pretrained


class Parts(NamedTuple):
    """What settings and a teacher decide, wherever it will run."""

    student: pretrained.Component  # its config, and what is trained of it, as it starts, unread
    nets: step.Nets
    method: loss.Method
    optimizer: optax.GradientTransformation
    configs: tuple  # of the student, and of the teacher's parts, as JSON can hold them


class Program(NamedTuple):
    """The same on a mesh."""

    first: Callable  # trained parameters, float32 -> TrainState of step 0
    like: state.TrainState  # shapes, with the sharding of each array
    layout: state.TrainState  # shardings alone
    replicated: NamedSharding
    step: Callable  # jitted: (TrainState, Frozen, batch, key) -> (TrainState, metrics)
    lower: Callable  # step.lower, which traces only what no process has traced before


def parts(settings: Settings, teacher: pretrained.Pretrained) -> Parts:
    """Touches no device; of the teacher, configs and shapes alone are looked at."""
    student = experiment.student(settings, teacher.unet)
    mu_dtype = pipeline.dtype(settings.optimizer.mu_dtype)
    return Parts(
        student=student,
        nets=experiment.nets(settings, teacher, student.config, apart.on_own_examples),
        method=experiment.method(settings.distill, teacher.scheduler),
        optimizer=optimizer.adamw(**settings.optimizer._asdict() | {"mu_dtype": mu_dtype}),
        configs=(student.config, pretrained.without_params(teacher)),
    )


def build(settings: Settings, parts: Parts, devices: Mesh) -> Program:
    """The train step and the layout of its state; UserError if attention's kernel does not suit."""
    apart.check_attention(settings.attention, devices)
    first = partial(state.init, optimizer=parts.optimizer)
    bare = jax.eval_shape(first, _shapes(parts.student.params))
    like = mesh.placed(bare, devices, settings.mesh.rules)
    layout = jax.tree.map(lambda leaf: leaf.sharding, like)
    replicated = mesh.replicated(devices)
    nets = _spread(parts.nets, devices, settings.mesh.rules)
    function = partial(
        step.train_step, nets=nets, method=parts.method, optimizer=parts.optimizer,
        ema_rate=settings.ema_rate, num_steps=settings.num_steps,
        max_grad_norm=settings.faults.max_grad_norm,
        over_devices=apart.over_devices(devices, settings.mesh.rules),
    )  # fmt: skip
    options = {"donate_argnums": 0, "out_shardings": (layout, replicated)}
    lower = partial(executables.lower, function, "train_step", _decisive(settings, parts))
    return Program(
        first, like, layout, replicated, jax.jit(function, **options), partial(lower, **options)
    )


def _decisive(settings: Settings, parts: Parts) -> tuple:
    """All that the train step depends on, but for the shapes of what it takes.

    Settings count unless they are known not to, so that a new one does.
    """
    student = settings.student._replace(start="", cond_proj="")
    bare = settings._replace(
        seed=0, teacher=settings.teacher.dtype, student=student, data=None, eval=None,
        checkpoint=None, faults=settings.faults.max_grad_norm, log=None,
    )  # fmt: skip
    return bare, parts.configs


def _spread(nets: step.Nets, devices: Mesh, rules: mesh.Rules) -> step.Nets:
    """The networks, each device computing whole layers on its own examples."""

    def on_examples(net: Callable, name: str) -> Callable:
        def call(params, *inputs):
            if apart.is_here():
                return net(params, *inputs)
            whole = mesh.fetched(params, name, devices, rules)
            with apart.scope(devices):
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
