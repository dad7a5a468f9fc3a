"""Samples in Parquet files: a column of picture files, one of captions, and others.

A row can be had only with the whole row group around it, often 100 MB. That suits `prepare`,
which reads in order; for shuffled training make a latent cache of it, or row groups of few rows.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from slam_jax.data import captions
from slam_jax.data.sample import Sample
from slam_jax.errors import BadSample, UserError

_IMAGE = "image"
_CAPTIONS = ("text", "caption", "TEXT", "prompt")
_NUM_THREADS = 16
_NUM_GROUPS = 4  # decoded ones that a process keeps
_LOCK = threading.Lock()


class File(NamedTuple):
    """A Parquet file as it was when it was found."""

    path: str
    size: int
    time: int  # ns, of its last change
    ends: tuple[int, ...]  # rows up to and with each row group


@dataclasses.dataclass(frozen=True)
class Tables:
    """The rows of all files, one file after the other; their keys are row numbers."""

    files: tuple[File, ...]
    ends: tuple[int, ...]  # rows up to and with each file

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sample:
        """BadSample, saying where it lies."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        file = self.files[number]
        try:
            return _sample(file, row)
        except BadSample as bad:
            raise BadSample(bad.reason, file.path, str(row)) from None


def opened(paths: Sequence[str]) -> Tables:
    """The source, of which the footers are read.

    UserError for a file that is no Parquet or lacks a column.
    """
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        files = tuple(pool.map(_file, paths))
    return Tables(files, tuple(itertools.accumulate(file.ends[-1] for file in files)))


def _file(path: str) -> File:
    try:
        status = os.stat(path)
        with parquet.ParquetFile(path) as file:
            _columns(path, file.schema_arrow)
            groups = range(file.num_row_groups)
            sizes = [file.metadata.row_group(number).num_rows for number in groups]
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} as Parquet ({reason}); fetch it again") from None
    return File(path, status.st_size, status.st_mtime_ns, (0, *itertools.accumulate(sizes)))


class _Columns(NamedTuple):
    image: str
    caption: str
    others: tuple[str, ...]  # numbers and strings


def _columns(path: str, schema: pyarrow.Schema) -> _Columns:
    """UserError if there are no pictures or captions among them."""
    types = dict(zip(schema.names, schema.types, strict=True))
    caption = next((name for name in _CAPTIONS if name in types and _is_text(types[name])), None)
    if caption is None or _IMAGE not in types or not _is_image(types[_IMAGE]):
        raise UserError(
            f"{path} has columns {', '.join(types)}; it must have {_IMAGE!r}, picture files as "
            f"bytes or Hugging Face's struct of bytes and path, and one of {', '.join(_CAPTIONS)}"
        )
    others = [name for name in types if name not in (_IMAGE, caption) and _is_scalar(types[name])]
    return _Columns(_IMAGE, caption, tuple(others))


def _is_image(kind: pyarrow.DataType) -> bool:
    """Or a column of nothing, which a file without rows can have."""
    if pyarrow.types.is_struct(kind):
        fields = {field.name: field.type for field in kind.fields}
        return "bytes" in fields and _is_image(fields["bytes"])
    is_binary = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    return is_binary or pyarrow.types.is_null(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_string = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return is_string or pyarrow.types.is_null(kind)


def _is_scalar(kind: pyarrow.DataType) -> bool:
    is_number = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)
    return is_number or pyarrow.types.is_boolean(kind) or _is_text(kind)


def _sample(file: File, row: int) -> Sample:
    group = bisect.bisect_right(file.ends, row) - 1
    with _LOCK:  # threads side by side want the same group
        decoded = _decoded(file, group)
    if decoded is None:
        raise BadSample("unreadable row group")
    columns, table = decoded

    def cell(name: str) -> Any:
        return table.column(name)[row - file.ends[group]].as_py()

    image = cell(columns.image)
    if isinstance(image, dict):
        image = image["bytes"]
    if image is None:
        raise BadSample("missing image")
    try:
        caption = captions.checked(cell(columns.caption))
        fields = {name: cell(name) for name in columns.others}
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None
    return Sample(image, caption, file.path, str(row), fields)


@functools.lru_cache(_NUM_GROUPS)
def _decoded(file: File, group: int) -> tuple[_Columns, Any] | None:
    """A row group; None if it cannot be read, or the file is not the one that was found."""
    try:
        status = os.stat(file.path)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.time):
            return None
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as opened_file:
            columns = _columns(file.path, opened_file.schema_arrow)
            names = [columns.image, columns.caption, *columns.others]
            return columns, opened_file.read_row_group(group, columns=names)
    except (pyarrow.ArrowException, OSError):
        return None
