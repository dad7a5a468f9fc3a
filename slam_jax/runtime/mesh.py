"""The devices as a mesh, and how arrays lie on it. Knows nothing of the method.

Sharding is data: an ordered list of (regex, rule) pairs, of which the first regex that matches the
whole path of an array counts. The rule () keeps a copy on every device; "fsdp" cuts the array along
its longest dimension that the axis of that name divides, and leaves small ones whole; a tuple of
axes says it dimension by dimension. What is trained is "student/conv_in/kernel", "target/...",
"opt_state/..."; what is not, "unet/conv_in/kernel", "vae/...", "text_encoder/...".

Examples are spread over the axes data and fsdp alike: with fsdp, devices hold different parts of
the state and fetch the rest when it is needed, layer by layer.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slam_jax.errors import UserError

Rules = Sequence[tuple[str, str | Sequence[str | None]]]

# Over which the examples are spread, as far as the mesh has them.
_BATCH_AXES = ("data", "fsdp")
# Elements of an array that is not worth cutting: fetching its parts takes longer than they save.
_SMALL = 2**12


def make(axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices in a grid with the given (name, size) axes; the size -1 takes the rest.

    devices: all that are present unless given.
    """
    devices = jax.devices() if devices is None else devices
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
    if not all(_is_pair(each, int) for each in axes) or not all(
        _is_pair(each, str | tuple | list) for each in rules
    ):
        raise UserError(
            f"mesh.axes {tuple(axes)} must be pairs (name, size), such as (('data',-1),), and "
            f"mesh.rules {tuple(rules)} pairs (regex, axes), such as (('.*',()),)"
        )
    names, sizes = ([each[part] for each in axes] for part in (0, 1))
    if "data" not in names or len({*names}) < len(names) or sizes.count(-1) > 1:
        raise UserError(
            f"mesh.axes {tuple(axes)}: one axis is named data, no two have one name, at most one "
            "has size -1"
        )
    if not all(size == -1 or size > 0 for size in sizes):
        raise UserError(f"mesh.axes {tuple(axes)}: sizes are positive, or -1 for the rest")
    for pattern, rule in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"mesh.rules: {pattern!r} is not a regex: {error}") from None
        for axis in (rule,) if isinstance(rule, str) else rule:
            if axis is not None and axis not in names:
                raise UserError(
                    f"mesh.rules: {pattern!r} names the axis {axis!r}; there are {names}"
                )


def _is_pair(value: Any, second: Any) -> bool:
    """Of a string and an instance of `second`, a type or several."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    return is_pair and isinstance(value[0], str) and isinstance(value[1], second)


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree with each array replaced by its NamedSharding, from the first rule that matches."""

    def resolve(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _sharding(name, leaf.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(resolve, tree)


def placed(shapes: Any, mesh: Mesh, rules: Rules) -> Any:
    """A tree of jax.ShapeDtypeStruct, each with its sharding."""
    layout = shardings(shapes, mesh, rules)
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, layout)


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> NamedSharding:
    for pattern, rule in rules:
        if re.fullmatch(pattern, name):
            axes = _cut_longest(shape, rule, mesh.shape[rule]) if isinstance(rule, str) else rule
            return NamedSharding(mesh, PartitionSpec(*axes))
    raise UserError(f"mesh.rules match no {name!r}; end them with ('.*', ())")


def _cut_longest(shape: tuple[int, ...], axis: str, size: int) -> tuple[str | None, ...]:
    """The axis at the longest dimension that `size` divides, the last of equal ones."""
    divisible = [(length, place) for place, length in enumerate(shape) if length % size == 0]
    if not divisible or math.prod(shape) < _SMALL:
        return ()
    _, place = max(divisible)
    return (None,) * place + (axis,)


def fetched(tree: Any, name: str, mesh: Mesh, rules: Rules) -> Any:
    """Within a traced program: the tree, which the rules know as `name`, as layers use it.

    What is cut over the axes of the examples is fetched whole where it is used. Without being told,
    XLA may as well leave kernels cut and move activations instead, which are far larger.
    """
    layout = shardings({name: tree}, mesh, rules)[name]
    whole = jax.tree.map(lambda leaf: NamedSharding(mesh, _without_batch(leaf.spec)), layout)

    @jax.custom_vjp
    def fetch(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, whole)

    def back(_, gradient: Any) -> tuple[Any]:
        # Of the sum over devices each gets its part alone.
        return (jax.lax.with_sharding_constraint(gradient, layout),)

    fetch.defvjp(lambda tree: (fetch(tree), None), back)
    return fetch(tree)


def _without_batch(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis in _BATCH_AXES else axis for axis in spec))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Within a traced program: arrays [B, ...] with their examples spread over the devices."""
    return jax.lax.with_sharding_constraint(tree, rows_sharding(mesh))


def placer(mesh: Mesh, rules: Rules) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """(path, array on every host) -> the array as the rules lay it; no device gets more of it."""

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        layout = _sharding("/".join(path), array.shape, mesh, rules)
        return jax.make_array_from_callback(array.shape, layout, lambda part: array[part])

    return place


def gather(tree: Any, mesh: Mesh) -> Any:
    """The tree as numpy arrays on every host, however it lies; devices hold one leaf at a time.

    All hosts must call it.
    """
    whole = jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
    return jax.tree.map(lambda leaf: jax.device_get(whole(leaf)), tree)


def total(mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    """(numbers [n] of each host) -> their sums over all hosts; nothing waits for them.

    All hosts must call it.
    """
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    add = jax.jit(partial(jnp.sum, axis=0), out_shardings=replicated(mesh))

    def over_hosts(numbers: np.ndarray) -> jax.Array:
        # The host's numbers on its first device, zeros on the others.
        mine = np.zeros((len(rows.addressable_devices), *numbers.shape), numbers.dtype)
        mine[0] = numbers
        return add(_put(rows, mine))

    return over_hosts


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [accumulate, B, ...]: the examples B split over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, _batch_axes(mesh)))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of a microbatch [B, ...]: the same."""
    return NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))


def bytes_per_device(tree: Any) -> int:
    """Of arrays, or of shapes that have their places."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts the examples of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in mesh.axis_names if axis in _BATCH_AXES)


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
        return _put(batch_sharding(mesh), parts)

    return {name: put(x) for name, x in batch.items()}


def _put(layout: NamedSharding, mine: np.ndarray) -> jax.Array:
    """This host's part of an array as part of the global one."""
    # With several hosts JAX takes this for a transfer that nobody asked for.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(layout, mine)
