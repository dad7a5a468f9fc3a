"""Parts of a program that each device runs on its own examples, instead of XLA cutting them.

The examples must be spread over all axes of the mesh.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from slam_jax.errors import UserError
from slam_jax.runtime import mesh

# Of the kernels for attention: whose, and the names that JAX gives those devices.
_MADE_FOR = {"flash": ("TPUs", ("tpu",)), "cudnn": ("NVIDIA GPUs", ("gpu", "cuda"))}


def check_attention(kernel: str, devices: Mesh) -> None:
    """UserError if attention's kernel does not suit the devices. Touches none."""
    owner, platforms = _MADE_FOR.get(kernel, ("", ()))
    platform = devices.devices.flat[0].platform
    if owner and platform not in platforms:
        raise UserError(f"attention={kernel} is made for {owner}, not for {platform}; use xla")
    shards = mesh.num_batch_shards(devices)
    if owner and shards != devices.size:
        raise UserError(
            f"attention={kernel} needs the examples on all {devices.size} devices, and mesh.axes "
            f"spread them over {shards}; use the axes data and fsdp alone"
        )


def scope(devices: Mesh) -> contextlib.AbstractContextManager:
    """Within a traced program: where `on_own_examples` finds the mesh."""
    return jax.sharding.use_abstract_mesh(devices.abstract_mesh)


def on_own_examples(function: Callable) -> Callable:
    """function of arrays [B, ...] to one such, called by every device of the scope on its own part.

    For what XLA cannot cut by itself. As it is where a device computes on its own already.
    """

    def call(*arrays: jax.Array) -> jax.Array:
        devices = jax.sharding.get_abstract_mesh()
        if devices.empty or devices.manual_axes:
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


def laid_out_as_parameters(function: Callable) -> Callable:
    """Of function(...) -> gradients, makes one whose convolutions' kernels lie as [H, W, I, O].

    cuDNN gives them as [O, H, W, I], and XLA would have the optimizer's state follow: each step all
    of it would be transposed there and back, instead of the gradient alone (LOG.md), which is done
    before anything else is made of it.
    """

    def as_it_is_indexed(gradient: jax.Array) -> jax.Array:
        if gradient.ndim < 4:
            return gradient
        return with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))

    def call(*arguments: Any) -> Any:
        return jax.lax.optimization_barrier(jax.tree.map(as_it_is_indexed, function(*arguments)))

    return call


def over_devices(devices: Mesh, rules: mesh.Rules) -> Callable[[Callable], Callable] | None:
    """How the gradient is taken where XLA's own way is slower; else None.

    mean_over_devices for CPUs with copies of everything: accelerators sum many arrays at once, and
    one array of all gradients would take memory there. laid_out_as_parameters for GPUs.
    """
    platform = devices.devices.flat[0].platform
    if platform in ("gpu", "cuda"):
        return laid_out_as_parameters
    copied = not any(axes for _, axes in rules)
    if platform == "cpu" and copied and mesh.num_batch_shards(devices) == devices.size > 1:
        return mean_over_devices(devices)
    return None


def is_here() -> bool:
    """Within a traced program: whether a device computes on its own here, on whole arrays."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
