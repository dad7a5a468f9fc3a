"""Checkpoints of the train state in Orbax: atomic, asynchronous, checked before they are used.

A folder of checkpoints, local or gs://, has a folder for each saved step. What a full disk or a
kill leaves half-written is swept away; what is damaged is set aside as STEP.damaged, for its owner
to look at, and the step before is used.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from slam_jax.errors import UserError
from slam_jax.runtime import checksums, hosts, peers, votes

Say = Callable[[str], None]  # told a warning

# What CheckpointManager calls the only item that it saves.
_ITEM = "default"
_HALF_WRITTEN = ".orbax-checkpoint-tmp"
_FINAL = "commit_success.txt"
_DAMAGED = ".damaged"
# tensorstore raises ValueError where the disk is full.
_ERRORS = (OSError, ValueError, RuntimeError)
_REASONS = ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied")

_asked = itertools.count()


def manager(folder: os.PathLike | str, keep: int, keep_every: int) -> ocp.CheckpointManager:
    """Opens the folder, made if need be; what a killed save left behind is swept away.

    A step's folder appears under its final name only when it is complete. The last `keep` stay,
    and all whose step is a multiple of keep_every (0: none). An old one goes only when a new one
    is complete.
    """
    folder = _absolute(folder)
    _sweep(folder)
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every:
        policies.append(checkpoint_managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        create=True, cleanup_tmp_directories=_is_remote(folder), enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
            # On the first host alone, in the thread that writes.
            post_finalization_callback=partial(_write_checksums, folder),
            barrier_sync_fn=votes.barrier() if peers.known() else None,
            # Made by a thread, a folder that cannot be made has other threads wait for it: the
            # process would not end for minutes.
            create_directories_asynchronously=False,
        ),
    )  # fmt: skip
    # Random-looking numbers shrink by 8 %, for more time on the cores than all the rest takes.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


@contextlib.contextmanager
def closing(checkpoints: ocp.CheckpointManager, say: Say) -> Iterator[None]:
    """Waits for the last save at the end, whatever the end is."""
    try:
        yield
    finally:
        if problem := _settled(checkpoints):
            say(problem)
        checkpoints.close()


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, say: Say) -> None:
    """Copies the state off the devices, then writes it in the background.

    say: told what failed, of this save or the one before it: the training can go on.
    """
    for problem in _save(checkpoints, step, state):
        _warn(problem, say)


def save_last(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """The same, and waits until it is written; UserError if it is not."""
    problems = [*_save(checkpoints, step, state), _settled(checkpoints)]
    if step not in checkpoints.all_steps():
        reasons = [problem for problem in problems if problem]
        raise UserError(f"{reasons[-1]}; make room, and run again to go on from there")


def check(checkpoints: ocp.CheckpointManager, say: Say) -> None:
    """Says so if the save in the background has failed; does not wait for it."""
    if not checkpoints.is_saving_in_progress():
        _warn(_settled(checkpoints), say)


def _warn(problem: str | None, say: Say) -> None:
    if problem:
        say(f"{problem}; training goes on, and the next one is tried when it is due")


def _save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> list[str | None]:
    """What was wrong with the save before, and with the beginning of this one."""
    before = _settled(checkpoints)
    _sweep(checkpoints.directory)
    if peers.known() and (full := _agreed(partial(_full, checkpoints.directory, state))):
        return [before, _given_up(checkpoints, step, OSError(full))]
    try:
        checkpoints.save(step, args=ocp.args.PyTreeSave(state))
    except _ERRORS as error:
        return [before, _given_up(checkpoints, step, error)]
    return [before]


def _full(folder: epath.Path, state: Any) -> str:
    """Where several hosts save, one that cannot make a folder leaves the others waiting for it."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = size if _is_remote(folder) else shutil.disk_usage(folder).free
    return "" if free >= size else f"No space left on device for {size} bytes, {free} are free"


def _settled(checkpoints: ocp.CheckpointManager) -> str | None:
    """Waits for the save under way, if there is one; what was wrong with it."""
    step = checkpoints.latest_step()
    try:
        checkpoints.wait_until_finished()
    except _ERRORS as error:
        return _given_up(checkpoints, step, error)
    return None


def _given_up(checkpoints: ocp.CheckpointManager, step: int, error: Exception) -> str:
    _sweep(checkpoints.directory)
    # It has already forgotten the steps that it was to delete after this one.
    checkpoints.reload()
    line = str(error).partition("\n")[0]
    reason = next((known for known in _REASONS if known in line), line)
    last = checkpoints.latest_step()
    left = "there is none yet" if last is None else f"the last one is of step {last}"
    return f"no checkpoint of step {step} in {checkpoints.directory}: {reason}; {left}"


