"""Folders that appear whole or not at all."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from slam_jax.errors import UserError


@contextlib.contextmanager
def folder(root: Path, kind: str, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder beside `root`, which takes its place when the block ends.

    An existing folder for which is_ours is true is replaced, an empty one too; any other is
    refused with UserError, which says that it is no `kind`. Of a block that fails nothing stays.
    OSErrors, a full disk among them, become UserErrors.
    """
    root = root.absolute()
    partial, replaced = (root.with_name(f".{root.name}.{word}") for word in ("partial", "replaced"))
    try:
        if root.exists() and not is_ours(root) and any(root.iterdir()):
            raise UserError(f"{root} exists and is not a {kind}; choose another, or empty it")
        if replaced.exists() and not root.exists():
            replaced.rename(root)  # a write was killed between the two renames below
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if root.exists():
            root.rename(replaced)
        partial.rename(root)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {root}: {error.strerror or error}; choose a folder that can be written"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
