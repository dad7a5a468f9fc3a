"""Parts of a program that each device runs on its own examples, instead of XLA cutting them.

The examples must be spread over all axes of the mesh.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from slam_jax.runtime import mesh


def scope(devices: Mesh) -> contextlib.AbstractContextManager:
    """Within a traced program: where `on_own_examples` finds the mesh."""
    return jax.sharding.use_abstract_mesh(devices.abstract_mesh)


def on_own_examples(function: Callable) -> Callable:
    """function of arrays [B, ...] to one such, called by every device of the scope on its own part.

    For what XLA cannot cut by itself.
    """

    def call(*arrays: jax.Array) -> jax.Array:
        devices = jax.sharding.get_abstract_mesh()
        if devices.empty:
            return function(*arrays)
        rows = PartitionSpec(devices.axis_names)
        return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)

    return call


def mean_over_devices(devices: Mesh) -> Callable[[Callable], Callable]:
    """Of function(examples, *copied) -> means, makes one that every device calls on its own part.

    What comes back is the mean over devices, summed as one array: CPU devices meet once for each
    array, which for the gradients of a small network takes longer than its sum (LOG.md). copied:
    trees that lie whole on every device.
    """
    rows, whole = PartitionSpec(devices.axis_names), PartitionSpec()

    def wrap(function: Callable) -> Callable:
        def own(examples: Any, *copied: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[None], function(examples, *copied))

        def call(examples: Any, *copied: Any) -> Any:
            specs = (rows, *[whole] * len(copied))
            each = jax.shard_map(own, mesh=devices, in_specs=specs, out_specs=rows, check_vma=False)
            means = each(examples, *copied)
            _, parts = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], means))
            return parts(jax.vmap(lambda own: ravel_pytree(own)[0])(means).mean(axis=0))

        return call

    return wrap


def over_devices(devices: Mesh, rules: mesh.Rules) -> Callable[[Callable], Callable] | None:
    """mean_over_devices where that is faster: for CPUs with copies of everything; else None.

    Accelerators sum many arrays at once, and one array of all gradients would take memory there.
    """
    copied = not any(axes for _, axes in rules)
    on_cpus = devices.devices.flat[0].platform == "cpu"
    if on_cpus and copied and mesh.num_batch_shards(devices) == devices.size > 1:
        return mean_over_devices(devices)
    return None


def is_here() -> bool:
    """Within a traced program: whether a device computes on its own here, on whole arrays."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
