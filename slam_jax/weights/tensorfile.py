"""One safetensors file: its tensors read when asked for, or written one at a time.

Neither way holds more than one tensor beside what the caller holds.
"""

import dataclasses
import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors
from jax.typing import DTypeLike

from slam_jax.errors import UserError

# Also what may be written. Integer tensors are only ever buffers, and are not read.
_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# What files may call them: safetensors so, Flax as numpy does.
_DTYPES = {spelt: name for name in _FLOATS for spelt in (name, _FLOATS[name])}

# Is called with the size of each tensor that is done, for a progress bar.
Told = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor still in its file; np.asarray(stored) looks into the file.

    shape: in torch's order of axes. dtype: as the file calls it.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    _bytes: mmap.mmap  # of the whole file
    _runs: tuple[tuple[int, int], ...]  # (first byte, number of bytes), in order
    _axes: tuple[int, ...] | None = None  # torch's axes in the file's order, if that is another

    def check(self) -> None:
        """UserError unless its numbers are of a dtype that weights may have."""
        if self.dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {self.name!r} is {self.dtype}; weights must be "
                f"{', '.join(_FLOATS)}, so give a folder that is not quantized"
            )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.check()
        stored_as = np.dtype(_DTYPES[self.dtype])
        self._advise(mmap.MADV_WILLNEED)
        runs = [
            np.ndarray(size // stored_as.itemsize, stored_as, self._bytes, start)
            for start, size in self._runs
        ]
        flat = runs[0] if len(runs) == 1 else np.concatenate(runs)
        axes = self._axes or tuple(range(len(self.shape)))
        array = flat.reshape([self.shape[axis] for axis in axes]).transpose(np.argsort(axes))
        return np.array(array, dtype=dtype, copy=copy)

    def number(self) -> float:
        """The one number in it, which may be an integer: a LoRA's alpha."""
        stored_as = {**_DTYPES, "I64": np.int64, "I32": np.int32}[self.dtype]
        ((start, _),) = self._runs
        return float(np.frombuffer(self._bytes, stored_as, 1, start)[0])

    def forget(self) -> None:
        """Gives back the memory in which the system holds these bytes of the file for us."""
        self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        for start, size in self._runs:
            page = start - start % mmap.PAGESIZE
            if size:
                self._bytes.madvise(advice, page, start + size - page)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Tensors to be written as one, along their first axis; np.asarray(stacked) joins them."""

    parts: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.concatenate(self.parts, dtype=dtype)


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. UserError if it is missing, cut short or other."""
    content = map_file(path)
    try:
        # The library checks that header and length agree.
        safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise broken(path, "safetensors", error) from None
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, tensor in header.items():
        first, end = tensor["data_offsets"]
        run = (start + first, end - first)
        tensors[name] = Stored(path, name, tuple(tensor["shape"]), tensor["dtype"], content, (run,))
    return tensors


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file of weights. UserError if it cannot be read or is only a pointer to it."""
    try:
        with open(path, "rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there"
                )
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path} is cut short: it is empty; copy or download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def broken(path: Path, kind: str, error: Exception) -> UserError:
    """What to say of a file whose bytes are no file of that kind."""
    return UserError(
        f"{path} is cut short or not a {kind} file ({error}); copy or download it again"
    )


def rows(stored: Stored, part: int, num_parts: int) -> Stored:
    """One of so many equal parts of a stored tensor's first axis, still in the file."""
    ((start, size),) = stored._runs
    size //= num_parts
    shape = (stored.shape[0] // num_parts, *stored.shape[1:])
    return dataclasses.replace(stored, shape=shape, _runs=((start + part * size, size),))


def transposed(stored: Stored) -> Stored:
    """A stored tensor's transpose, still in the file."""
    axes = tuple(reversed(range(len(stored.shape))))
    return dataclasses.replace(stored, shape=stored.shape[::-1], _axes=axes)


def metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file, which `read` has read, holds beside its tensors."""
    return safetensors.safe_open(path, framework="numpy").metadata() or {}


def untold(_size: int) -> None:
    """A Told for where nobody looks."""


def write(
    path: Path, tensors: Mapping[str, np.ndarray | Stacked], dtype: DTypeLike | None = None,
    told: Told = untold,
) -> None:  # fmt: skip
    """Write tensors (any strides, as `dtype` or as they are) the way torch's libraries do.

    told: of each tensor that has been written.
    Raises UserError, naming the tensor, when a finite weight does not fit in `dtype`.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        stored_as = np.dtype(dtype or tensors[name].dtype)
        start, end = end, end + tensors[name].size * stored_as.itemsize
        header[name] = {
            "dtype": _FLOATS[stored_as.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(cast(tensors[name], dtype, f"{path}: tensor {name!r}").tobytes())
            told(tensors[name].size)
        file.flush()
        os.fsync(file.fileno())


def cast(tensor: np.ndarray | Stacked, dtype: DTypeLike | None, what: str) -> np.ndarray:
    """`tensor` as `dtype` (None: its own), a C-contiguous copy. UserError on overflow."""
    tensor = np.asarray(tensor)
    with np.errstate(over="ignore"):
        result = np.array(tensor, dtype=dtype, order="C")
    if result.dtype.itemsize < tensor.dtype.itemsize and not np.isfinite(result).all():
        lost = ~np.isfinite(result) & np.isfinite(tensor)
        if lost.any():
            raise UserError(
                f"{what} holds {tensor[lost].flat[0]}, too large for {result.dtype}; use float32"
            )
    return result
