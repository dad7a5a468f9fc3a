"""Between torch's tensors and Linen's parameters: one rule for names, one for axes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from slam_jax.errors import UserError
from slam_jax.weights import names, tensorfile

# torch has [out, in] and [out, in, height, width] where Linen has [in, out] and
# [height, width, in, out]; every other leaf is the same in both.
_TO_LINEN = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}

# (path, parameter) -> the parameter on its devices.
Place = Callable[[tuple[str, ...], np.ndarray], jax.Array]

_REMEDY = "weights and config.json must be of one model: take both from the same folder"


@dataclasses.dataclass(frozen=True)
class Unread:
    """A parameter that is still a torch tensor, mostly one in a file; `load` reads it.

    shape: as Linen has it, which torch calls _torch_shape.
    """

    shape: tuple[int, ...]
    _tensor: Any
    _torch_shape: tuple[int, ...]
    _axes: tuple[int, ...]
    _what: str  # file and name, for messages

    def read(self, dtype: DTypeLike | None) -> np.ndarray:
        """The parameter as `dtype`, a copy of its own; of the file nothing stays in memory."""
        tensor = np.asarray(self._tensor).reshape(self._torch_shape).transpose(self._axes)
        parameter = tensorfile.cast(tensor, dtype, self._what)
        if isinstance(self._tensor, tensorfile.Stored):
            self._tensor.forget()
        return parameter


def to_params(
    tensors: Mapping[str, Any], shapes: Mapping, source: str, *, dtype: DTypeLike | None = None
) -> dict:
    """Torch tensors by name -> the parameters whose shapes `shapes` (from jax.eval_shape) gives.

    As `find` and `load` have it.
    """
    return load(find(tensors, shapes, source), dtype=dtype)


def find(tensors: Mapping[str, Any], shapes: Mapping, source: str) -> dict:
    """The tree of `shapes` (from jax.eval_shape), its leaves Unread; nothing is read.

    tensors: torch's, numpy arrays or anything with .shape that numpy can read. source: the file,
    for messages. Every tensor is used exactly once: UserError names one that is unknown, missing,
    misshapen or of integers.
    """
    check(tensors, shapes, source)
    params = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name = names.torch_name(path)
        params[path] = Unread(
            tuple(leaf.shape), tensors[name], torch_shape(path, leaf.shape),
            linen_axes(path[-1], len(leaf.shape)), _describe(tensors[name], name, source),
        )  # fmt: skip
    return traverse_util.unflatten_dict(params)


def load(params: Mapping, *, dtype: DTypeLike | None = None, place: Place | None = None) -> dict:
    """What `find` found, read one by one, as `dtype`; None keeps each tensor's own. Others stay.

    place: takes each parameter when it is read, and may send it to its devices; so the host holds
    one at a time. Without, the parameters are numpy arrays.
    """
    unread = traverse_util.flatten_dict(params)
    loaded = dict(unread)
    # The largest first: when the copy of one is widest, few others are there yet.
    for path in sorted(unread, key=lambda path: -math.prod(unread[path].shape)):
        if isinstance(unread[path], Unread):
            parameter = unread[path].read(dtype)
            loaded[path] = parameter if place is None else place(path, parameter)
    return traverse_util.unflatten_dict(loaded)


def to_tensors(params: Mapping) -> dict[str, np.ndarray]:
    """Parameters -> torch tensors by name, as views where the parameters are on the host."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        tensor = np.asarray(leaf)
        if path[-1] == "kernel":
            tensor = tensor.transpose(_TO_TORCH[tensor.ndim])
        tensors[names.torch_name(path)] = tensor
    return tensors


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a torch file of the parameter at `path` with Linen shape `shape`."""
    if path[-1] == "kernel":
        return tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
    return tuple(shape)


def torch_shapes(shapes: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes in a torch file, by name, of the tree `shapes`."""
    leaves = traverse_util.flatten_dict(shapes)
    found = {names.torch_name(path): torch_shape(path, leaves[path].shape) for path in leaves}
    assert len(found) == len(leaves), "two parameters have the same torch name"
    return found


def linen_axes(leaf: str, ndim: int) -> tuple[int, ...]:
    """Torch's axes in the order in which Linen has them, for a leaf of that name."""
    unchanged = tuple(range(ndim))
    return {ndim: unchanged, **_TO_LINEN}[ndim] if leaf == "kernel" else unchanged


def check(tensors: Mapping[str, Any], shapes: Mapping, source: str) -> None:
    """UserError unless `tensors` has exactly the names and shapes that the tree `shapes` needs."""
    compare(tensors, torch_shapes(shapes), source, _REMEDY)


def compare(
    tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], source: str, remedy: str
) -> None:
    """UserError, ending in `remedy`, unless `tensors` has exactly these names and shapes."""
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - wanted.keys())
    if missing:
        raise UserError(f"{source} lacks tensor {missing[0]!r}{_and_more(missing)}; {remedy}")
    if unknown:
        what = _describe(tensors[unknown[0]], unknown[0], source)
        raise UserError(f"{what} is unknown{_and_more(unknown)}; {remedy}")
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape)
        as_convolution = names.is_vae_attention(name) and found == (*shape, 1, 1)
        if found != shape and not as_convolution:
            raise UserError(
                f"{_describe(tensors[name], name, source)} has shape {list(found)}, "
                f"config.json asks for {list(shape)}; {remedy}"
            )
        if isinstance(tensors[name], tensorfile.Stored):
            tensors[name].check()


def _describe(tensor: Any, name: str, source: str) -> str:
    """File and name of a tensor, as its own file has them."""
    if isinstance(tensor, tensorfile.Stored):
        source, name = str(tensor.path), tensor.name
    return f"{source}: tensor {name!r}"


def _and_more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
