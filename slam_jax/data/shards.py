"""Writes the shards of a cache, each whole or not at all."""

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from slam_jax.data import cache, manifest, summary, verify, watch
from slam_jax.data.manifest import Plan, Shard
from slam_jax.data.tally import Dropped
from slam_jax.data.variants import Picture, Variants
from slam_jax.data.watch import Watch

_CHUNK = 4  # samples that a thread reads at a time
_IN_FLIGHT = 2  # batches that are being encoded
_MOST_THUMBNAILS = 512  # in all shards together, unless there are more shards


class Encoder(NamedTuple):
    """The VAE on its devices."""

    encode: Callable[[np.ndarray], np.ndarray]  # pixels [batch_size, …] -> moments, perhaps later
    batch_size: int


def chunks(pictures: Variants, plan: Plan, todo: list[int]) -> grain.MapDataset:
    """The samples of the shards `todo`, read, a few in each element."""
    per_shard = _chunks_per_shard(plan)
    read = partial(_read_chunk, pictures, plan, todo, per_shard)
    return grain.MapDataset.range(len(todo) * per_shard).map(read)


def _chunks_per_shard(plan: Plan) -> int:
    return -(-plan.records_per_shard // _CHUNK)


def _read_chunk(
    pictures: Variants, plan: Plan, todo: list[int], per_shard: int, position: int
) -> list[Picture | Dropped]:
    place, chunk = divmod(position, per_shard)
    samples = plan.samples(todo[place])[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    return [pictures.read(index) for index in samples]


def write(
    out: Path, plan: Plan, todo: list[int], read: Iterator[list[Picture | Dropped]],
    encoder: Encoder, watching: Watch,
) -> None:  # fmt: skip
    """The shards `todo` into folder `out`; read: the elements of chunks, in order.

    No batch has pictures of two shards, so a shard's bytes do not depend on what was done before.
    """
    for number in todo:
        own = itertools.chain.from_iterable(itertools.islice(read, _chunks_per_shard(plan)))
        path = out / plan.shard_name(number)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            _write_shard(path, temporary, plan, watch.watched(own, watching), encoder, watching)
        finally:
            temporary.unlink(missing_ok=True)


def _write_shard(
    path: Path, temporary: Path, plan: Plan, results: Iterator[Picture | Dropped],
    encoder: Encoder, watching: Watch,
) -> None:  # fmt: skip
    """The shard, whose summary is there before it."""
    notes, dropped, not_finite, thumbnails = [], [], [], []
    most = min(max(_MOST_THUMBNAILS // plan.num_shards, 1), summary.MOST_THUMBNAILS)
    with cache.writer(temporary) as add:
        for picture, moments in _encoded(_usable(results, dropped), encoder):
            if not np.isfinite(moments.astype(np.float32)).all():
                not_finite.append(Dropped("latent not finite", picture.shard, picture.key, False))
                watch.reject(watching, not_finite[-1])
                continue
            for record in _records(picture, moments):
                add(record)
            notes.append(summary.note(picture))
            if len(thumbnails) < most:
                thumbnails.append(summary.thumbnail(picture.pixels[0]))
    num_bytes, digest = temporary.stat().st_size, verify.sha256(temporary)
    shard = Shard(path.name, len(notes) * plan.crops, num_bytes, digest)
    told = summary.dump(summary.of(notes, dropped + not_finite, thumbnails), shard)
    manifest.publish(summary.path_of(path), told)
    os.replace(temporary, path)


def _usable(results: Iterable[Picture | Dropped], dropped: list[Dropped]) -> Iterator[Picture]:
    """The pictures; the others are put into `dropped`."""
    for result in results:
        if isinstance(result, Dropped):
            dropped.append(result)
        else:
            yield result


def _encoded(
    pictures: Iterable[Picture], encoder: Encoder
) -> Iterator[tuple[Picture, np.ndarray]]:  # fmt: skip
    """Each picture with the moments [N, h, w, 2C] of its variants."""
    waiting, rows = collections.deque(), []
    for moments in _in_batches(_queued(pictures, waiting), encoder):
        rows.extend(moments)
        while waiting and len(rows) >= (num := len(waiting[0].pixels)):
            yield waiting.popleft(), np.stack(rows[:num])
            del rows[:num]


def _queued(pictures: Iterable[Picture], waiting: collections.deque) -> Iterator[np.ndarray]:
    """The variants' pixels, one by one; each picture waits for their moments."""
    for picture in pictures:
        waiting.append(picture)
        yield from picture.pixels


def _in_batches(squares: Iterator[np.ndarray], encoder: Encoder) -> Iterator[np.ndarray]:
    """Moments of the squares; the last batch is filled up, so that all have one shape."""
    running = collections.deque()
    while chosen := list(itertools.islice(squares, encoder.batch_size)):
        missing = [np.zeros_like(chosen[0])] * (encoder.batch_size - len(chosen))
        running.append((encoder.encode(np.stack(chosen + missing)), len(chosen)))
        if len(running) > _IN_FLIGHT:
            moments, num = running.popleft()
            yield np.asarray(moments)[:num]
    for moments, num in running:
        yield np.asarray(moments)[:num]


def _records(picture: Picture, moments: np.ndarray) -> Iterator[cache.Record]:
    """One of each variant."""
    for variant, time_ids in zip(moments, picture.time_ids, strict=True):
        yield cache.Record(
            variant, picture.tokens["input_ids"], picture.tokens.get("input_ids_2"), time_ids,
            picture.caption, picture.cut, picture.shard, picture.key,
        )  # fmt: skip
