"""What a cache says of itself: plan.json, what is to be encoded, and manifest.json, what was.

plan.json is there from the start, so that a rerun with other options is refused. manifest.json
appears last: a cache without it is not finished. Neither holds a time or a name of a machine, so
both are the same however often the run was killed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slam_jax.errors import UserError

FORMAT = 1
PLAN, MANIFEST = "plan.json", "manifest.json"


class Plan(NamedTuple):
    """All that the bytes of a cache depend on."""

    source: str
    num_samples: int  # of the source, from its first on
    vae: str  # weights/fingerprint.py
    tokenizers: tuple[str, ...]  # text_inputs.fingerprints: one, SDXL's two
    size: int  # pixels
    latent: tuple[int, int, int]  # height, width, channels
    dtype: str  # of the moments as they are kept
    compute_dtype: str  # of the VAE
    crops: int  # variants of each picture
    random_crop: bool
    flip: bool
    filters: tuple[str, ...]
    seed: int
    records_per_shard: int  # samples of the source, before any is left out
    batch_size: int  # pictures at a time on each device

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.records_per_shard)

    def shard_name(self, number: int) -> str:
        return f"shard-{number:05d}-of-{self.num_shards:05d}.array_record"

    def samples(self, number: int) -> range:
        """Those of the source that shard `number` covers."""
        first = number * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.num_samples))


class Shard(NamedTuple):
    """One file of records."""

    name: str
    records: int
    num_bytes: int
    sha256: str


class Manifest(NamedTuple):
    """A finished cache."""

    plan: Plan
    shards: tuple[Shard, ...]
    kept: int  # pictures, each with plan.crops records
    filtered: dict[str, int]  # how many pictures the filters left out, by reason
    bad: dict[str, int]  # how many could not be used, by reason

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def dump_plan(plan: Plan) -> bytes:
    return _dump({"format": FORMAT, **plan._asdict()})


def dump(manifest: Manifest) -> bytes:
    return _dump({
        "format": FORMAT,
        "plan": manifest.plan._asdict(),
        "kept": manifest.kept,
        "filtered": dict(sorted(manifest.filtered.items())),
        "bad": dict(sorted(manifest.bad.items())),
        "shards": [shard._asdict() for shard in manifest.shards],
    })  # fmt: skip


def _dump(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def read(folder: Path) -> Manifest:
    """The manifest of a finished cache; UserError if there is none, or one of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise UserError(
                f"cache {folder} is not finished: run slam_jax.prepare with the same options again"
            )
        raise UserError(f"{folder} is no cache: it has no {MANIFEST}; make one by slam_jax.prepare")
    tree = _load(path)
    try:
        return Manifest(
            _plan(tree["plan"]),
            tuple(Shard(**shard) for shard in tree["shards"]),
            tree["kept"], tree["filtered"], tree["bad"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise _broken(path, error) from None


def read_plan(folder: Path) -> Plan | None:
    """What is to be encoded into the folder; None if there is no plan."""
    path = folder / PLAN
    if not path.is_file():
        return None
    tree = _load(path)
    del tree["format"]
    try:
        return _plan(tree)
    except (KeyError, TypeError) as error:
        raise _broken(path, error) from None


def _load(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
        found = tree["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, error) from None
    if found != FORMAT:
        raise UserError(
            f"{path} is of format {found} and this code reads {FORMAT}: prepare it again, into "
            "another folder"
        )
    return tree


def _plan(tree: Mapping[str, Any]) -> Plan:
    lists = {key: tuple(value) for key, value in tree.items() if isinstance(value, list)}
    return Plan(**{**tree, **lists})


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {path} ({type(error).__name__}: {error}); delete it and run slam_jax.prepare "
        "with the same options again"
    )


def publish(path: Path, content: bytes, host: int = 0) -> None:
    """The file appears whole or not at all, though other hosts write the same one."""
    temporary = path.with_name(f".{path.name}.{host}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def differences(before: Plan, after: Plan) -> Iterator[tuple[str, Any, Any]]:
    """(name, before, after) of every field that is not the same in both."""
    for name, old, new in zip(Plan._fields, before, after, strict=True):
        if old != new:
            yield name, old, new
