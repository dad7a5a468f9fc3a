"""Says what training would take, without data, weights or, if named, the devices."""

import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from slam_jax import arguments, flops, forecast, pipeline, program
from slam_jax.distill import state
from slam_jax.runtime import aot, chips, mesh, topologies
from slam_jax.settings import Settings, as_dict
from slam_jax.weights import pretrained

# Of the program as JAX hands it to XLA, on one core of the Xeon of benchmarks/results.
_LINES_PER_S = 400


class _Traced(NamedTuple):
    """The train step for devices that hold nothing."""

    places: list[jax.Device]
    devices: Mesh
    teacher: pretrained.Pretrained
    found_in: str
    parts: program.Parts
    like: state.TrainState
    frozen: state.Frozen
    batch: Mapping[str, jax.ShapeDtypeStruct]
    step: jax.stages.Traced


def dry_run(settings: Settings, topology: str | None) -> None:
    """Prints tables for a reader, then the same as one line of JSON.

    topology: devices that need not be here, such as "v5e:16x16" or "h200:8"; None for those that
    are present. UserError as for training, and where that cannot be compiled for.
    """
    mesh.check_rules(**settings.mesh._asdict())
    # A student that starts from another model has the same shapes.
    settings = settings._replace(student=settings.student._replace(start=""))
    traced = _trace(settings, topology, said=True)
    counts = _counts(settings, traced)
    compiled = _compiled(settings, traced, topology)
    chip = chips.find(traced.places)
    print(f"{'planned' if topology else 'compiled'} in {compiled.seconds:.0f} s\n")
    print(forecast.text(counts, compiled, chip))
    line = _setting(settings, traced) | forecast.as_json(counts, compiled, chip)
    print(f"\n{json.dumps(line | {'topology': topology})}", flush=True)


def _trace(settings: Settings, topology: str | None, said: bool = False) -> _Traced:
    """said: prints what it is of as soon as that is known."""
    if topology is None:
        places = jax.devices()
    else:
        places = topologies.devices(topology, settings.attention)
    devices = mesh.make(settings.mesh.axes, places)
    mesh.check_batch(settings.batch_size, mesh.num_batch_shards(devices), settings.accumulate)
    teacher, found_in = arguments.teacher(settings)
    parts = program.parts(settings, teacher)
    built = program.build(settings, parts, devices)
    frozen = arguments.frozen(settings, teacher, devices)
    batch = arguments.batch(settings, teacher, devices)
    if said:
        print(_heading(settings, topology, devices, found_in, batch), flush=True)
    step = built.step.trace(built.like, frozen, batch, arguments.key(devices))
    return _Traced(places, devices, teacher, found_in, parts, built.like, frozen, batch, step)


def lower(settings: Settings, topology: str | None) -> jax.stages.Lowered:
    """The train step as JAX hands it to XLA."""
    return _trace(settings, topology).step.lower()


def _setting(settings: Settings, traced: _Traced) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "program": "dry_run", "device": traced.places[0].device_kind,
        "mesh": dict(traced.devices.shape), "teacher": settings.teacher.model,
        "config": as_dict(settings),
        "batch": {name: [*leaf.shape, leaf.dtype.name] for name, leaf in traced.batch.items()},
        "jax": jax.__version__, "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }  # fmt: skip


def _heading(
    settings: Settings, topology: str | None, devices: Mesh, found_in: str, batch: Mapping
) -> str:
    size = devices.size
    name = "image" if "image" in batch else "moments"
    accumulate, rows, *shape = batch[name].shape
    where = f"{topology}, compiled ahead of time" if topology else "those present"
    axes = " x ".join(f"{axis} {length}" for axis, length in devices.shape.items())
    return "\n".join([
        "dry run: shapes only, no data, no weights",
        f"teacher   {settings.teacher.model}, configs from: {found_in}",
        f"devices   {size} x {devices.devices.flat[0].device_kind} ({where}), mesh {axes}",
        f"batch     {settings.batch_size} = accumulate {accumulate} x {rows}, "
        f"{rows / mesh.num_batch_shards(devices):.0f} on each batch shard; {name} "
        f"{batch[name].dtype.name} {shape}, {batch['input_ids'].shape[-1]} tokens",
        f"networks  student {settings.student.dtype}, remat {settings.student.remat}; "
        f"others {settings.teacher.dtype}",
    ])  # fmt: skip


