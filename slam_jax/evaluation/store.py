"""What has been measured of which images, in files that outlive a killed run.

A folder holds rows for images 0 to N - 1, in files of a fixed number of images that appear whole
or not at all: whoever starts again does what is missing, and several hosts share the work.
"""

import io
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slam_jax.errors import UserError
from slam_jax.runtime import folder as run_folder

Arrays = dict[str, np.ndarray]  # [B, ...] each

SIZE = 128  # images in a file


def shards(count: int, part: tuple[int, int]) -> list[range]:
    """The images that this host measures; part: (its index, how many hosts there are)."""
    host, num_hosts = part
    mine = range(host * SIZE, count, num_hosts * SIZE)
    return [range(first, min(first + SIZE, count)) for first in mine]


def missing(folder: Path, count: int, part: tuple[int, int]) -> list[range]:
    """Those that have to be measured still."""
    return [shard for shard in shards(count, part) if not _path(folder, shard).exists()]


def fill(folder: Path, missing: list[range], measure: Callable[[range], Arrays]) -> None:
    """Measures them, and writes what comes."""
    for shard in missing:
        buffer = io.BytesIO()
        np.savez(buffer, **measure(shard))
        run_folder.write_atomic(_path(folder, shard), buffer.getvalue())


def read(folder: Path, count: int) -> Arrays:
    """All images, in order; UserError names a file that is damaged or missing."""
    found = [_read(_path(folder, shard), len(shard)) for shard in shards(count, (0, 1))]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def load(path: Path) -> Arrays:
    """The arrays in an .npz; OSError if there is no such file, ValueError if it is none."""
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (
            EOFError, TypeError, MemoryError, NotImplementedError, OSError, RuntimeError,
            SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise ValueError(f"no whole .npz: {error}") from None


def _read(path: Path, count: int) -> Arrays:
    try:
        found = load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); delete it and run again") from None
    if any(len(rows) != count for rows in found.values()):
        raise UserError(f"{path} does not hold {count} images; delete it and run again")
    return found


def _path(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:06d}-{shard.stop - 1:06d}.npz"
