"""Reads a finished cache through and names the shards that are not as they were written."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slam_jax.data import cache, manifest
from slam_jax.data.manifest import Plan, Shard
from slam_jax.errors import BadSample

_BLOCK = 1 << 20  # bytes read at a time


def damage(folder: Path) -> Iterator[tuple[Shard, str | None]]:
    """(shard, what is wrong with it, None if nothing) of every shard of the cache in the folder."""
    found = manifest.read(folder)
    for shard in found.shards:
        yield shard, _damage(folder / shard.name, shard, found.plan)


def _damage(path: Path, shard: Shard, plan: Plan) -> str | None:
    try:
        digest = sha256(path)
    except OSError as error:
        return error.strerror or str(error)
    if digest != shard.sha256:
        return "its bytes have changed"
    # The records are looked into as well: what was written may have been wrong.
    whole = cache.Cache(path.parent, manifest.Manifest(plan, (shard,), 0, {}, {}))
    if (num_records := cache.reader(path).num_records()) != shard.records:
        return f"{num_records} records instead of {shard.records}"
    try:
        for index in range(shard.records):
            if not np.isfinite(whole.record(index).moments.astype(np.float32)).all():
                return f"record {index} is not finite"
    except BadSample as bad:
        return f"{bad.reason} {bad.key}"
    return None


def sha256(path: Path) -> str:
    """Of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