def _compiled(settings: Settings, traced: _Traced, topology: str | None) -> aot.Compiled:
    """Of the kept results, or compiled; says then how long that is likely to take."""
    lowered = traced.step.lower()

    def announce() -> None:
        num_lines = lowered.as_text().count("\n")
        minutes = num_lines / _LINES_PER_S / 60
        least, most = (max(1, round(factor * minutes)) for factor in (0.5, 2))
        print(
            f"compiling the step, for some {least} to {most} minutes on one core ({num_lines} "
            "lines of StableHLO); the result is kept",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    if topology is None:
        return aot.compiled(lowered, traced.places, announce)
    return aot.planned(lowered, partial(lower, settings, topology), traced.places, announce)


def _counts(settings: Settings, traced: _Traced) -> forecast.Counts:
    like, frozen = traced.like, traced.frozen
    trees = {
        "student": like.student, "target": like.target, "optimizer": like.opt_state,
        "teacher": frozen.teacher, "VAE": frozen.vae, "text encoder": frozen.text_encoder,
        "batch": traced.batch,
    }  # fmt: skip
    both = {settings.student.dtype, settings.teacher.dtype}
    bytes_of = {name: _bytes(tree) for name, tree in trees.items()}
    return forecast.Counts(
        num_devices=len(traced.places),
        batch_size=settings.batch_size,
        microbatches=settings.accumulate,
        num_steps=settings.num_steps,
        in_float32=both == {"float32"},
        flops_of=_flops_per_image(settings, traced.teacher, traced.parts, frozen),
        flops=flops.count(traced.step.jaxpr.jaxpr),
        flops_once=flops.count(traced.step.jaxpr.jaxpr, unrolled=False),
        parameters={name: _size(tree) for name, tree in trees.items()},
        bytes_of=bytes_of,
        changing=sum(bytes_of[name][1] for name in ("student", "target", "optimizer")),
    )


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> tuple[int, int]:
    """In all, and on one device."""
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return whole, mesh.bytes_per_device(tree)


def _flops_per_image(
    settings: Settings, teacher: pretrained.Pretrained, parts: program.Parts, frozen: state.Frozen
) -> dict[str, int]:
    """Of each network for one image, in its passes of a step."""
    nets, student, bare = parts.nets, _bare(parts.student.params), _bare(frozen)
    tokens = arguments.tokens(teacher, (1,))
    pictures = arguments.pictures(settings, teacher, (1,))
    text = jax.eval_shape(nets.encode_text, bare.text_encoder, tokens)
    x = _floats(1, *pipeline.latent_shape(teacher, settings.data.size))
    t, gamma = jax.ShapeDtypeStruct((1,), jnp.int32), _floats(1, 1, 1, 1)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def forward(trained, base, x, t, text, gamma):
        return nets.student(nets.student_params(base, trained), x, t, text, gamma)

    def backward(*inputs):
        return jax.grad(lambda *inputs: jnp.sum(forward(*inputs)))(*inputs)

    calls = 2 * settings.distill.length // settings.distill.stride
    once = _count(forward, student, bare.teacher, x, t, text, gamma)
    both = _count(backward, student, bare.teacher, x, t, text, gamma)
    recomputed = "" if settings.student.remat == "none" else ", recomputation"
    return {
        f"teacher, {calls} calls": calls * _count(nets.teacher, bare.teacher, x, t, text),
        "target, forward": once,
        f"student, forward{recomputed} and backward": both,
        "VAE encoder": _count(nets.encode_image, bare.vae, pictures, key),
        "text encoder": _count(nets.encode_text, bare.text_encoder, tokens),
    }


def _count(function: Any, *inputs: Any) -> int:
    return flops.count(jax.make_jaxpr(function)(*inputs).jaxpr)


def _bare(tree: Any) -> Any:
    """Shapes without places."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
