"""Samples in WebDataset tars, as img2dataset writes them, read at random through their indices."""

import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import tqdm

from slam_jax.data import captions, tar_index
from slam_jax.data.sample import Sample
from slam_jax.data.tar_index import Row, Shard, Span
from slam_jax.errors import BadSample, UserError

_NUM_THREADS = 16  # they wait for disks
_NUM_OPEN = 64
_LOOKING = 256  # shards that a thread looks for at a time


@dataclasses.dataclass(frozen=True)
class Tars:
    """The samples of all shards, one shard after the other.

    Holds names and numbers alone, some 100 bytes a shard; files are opened when asked for.
    """

    shards: tuple[Shard, ...]
    ends: tuple[int, ...]  # samples up to and with each shard

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Two reads, of the row and of the sample. BadSample, saying where it lies."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        shard = self.shards[number]
        row_number = index - self.ends[number] + shard.num_rows
        key = f"sample {row_number}"
        try:
            files = _opened(shard)
            row = tar_index.read_row(files.index, shard.key_size, row_number)
            key = row.key
            return _sample(files, shard, row)
        except OSError:
            raise BadSample("unreadable shard", shard.tar, key) from None
        except BadSample as bad:
            raise BadSample(bad.reason, shard.tar, key) from None


def opened(tars: Sequence[str], index_dir: str) -> Tars:
    """The source; makes indices that are missing or old, beside the tars or in index_dir.

    UserError for a file that is no tar, or if an index cannot be written.
    """
    indices = [_index_path(tar, index_dir) for tar in tars]
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        slices = [slice(i, i + _LOOKING) for i in range(0, len(tars), _LOOKING)]
        looked = pool.map(lambda part: list(map(_find, tars[part], indices[part])), slices)
        shards = list(itertools.chain.from_iterable(looked))
        missing = [number for number, shard in enumerate(shards) if shard is None]
        made = pool.map(lambda number: tar_index.write(tars[number], indices[number]), missing)
        # Nothing is shown where nobody looks, nor for what takes no time.
        bar = tqdm.tqdm(made, "indexing", len(missing), disable=None if missing else True)
        for number, shard in zip(missing, bar, strict=True):
            shards[number] = shard
    return Tars(tuple(shards), tuple(itertools.accumulate(shard.num_rows for shard in shards)))


def _find(tar: str, index: str) -> Shard | None:
    try:
        return tar_index.find(tar, index)
    except OSError as error:
        raise UserError(f"cannot read {tar}: {error.strerror}; leave it out or mend it") from None


def _index_path(tar: str, index_dir: str) -> str:
    if not index_dir:
        return f"{tar}.idx"
    # Shards of other folders have the same names.
    folder, name = os.path.split(os.path.abspath(tar))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return str(Path(index_dir, digest, f"{name}.idx"))


@dataclasses.dataclass(frozen=True)
class _Files:
    """Descriptors of a tar and its index, closed when the last thread lets go of them."""

    tar: int
    index: int


@functools.lru_cache(_NUM_OPEN)
def _opened(shard: Shard) -> _Files:
    """Open files, shared by all threads of the process; OSError if they are not as they were."""
    descriptors = []
    try:
        for path in (shard.tar, shard.index):
            descriptors.append(os.open(path, os.O_RDONLY))
        if tar_index.stamp(os.fstat(descriptors[0])) != shard.stamp:
            raise OSError("the tar has changed")
        tar_index.check(descriptors[1], shard.stamp)
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    files = _Files(*descriptors)
    for descriptor in descriptors:
        weakref.finalize(files, os.close, descriptor)
    return files


def _sample(files: _Files, shard: Shard, row: Row) -> Sample:
    if row.reason:
        raise BadSample(row.reason)
    # They lie side by side, but for headers.
    present = [span for span in (row.image, row.text, row.json) if span.start]
    start = min(span.start for span in present)
    size = max(span.start + span.size for span in present) - start
    content = memoryview(os.pread(files.tar, size, start))
    if len(content) < size:
        raise OSError("the tar is cut short")

    def part(span: Span) -> bytes:
        return bytes(content[span.start - start :][: span.size])

    fields = captions.fields(part(row.json)) if row.json.start else {}
    if row.text.start:
        caption = captions.decoded(part(row.text))
    else:
        caption = captions.checked(fields.get("caption"))
    return Sample(part(row.image), caption, shard.tar, row.key, fields)
