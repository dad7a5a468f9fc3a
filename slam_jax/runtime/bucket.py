"""Folders in a bucket, gs://BUCKET/FOLDER: a run's files are written here and copied there.

Checkpoints are not copied: Orbax writes them to the bucket itself, from all hosts at once.
"""

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from etils import epath
from tqdm import tqdm

from slam_jax.errors import UserError

_URL = re.compile(r"[a-z][a-z0-9+.-]*:/")
_IN_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]+)(?:/(.*))?")
# What takes less time shows no bar.
_SEEN_AFTER_S = 1.0
# By this file readers know a model folder.
_INDEX = "model_index.json"


class Mirror(NamedTuple):
    """Where a run writes. `push` copies to the bucket what changed, or warns that it cannot."""

    name: str  # as the user has it
    local: Path
    checkpoints: epath.Path
    push: Callable[[], None]


class _Version(NamedTuple):
    """Changes when a file does."""

    time: int  # ns
    size: int


def here(workdir: Path) -> Mirror:
    """A run folder on this machine, from which nothing is copied."""
    checkpoints = epath.Path(workdir.absolute()) / "checkpoints"
    return Mirror(str(workdir), workdir, checkpoints, push=lambda: None)


@contextlib.contextmanager
def mirrored(workdir: str) -> Iterator[Mirror]:
    """A folder here for a run folder in a bucket; a local run folder is taken as it is.

    The bucket's files, but not the folders among them, are copied here first. At the end, whatever
    the reason, what has changed is copied back and the folder here removed. UserError: the bucket
    cannot be read or written, or not all could be copied back. In those that the block raises, the
    bucket stands for the folder here.
    """
    if not _URL.match(workdir):
        yield here(Path(workdir))
        return
    there, name = _opened("workdir", workdir)
    with _temporary(name) as (local, keep):
        with _complaint("workdir", name):
            there.check_writable()
            _fetch(there, local, nested=False)
        push = partial(_pushed, there, local, _versions(local))
        where = Mirror(name, local, epath.Path(name) / "checkpoints", partial(_try, push))
        finished = False
        try:
            with _named(local, name):
                yield where
            finished = True
        finally:
            if failure := push():
                keep()
                message = f"{failure}; what is missing there is kept in {local}: copy it from there"
                if finished:
                    raise UserError(f"{message}, or run the same command again")
                _warn(message)


def reached(option: str, folder: str) -> epath.Path:
    """The folder, to read from; UserError if it is in a bucket that cannot be read."""
    if not _URL.match(folder):
        return epath.Path(Path(folder).absolute())
    return epath.Path(_opened(option, folder)[1])


@contextlib.contextmanager
def copied(option: str, folder: str) -> Iterator[str]:
    """The name of a copy here of a folder in a bucket; any other name is taken as it is."""
    if not folder.startswith("gs:/"):
        yield folder
        return
    there, name = _opened(option, folder)
    with _temporary(name) as (local, _):
        with _complaint(option, name):
            _fetch(there, local, nested=True)
        if not any(local.iterdir()):
            raise UserError(f"--{option} {name} holds no files; check the name")
        with _named(local, name):
            yield str(local)


def _opened(option: str, folder: str) -> tuple:
    """(the folder in the bucket, its name written plainly); UserError if it cannot be reached."""
    found = _IN_BUCKET.fullmatch(folder)
    path = [part for part in (found[2] or "").split("/") if part] if found else [".."]
    if {".", ".."} & set(path):
        raise UserError(f"--{option} {folder} is neither gs://BUCKET/FOLDER nor a local folder")
    try:
        from slam_jax.runtime import gcs
    except ModuleNotFoundError as error:
        raise UserError(
            f"--{option} {folder} needs the package {error.name}; pip install 'slam_jax[gcs]'"
        ) from None
    name = "/".join([f"gs://{found[1]}", *path])
    with _complaint(option, name):
        return gcs.opened(found[1], "/".join(path)), name


@contextlib.contextmanager
def _complaint(option: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot use --{option} {name}: {error}; check the name and that you may use the "
            "bucket, or choose another"
        ) from None


@contextlib.contextmanager
def _named(local: Path, name: str) -> Iterator[None]:
    """Users do not know the folder here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(local), name)) from None


@contextlib.contextmanager
def _temporary(name: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """(a folder here that ends in the bucket's name, what keeps it from being removed)."""
    with contextlib.ExitStack() as stack:
        top = Path(tempfile.mkdtemp(prefix="slam_jax_"))
        stack.callback(shutil.rmtree, top, ignore_errors=True)
        local = top / name.removeprefix("gs://")
        local.mkdir(parents=True)
        yield local, lambda: stack.pop_all()


def _fetch(there, local: Path, *, nested: bool) -> None:
    sizes = there.sizes(nested=nested)
    # None: shown on a terminal alone.
    with tqdm(
        desc="downloading", total=sum(sizes.values()), unit="B", unit_scale=True, disable=None,
        delay=_SEEN_AFTER_S,
    ) as bar:  # fmt: skip
        for name, size in sizes.items():
            there.get(name, local / name)
            bar.update(size)


def _versions(local: Path) -> dict[str, _Version]:
    """All files of the folder, but those that are being written."""
    found = {}
    for path in local.rglob("*"):
        name = path.relative_to(local)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            status = path.stat()
            found[name.as_posix()] = _Version(status.st_mtime_ns, status.st_size)
    return found


def _pushed(there, local: Path, known: dict[str, _Version]) -> str | None:
    """Copies what is not as `known`, and notes it there; what went wrong, if anything.

    A model folder loses its index before any other of its files changes, and gets it back last.
    """
    now = _versions(local)
    changed = {name for name, version in now.items() if known.get(name) != version}
    indexes = {name for name in changed if name.endswith(_INDEX)}
    try:
        for name in indexes:
            there.remove(name)
        for name in (*sorted(changed - indexes), *sorted(indexes)):
            there.put(name, local / name)
            known[name] = now[name]
    except OSError as error:
        return f"cannot copy {name} to gs://{there.bucket.name}/{there.prefix}: {error}"
    return None


def _try(push: Callable[[], str | None]) -> None:
    if failure := push():
        _warn(f"{failure}; this is tried again")


def _warn(message: str) -> None:
    """Above a progress bar, if there is one."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