def _sweep(folder: epath.Path) -> None:
    """Removes what failed saves have left; what a thread of theirs still adds goes next time."""
    if hosts.is_first():
        for path in folder.glob(f"*{_HALF_WRITTEN}"):
            with contextlib.suppress(OSError):
                path.rmtree()


def _write_checksums(folder: epath.Path) -> None:
    """Into the step that is complete but for its name.

    Not in a bucket, which checks its objects itself, and would have to be read for it.
    """
    if _is_remote(folder):
        return
    for path in folder.iterdir():
        number = path.name.removesuffix(_HALF_WRITTEN)
        if number.isdecimal() and not (path / _FINAL).exists() and (path / _ITEM).exists():
            checksums.write(path, _ITEM)


def restore(checkpoints: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The state saved at `step`; `like` gives shapes, dtypes and shardings, whatever they were."""
    layout = ocp.checkpoint_utils.construct_restore_args(like)
    return checkpoints.restore(step, args=ocp.args.PyTreeRestore(item=like, restore_args=layout))


def restore_part(folder: os.PathLike | str, step: int, part: str, like: Any) -> Any:
    """One field of the state saved at `step`, as numpy arrays; nothing else is read.

    like: its tree. UserError if the checkpoint is damaged or its field has another tree.
    """
    numpy_arrays = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = {part: jax.tree.map(lambda _: 0, like)}
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(lambda _: numpy_arrays, wanted),
        partial_restore=True,
    )
    path = _absolute(folder) / str(step) / _ITEM
    if damage := checksums.problem(path.parent, _ITEM):
        raise UserError(f"cannot read {part} of {path} ({damage}); copy it again")
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


def steps(folder: os.PathLike | str) -> list[int]:
    """All complete steps in the folder, whole or damaged; touches no device."""
    folder = epath.Path(folder)
    found = [path for path in _children(folder) if path.name.isdecimal()]
    # In an object store a step has its final name from the beginning.
    final = [path for path in found if not _is_remote(folder) or (path / _FINAL).exists()]
    return [int(path.name) for path in final]


def latest(folder: os.PathLike | str) -> int | None:
    """The last complete step in the folder, whole or damaged; touches no device."""
    return max(steps(folder), default=None)


def newest(folder: os.PathLike | str, say: Say) -> int | None:
    """The last step in the folder whose bytes are as they were written; None if none was saved.

    Damaged ones after it are set aside, never deleted, and `say` is told. The first host looks,
    and tells all others: each of them must call it. Touches no device. UserError if steps were
    saved and all of them are damaged.
    """

    def choose() -> str:
        try:
            return json.dumps({"step": _newest(epath.Path(folder), say)})
        except UserError as error:
            return json.dumps({"mistake": str(error)})

    found = json.loads(_agreed(choose))
    if "mistake" in found:
        raise UserError(found["mistake"])
    return found["step"]


def back(checkpoints: ocp.CheckpointManager, say: Say) -> int | None:
    """The same while the folder is in use: the step that a run can go back to."""
    _warn(_settled(checkpoints), say)
    step = newest(checkpoints.directory, say)
    checkpoints.reload()
    return step


def _agreed(choose: Callable[[], str]) -> str:
    return peers.agreed(f"checkpoint_{next(_asked)}", choose) if peers.known() else choose()


def _newest(folder: epath.Path, say: Say) -> int | None:
    for step in sorted(steps(folder), reverse=True):
        damage = checksums.problem(folder / str(step), _ITEM)
        if damage is None:
            return step
        say(
            f"the checkpoint of step {step} in {folder} is damaged ({damage}); it is set aside as "
            f"{_set_aside(folder / str(step)).name}, and the one before is used"
        )
    damaged = sorted(path.name for path in _children(folder) if _DAMAGED in path.name)
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be used; nothing was deleted ({', '.join(damaged)}): "
            "copy one of them there again, or choose another --workdir to start from step 0"
        )
    return None


def _set_aside(step: epath.Path) -> epath.Path:
    """Renames a step's folder, so that it is seen no more and the step can be saved again."""
    names = (f"{step.name}{_DAMAGED}{again or ''}" for again in itertools.count())
    free = next(path for name in names if not (path := step.parent / name).exists())
    return step.rename(free)


def _absolute(folder: os.PathLike | str) -> epath.Path:
    folder = epath.Path(folder)
    return folder if _is_remote(folder) else epath.Path(os.path.abspath(folder))


def _is_remote(folder: epath.Path) -> bool:
    return str(folder).startswith("gs://")


def _children(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
