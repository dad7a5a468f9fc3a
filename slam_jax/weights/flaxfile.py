"""One msgpack file of a Flax model folder, as flax.serialization writes it: where its arrays lie.

It holds nested maps of names. An array is an extension of type 1 whose content is again msgpack:
shape, name of the dtype, and the bytes in C order; above 1 GiB it is a map of flat pieces.
Only headers are read here, and nothing that such a file holds is ever executed.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slam_jax.errors import UserError
from slam_jax.weights import names, tensorfile, translate

_CHUNKED = "__msgpack_chunked_array__"

_ARRAY = 1  # the extension's type


class _Run(NamedTuple):
    start: int
    size: int


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    runs: tuple[_Run, ...]


def read(path: Path) -> dict[str, tensorfile.Stored]:
    """The arrays of a msgpack file by their torch names (names.from_flax), torch's axes.

    Raises UserError if the file is missing, cut short, other, or has two arrays of one name.
    """
    content = tensorfile.map_file(path)
    try:
        tree = _value(content)
        if not isinstance(tree, dict) or content.tell() != len(content):
            raise ValueError("it is not one map")
        arrays = dict(_arrays(tree, ""))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise tensorfile.broken(path, "Flax msgpack", error) from None
    tensors: dict[str, tensorfile.Stored] = {}
    for name, array in arrays.items():
        torch_name = names.from_flax(name)
        if torch_name in tensors:
            raise UserError(
                f"{path} holds {name!r} and {tensors[torch_name].name!r}, which are the same "
                "tensor; remove one"
            )
        axes = translate.linen_axes(name.rpartition("/")[2], len(array.shape))
        shape = tuple(array.shape[axis] for axis in np.argsort(axes))
        tensors[torch_name] = tensorfile.Stored(
            path, name, shape, array.dtype, content, array.runs, axes
        )
    return tensors


def _arrays(tree: dict, prefix: str) -> Iterator[tuple[str, _Array]]:
    """(path joined with slashes, array) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED in value:
            value = _joined(value)
        if isinstance(value, dict):
            yield from _arrays(value, f"{prefix}{key}/")
        elif isinstance(value, _Array):
            yield f"{prefix}{key}", value
        else:
            raise ValueError(f"{prefix}{key} is no array")


def _joined(chunked: dict) -> _Array:
    """One array of the pieces in which flax keeps a large one."""
    pieces, shape = (
        [chunked[key][str(i)] for i in range(len(chunked[key]))] for key in ("chunks", "shape")
    )
    if not all(isinstance(piece, _Array) for piece in pieces):
        raise ValueError("a piece of an array is no array")
    return _checked(
        tuple(shape), pieces[0].dtype, tuple(run for piece in pieces for run in piece.runs)
    )


def _checked(shape: tuple[int, ...], dtype: str, runs: tuple[_Run, ...]) -> _Array:
    found = sum(run.size for run in runs)
    if found != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{found} bytes for {dtype} {list(shape)}")
    return _Array(shape, dtype, runs)


def _value(content: mmap.mmap):
    """The value that begins at the file's position, which moves behind it."""
    head = content.read_byte()
    if head < 0x80:
        return head
    if head < 0x90:
        return _map(content, head - 0x80)
    if head < 0xA0:
        return _list(content, head - 0x90)
    if head < 0xC0:
        return _text(content, head - 0xA0)
    if head in (0xC2, 0xC3):
        return head == 0xC3
    if 0xCC <= head <= 0xCF:
        return _number(content, 1 << (head - 0xCC))
    if 0xD4 <= head <= 0xD8:
        return _array(content, 1 << (head - 0xD4))
    if head not in _COUNTED:
        raise ValueError(f"byte {head:#x} at {content.tell() - 1}")
    read_counted, width = _COUNTED[head]
    return read_counted(content, _number(content, width))


def _map(content: mmap.mmap, count: int) -> dict:
    return {str(_value(content)): _value(content) for _ in range(count)}


def _list(content: mmap.mmap, count: int) -> list:
    return [_value(content) for _ in range(count)]


def _text(content: mmap.mmap, size: int) -> str:
    return _take(content, size).decode()


def _skipped(content: mmap.mmap, size: int) -> _Run:
    start = content.tell()
    content.seek(start + size)
    return _Run(start, size)


def _array(content: mmap.mmap, size: int) -> _Array:
    """The array in an extension of `size` bytes; its type comes first, and is not counted."""
    kind = content.read_byte()
    end = content.tell() + size
    if kind != _ARRAY:
        raise ValueError(f"extension of type {kind}")
    shape, dtype, run = _value(content)
    if content.tell() != end:
        raise ValueError(f"an array ends at byte {content.tell()}, not {end}")
    return _checked(tuple(shape), dtype, (run,))


# First byte -> what reads the value, and the width of the count that comes before it.
_COUNTED = {
    0xC4: (_skipped, 1), 0xC5: (_skipped, 2), 0xC6: (_skipped, 4),
    0xC7: (_array, 1), 0xC8: (_array, 2), 0xC9: (_array, 4),
    0xD9: (_text, 1), 0xDA: (_text, 2), 0xDB: (_text, 4),
    0xDC: (_list, 2), 0xDD: (_list, 4), 0xDE: (_map, 2), 0xDF: (_map, 4),
}  # fmt: skip


def _number(content: mmap.mmap, width: int) -> int:
    return int.from_bytes(_take(content, width), "big")


def _take(content: mmap.mmap, size: int) -> bytes:
    taken = content.read(size)
    if len(taken) != size:
        raise ValueError("it ends too early")
    return taken
