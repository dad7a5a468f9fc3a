"""Checkpoints of the train state in Orbax: atomic, asynchronous, the last few kept."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from slam_jax.errors import UserError

# What CheckpointManager calls the only item that it saves.
_ITEM = "default"
# What Orbax writes last where it cannot rename a folder.
_COMMITTED = "commit_success.txt"


def manager(folder: epath.PathLike, keep: int) -> ocp.CheckpointManager:
    """Opens the folder, made if need be; what a killed save left behind is swept away.

    A step's folder appears under its final name only when it is complete; in a bucket its last
    file tells. folder: absolute, or gs://BUCKET/FOLDER.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(epath.Path(folder), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Copies the state off the devices, then writes it in the background."""
    checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore(checkpoints: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The state saved at `step`; `like` gives shapes, dtypes and shardings, whatever they were."""
    return checkpoints.restore(step, args=ocp.args.StandardRestore(like))


def restore_part(folder: epath.PathLike, step: int, part: str, like: Any) -> Any:
    """One field of the state saved at `step`, as numpy arrays; nothing else is read.

    like: its tree. UserError if the checkpoint's field has another.
    """
    numpy_arrays = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = {part: jax.tree.map(lambda _: 0, like)}
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(lambda _: numpy_arrays, wanted),
        partial_restore=True,
    )
    path = epath.Path(folder) / str(step) / _ITEM
    with ocp.PyTreeCheckpointer() as reader:
        try:
            found = reader.restore(path, args=args)[part]
        except (OSError, ValueError, KeyError) as error:
            line = str(error).partition("\n")[0]
            raise UserError(f"cannot read {part} of {path} ({line}); copy it again") from None
    shapes = jax.tree.map(lambda a, b: a.shape == b.shape, found, like)
    if not all(jax.tree.leaves(shapes)):
        raise UserError(f"{path} is of another network than the run's teacher; restore that one")
    return found


def latest(folder: epath.PathLike) -> int | None:
    """The last complete step in the folder, found without touching a device."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return None
    steps = (int(path.name) for path in folder.iterdir() if path.name.isdigit())
    # In a bucket nothing can be renamed at once: there a last file says that a step is complete.
    in_bucket = "://" in str(folder)
    complete = (n for n in steps if not in_bucket or (folder / f"{n}" / _COMMITTED).exists())
    return max(complete, default=None)
