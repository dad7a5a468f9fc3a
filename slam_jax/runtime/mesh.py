"""The devices as a mesh, and how arrays lie on it. Knows nothing of the method.

Sharding is data: an ordered list of (regex, axes) pairs. The first regex that matches the
whole path of an array gives the mesh axis of each of its dimensions; () keeps a copy on every
device. What is trained is "student/conv_in/kernel", "target/...", "opt_state/..."; what is not,
"unet/conv_in/kernel", "vae/...", "text_encoder/...".
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slam_jax.errors import UserError

Rules = Sequence[tuple[str, Sequence[str | None]]]


def make(axes: Sequence[tuple[str, int]]) -> Mesh:
    """All devices in a grid with the given (name, size) axes; the size -1 takes the rest."""
    devices = jax.devices()
    names = tuple(name for name, _ in axes)
    fixed = math.prod(size for _, size in axes if size != -1)
    sizes = tuple(len(devices) // fixed if size == -1 else size for _, size in axes)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh.axes {dict(zip(names, sizes, strict=True))} hold {math.prod(sizes)} devices "
            f"and {len(devices)} are present; give one axis the size -1"
        )
    return Mesh(np.array(devices).reshape(sizes), names)


def check_rules(axes: Sequence[tuple[str, int]], rules: Rules) -> None:
    """Refuses a regex that does not compile and an axis that the mesh lacks. Touches no device."""
    if not all(len(axis) == 2 for axis in axes) or not all(len(rule) == 2 for rule in rules):
        raise UserError("mesh.axes are pairs (name, size), mesh.rules pairs (regex, axes)")
    names = [name for name, _ in axes]
    if "data" not in names or sum(size == -1 for _, size in axes) > 1:
        raise UserError(f"mesh.axes {tuple(axes)}: one axis is named data, at most one has size -1")
    for pattern, rule in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"mesh.rules: {pattern!r} is not a regex: {error}") from None
        for axis in rule:
            if axis is not None and axis not in names:
                raise UserError(
                    f"mesh.rules: {pattern!r} names the axis {axis!r}; there are {names}"
                )


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree with each array replaced by its NamedSharding, from the first rule that matches."""

    def resolve(path, _leaf) -> NamedSharding:
        return _sharding(jax.tree_util.keystr(path, simple=True, separator="/"), mesh, rules)

    return jax.tree_util.tree_map_with_path(resolve, tree)


def _sharding(name: str, mesh: Mesh, rules: Rules) -> NamedSharding:
    for pattern, rule in rules:
        if re.fullmatch(pattern, name):
            return NamedSharding(mesh, PartitionSpec(*rule))
    raise UserError(f"mesh.rules match no {name!r}; end them with ('.*', ())")


def placer(mesh: Mesh, rules: Rules) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """(path, array on every host) -> the array as the rules lay it; no device gets more of it."""

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        layout = _sharding("/".join(path), mesh, rules)
        return jax.make_array_from_callback(array.shape, layout, lambda part: array[part])

    return place


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [accumulate, B, ...]: the examples B split over the axis `data`."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def check_batch(batch_size: int, num_shards: int, accumulate: int) -> None:
    """Refuses a batch that does not split into `accumulate` parts on each of the shards."""
    unit = num_shards * accumulate
    if batch_size < 1 or batch_size % unit:
        below = batch_size // unit * unit
        use = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {num_shards} devices x "
            f"accumulate {accumulate}; use {use}"
        )


def put_batch(batch: Mapping[str, np.ndarray], accumulate: int, mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part [B, ...] of a batch as global arrays [accumulate, B / accumulate, ...].

    Microbatch i has every accumulate-th example from i on, so that consecutive rows on each host
    make the same global arrays whatever the number of hosts. Cut here, on the host, so that each
    is spread over all devices and the step moves no example between them.
    """

    def put(x: np.ndarray) -> jax.Array:
        parts = np.stack([x[first::accumulate] for first in range(accumulate)])
        return jax.make_array_from_process_local_data(batch_sharding(mesh), parts)

    return {name: put(x) for name, x in batch.items()}
