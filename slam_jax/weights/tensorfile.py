"""One safetensors file: its tensors read when asked for, or written one at a time.

Neither way holds more than one tensor beside what the caller holds.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jax.typing import DTypeLike

from slam_jax.errors import UserError

# Also what may be written. Integer tensors are only ever buffers, and are not read.
_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor still in its file; np.asarray(stored) reads it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    _file: Any
    _view: Callable[[np.ndarray], np.ndarray] = np.asarray

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tensor = self._file.get_slice(self.name)
        if tensor.get_dtype() not in _FLOATS.values():
            raise UserError(
                f"{self.path}: tensor {self.name!r} is {tensor.get_dtype()}; weights must be "
                f"{', '.join(_FLOATS)}, so give a folder that is not quantized"
            )
        return np.asarray(self._view(self._file.get_tensor(self.name)), dtype=dtype)


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
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        file = safetensors.safe_open(path, framework="numpy")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        if start.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there"
            ) from None
        raise UserError(
            f"{path} is cut short or not a safetensors file ({error}); copy or download it again"
        ) from None
    return {
        name: Stored(path, name, tuple(file.get_slice(name).get_shape()), file)
        for name in file.keys()  # noqa: SIM118 (no iterator)
    }


def rows(stored: Stored, part: int, num_parts: int) -> Stored:
    """One of so many equal parts of a stored tensor's first axis, still in the file."""
    shape = (stored.shape[0] // num_parts, *stored.shape[1:])
    return dataclasses.replace(
        stored, shape=shape, _view=lambda tensor: np.split(tensor, num_parts)[part]
    )


def transposed(stored: Stored) -> Stored:
    """A stored tensor's transpose, still in the file."""
    return dataclasses.replace(stored, shape=stored.shape[::-1], _view=np.transpose)


def write(
    path: Path, tensors: Mapping[str, np.ndarray | Stacked], dtype: DTypeLike | None = None
) -> None:
    """Write tensors (any strides, as `dtype` or as they are) the way torch's libraries do.

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
        file.flush()
        os.fsync(file.fileno())


def cast(tensor: np.ndarray | Stacked, dtype: DTypeLike | None, what: str) -> np.ndarray:
    """`tensor` as `dtype` (None: its own), a C-contiguous copy. UserError on overflow."""
    tensor = np.asarray(tensor)
    with np.errstate(over="ignore"):
        result = np.array(tensor, dtype=dtype, order="C")
    if result.dtype.itemsize < tensor.dtype.itemsize:
        # isfinite does not exist for bfloat16: it is asked in float32.
        lost = ~np.isfinite(result.astype(np.float32)) & np.isfinite(tensor.astype(np.float32))
        if lost.any():
            raise UserError(
                f"{what} holds {tensor[lost].flat[0]}, too large for {result.dtype}; use float32"
            )
    return result
