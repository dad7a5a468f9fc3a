"""Checkpoints of the train state in Orbax: atomic, asynchronous, the last few kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """Opens the folder, made if need be; what a killed save left behind is swept away.

    A step's folder appears under its final name only when it is complete.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Copies the state off the devices, then writes it in the background."""
    checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore(checkpoints: ocp.CheckpointManager, step: int, like: Any, shardings: Any) -> Any:
    """The state saved at `step`, laid out by `shardings`; `like` gives its shapes and dtypes."""
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings,
    )
    return checkpoints.restore(step, args=ocp.args.StandardRestore(target))


def latest(folder: Path) -> int | None:
    """The last complete step in the folder, found without touching a device."""
    if not folder.is_dir():
        return None
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)
