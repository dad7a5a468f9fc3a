"""What took long to find out, kept in the user's cache folder between programs.

A file holds the sha256 of its content before the content, so that a damaged one counts as absent.
The folder is $SLAM_JAX_CACHE; nothing is kept if that is empty; if it is not set,
$XDG_CACHE_HOME/slam_jax or ~/.cache/slam_jax.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

# Bytes of all files together; the ones unused for longest are removed first. JAX's are apart.
MOST = 4 * 2**30
_DIGEST = 32  # bytes
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def folder() -> Path | None:
    """Where it is kept; None if nothing is to be."""
    chosen = os.environ.get("SLAM_JAX_CACHE")
    if chosen is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slam_jax"
    return Path(chosen) if chosen else None


def key(*told: Any) -> str:
    """Of values that JSON can hold, this package's code, and the packages that it computes with."""
    whole = json.dumps([_code(), *told], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for package in _PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def machine() -> str:
    """What instructions its processor has, as far as the system says: code for others may fail."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[0]
    return f"{platform.machine()} {platform.processor()}"


def read(kind: str, key: str) -> bytes | None:
    """What was written; None if there is nothing, or it is not as it was written."""
    if (root := folder()) is None:
        return None
    path = root / kind / key
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content = whole[_DIGEST:]
    if hashlib.sha256(content).digest() != whole[:_DIGEST]:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return content


def write(kind: str, key: str, content: bytes) -> None:
    """Keeps it, the file whole or not at all; does nothing where the folder cannot be written."""
    if (root := folder()) is None:
        return
    with contextlib.suppress(OSError):
        (root / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=root / kind, prefix=".")
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, root / kind / key)
        except OSError:
            os.unlink(temporary)
            raise
        _make_room(root)


def drop_damaged(folder: Path) -> None:
    """Removes what JAX's cache of executables holds there that is not as JAX wrote it.

    JAX compiles what it cannot read, but never writes over a file that is there. Where the package
    zstandard is installed, JAX writes what zlib does not know, and all of it is made anew.
    """
    for path in folder.glob("*-cache"):
        try:
            zlib.decompress(path.read_bytes())
        except (OSError, zlib.error):
            with contextlib.suppress(OSError):
                path.unlink()


def _make_room(root: Path) -> None:
    found = [(path.stat(), path) for path in root.glob("*/*") if path.is_file()]
    total = sum(status.st_size for status, _ in found)
    for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
        if total <= MOST:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
