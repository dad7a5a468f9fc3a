"""Encoded pictures in ArrayRecord shards, as slam_jax.prepare writes them.

A record is a msgpack map: the VAE's posterior (mean, then log-variance), token ids, SDXL's sizes,
the caption, and where the picture came from. The posterior is kept, not a sample of it, so that
training draws afresh each time.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401 - numpy knows its dtypes by name from here on
import msgpack
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int32

from slam_jax.data import manifest as manifests
from slam_jax.data.manifest import Manifest, Shard
from slam_jax.data.sample import Example
from slam_jax.errors import BadSample, UserError

# Each record is a chunk of its own, with a hash that is checked when it is read.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# For reading at random: nothing ahead.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 128 * 1024  # bytes; held while a record is read
_MOST_OPEN = 16384  # shards, at some 14 kB of memory each
_ANY_TEXT = "surrogatepass"  # file names need not be UTF-8
_REMEDY = "run slam_jax.prepare with the same options again"


class Record(NamedTuple):
    """One variant of one picture."""

    moments: np.ndarray  # [h, w, 2C], of the plan's dtype
    input_ids: Int32[np.ndarray, "L"]
    input_ids_2: Int32[np.ndarray, "L"] | None  # SDXL only
    time_ids: Int32[np.ndarray, "6"]  # shapes.SDXLText
    caption: str
    cut: bool  # whether the end of the caption did not fit
    shard: str  # of the source, as is key
    key: str


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Callable[[Record], None]]:
    """Writes a shard, record by record; the same records give the same bytes.

    UserError if the disk is full.
    """
    file = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def add(record: Record) -> None:
        try:
            file.write(encode(record))
        except RuntimeError as error:
            raise _cannot_write(path, error) from None

    try:
        yield add
    finally:
        try:
            file.close()
        except RuntimeError as error:
            raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: RuntimeError) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"cannot write {path} ({reason}); make room, or choose another folder")


def encode(record: Record) -> bytes:
    arrays = {
        name: value.tobytes()
        for name, value in record._asdict().items()
        if isinstance(value, np.ndarray)
    }
    return msgpack.packb({**record._asdict(), **arrays}, unicode_errors=_ANY_TEXT)


def decode(content: bytes, moments_shape: tuple[int, int, int], dtype: np.dtype) -> Record:
    """ValueError unless it is a record of that shape."""
    fields = msgpack.unpackb(content, unicode_errors=_ANY_TEXT)
    fields["moments"] = np.frombuffer(fields["moments"], dtype).reshape(moments_shape)
    for name in ("input_ids", "input_ids_2", "time_ids"):
        if fields[name] is not None:
            fields[name] = np.frombuffer(fields[name], np.int32)
    return Record(**fields)


@dataclasses.dataclass(frozen=True)
class Cache:
    """A finished cache: examples for batches.py. Its shards are opened when first asked for."""

    path: Path
    manifest: Manifest

    def __len__(self) -> int:
        return self._ends[-1]

    def example(self, index: int, seed: tuple[int, ...]) -> Example:
        """moments [h, w, 2C] and input_ids int32 [L]; for SDXL input_ids_2 and time_ids too.

        The seed chooses nothing here. BadSample if the record is damaged.
        """
        del seed
        record = self.record(index)
        arrays = {"moments": record.moments, "input_ids": record.input_ids}
        if record.input_ids_2 is not None:
            arrays |= {"input_ids_2": record.input_ids_2, "time_ids": record.time_ids}
        return Example(arrays, record.cut)

    def record(self, index: int) -> Record:
        """Record `index` of all shards one after the other; BadSample if it is damaged."""
        number = bisect.bisect_right(self._ends, index)
        shard = self.manifest.shards[number]
        position = index - (self._ends[number] - shard.records)
        try:
            (content,) = self._reader(number).read([position])
            return decode(content, *self._layout)
        # RuntimeError is of ArrayRecord, the others of what follows the hash by chance or by hand.
        except (RuntimeError, ValueError, LookupError, TypeError, msgpack.UnpackException):
            raise BadSample("damaged record", shard.name, str(position)) from None

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The index after the last record of each shard."""
        return list(itertools.accumulate(shard.records for shard in self.manifest.shards))

    @functools.cached_property
    def _layout(self) -> tuple[tuple[int, int, int], np.dtype]:
        height, width, channels = self.manifest.plan.latent
        return (height, width, 2 * channels), np.dtype(self.manifest.plan.dtype)

    @functools.cached_property
    def _reader(self) -> Callable[[int], array_record_module.ArrayRecordReader]:
        """(number of a shard) -> its reader, which threads share; the last used ones stay open."""

        def opened(number: int) -> array_record_module.ArrayRecordReader:
            return reader(self.path / self.manifest.shards[number].name)

        return functools.lru_cache(_most_open())(opened)

    def __reduce__(self):
        # What is open stays here.
        return Cache, (self.path, self.manifest)


def reader(path: Path) -> array_record_module.ArrayRecordReader:
    """RuntimeError if the file's end, where its index lies, is not whole."""
    return array_record_module.ArrayRecordReader(
        str(path), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
    )


def _most_open() -> int:
    """How many shards may be open: half of what this process may open, once that is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MOST_OPEN if hard == resource.RLIM_INFINITY else min(2 * _MOST_OPEN, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems allow less than they say.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else min(_MOST_OPEN, soft // 2)


def is_cache(folder: Path) -> bool:
    """Whether prepare made, or began to make, a cache in the folder."""
    return (folder / manifests.MANIFEST).is_file() or (folder / manifests.PLAN).is_file()


def find(folder: Path) -> Cache:
    """The finished cache in the folder. UserError if it is none, unfinished, or lacks shards."""
    manifest = manifests.read(folder)
    for shard in manifest.shards:
        _check_file(folder / shard.name, shard)
    if not sum(shard.records for shard in manifest.shards):
        raise UserError(f"cache {folder} is empty: prepare it again with other filters")
    return Cache(folder, manifest)


def _check_file(path: Path, shard: Shard) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot open {path} ({error.strerror}); {_REMEDY}") from None
    if num_bytes != shard.num_bytes:
        raise UserError(
            f"{path} has {num_bytes} bytes instead of {shard.num_bytes}; delete it and {_REMEDY}"
        )


def check(cache: Cache, *, size: int, vae: str, tokenizers: tuple[str, ...]) -> None:
    """UserError unless the cache is of that size, in pixels, and of a model with these parts.

    vae, tokenizers: fingerprints (Plan).
    """
    plan = cache.manifest.plan
    for what, cached, wanted in (
        (f"images of {plan.size} pixels", plan.size, size),
        ("the latents of another VAE", plan.vae, vae),
        ("the tokens of another tokenizer", plan.tokenizers, tokenizers),
    ):
        if cached != wanted:
            raise UserError(
                f"cache {cache.path} holds {what} ({cached}, and this run has {wanted}); prepare "
                "another cache with this run's model and size, or train with the cache's"
            )
