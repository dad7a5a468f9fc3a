"""Sources of captioned pictures (sample.py), by name."""

import glob
import itertools
import os
import re

import braceexpand

from slam_jax.data import image_folder, tars
from slam_jax.errors import UserError

_TFDS = "tfds:"
_KINDS = (
    "shapes2d, tfds:NAME or tfds:NAME@SPLIT, a pattern such as '/data/{00000..00999}.tar' or "
    "'/data/*.parquet', or a folder of .tar, .parquet or picture files"
)
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def find(name: str, index_dir: str):
    """The source (sample.py) of that name; shards come as braces stand, else sorted by name.

    index_dir: where the indices of tars are kept; "" is beside them. UserError, saying what to
    do, if there is no such source or it cannot be read.
    """
    if name.startswith(_TFDS):
        return _tfds(name)
    if "://" in name:
        raise UserError(f"source {name!r} is no local file; mount it or copy it to a local disk")
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        shards = _shards(path)
        if not shards:
            return image_folder.opened(path)
    elif os.path.exists(path):
        shards = [path]
    else:
        shards = _expanded(name, path)
    return _opened(name, shards, index_dir)


def _shards(folder: str) -> list[str]:
    """The folder's tars; where it has none, its Parquet files: img2dataset writes some beside."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"source {folder!r} cannot be read: {error.strerror}") from None
    for suffix in (".tar", ".parquet"):
        if shards := [name for name in names if name.lower().endswith(suffix)]:
            return [os.path.join(folder, name) for name in shards]
    return []


def _expanded(name: str, pattern: str) -> list[str]:
    """The files of a pattern, each once."""
    try:
        parts = list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"source {name!r} has unbalanced braces") from None
    found = itertools.chain.from_iterable(map(_matches, parts))
    shards = list(dict.fromkeys(found))
    if not shards:
        raise UserError(f"source {name!r} is not there; give {_KINDS}")
    if missing := [shard for shard in shards if not os.path.exists(shard)]:
        if len(missing) == len(shards):
            raise UserError(f"source {name!r} is not there; give {_KINDS}")
        raise UserError(
            f"source {name!r} stands for {len(shards)} files, of which {len(missing)} are not "
            f"there, such as {missing[0]}; fetch them or use a pattern with *"
        )
    return shards


def _matches(part: str) -> list[str]:
    """Sorted; without wild cards the path itself, which need not be there."""
    return sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]


def _is_compressed(path: str) -> bool:
    return _COMPRESSED.search(path) is not None


def _opened(name: str, shards: list[str], index_dir: str):
    compressed = next(filter(_is_compressed, map(os.path.basename, shards)), None)
    if compressed:
        raise UserError(
            f"source {name!r}: {compressed} is compressed, so that no sample can be read on its "
            "own; decompress it to a .tar"
        )
    suffixes = {os.path.splitext(shard)[1].lower() for shard in shards}
    if suffixes == {".tar"}:
        return tars.opened(shards, index_dir)
    if suffixes == {".parquet"}:
        return _parquet(shards)
    odd = next((shard for shard in shards if not shard.lower().endswith(".tar")), shards[0])
    raise UserError(
        f"source {name!r} stands for {odd}, among {len(shards)} files; all must be .tar or all "
        ".parquet, and a folder of pictures is given by its name"
    )


def _parquet(shards: list[str]):
    try:
        from slam_jax.data import parquet
    except ModuleNotFoundError as error:
        raise _not_installed(shards[0], error, "parquet") from None
    return parquet.opened(shards)


def _tfds(name: str):
    try:
        from slam_jax.data import tfds
    except ModuleNotFoundError as error:
        raise _not_installed(name, error, "tfds") from None
    return tfds.opened(name.removeprefix(_TFDS))


def _not_installed(name: str, error: ModuleNotFoundError, extra: str) -> UserError:
    return UserError(
        f"source {name!r} needs the package {error.name}; pip install 'slam_jax[{extra}]'"
    )
