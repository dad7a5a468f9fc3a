"""Weights & Biases: what metrics.jsonl and TensorBoard get, for who names a project.

A run folder is one run there, whose id wandb.json keeps for when it is resumed. Each step is sent
once: what W&B has already is not sent again, though a resumed run comes to the steps after its
last checkpoint anew, and one that goes back comes to them with other data. What it lacks of
metrics.jsonl, it gets when the run is resumed.

The library's own environment variables hold. With WANDB_MODE=offline it writes to the folder
wandb/ of the run folder, for `wandb sync`; killed there, it loses what it had not written yet, at
most the steps of its last 15 s.
"""

import contextlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slam_jax.errors import UserError
from slam_jax.runtime import folder, hosts

# (step, name -> a number, or a picture, uint8 [h, w, 3]).
Track = Callable[[int, Mapping[str, Any]], None]

_KEPT = "wandb.json"
_PATIENCE_S = 60  # with a server that does not answer, at the beginning and at the end


class _Kept(NamedTuple):
    """What wandb.json says."""

    project: str
    id: str
    step: int  # the last one that was sent whole


def check(project: str) -> None:
    """UserError if a project is named and the package is missing; touches no device."""
    found = importlib.util.find_spec("wandb") if project else None
    # A folder ./wandb, where the library leaves its files by default, passes for a package too.
    if project and (found is None or found.origin is None):
        raise UserError(
            f"config.log.wandb_project={project} needs the package wandb: "
            "pip install 'slam_jax[wandb]'"
        )


def nowhere(_step: int, _values: Mapping[str, Any]) -> None:
    """A Track that sends nothing."""


@contextlib.contextmanager
def opened(
    project: str, workdir: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> Iterator[Track]:
    """What sends to the run of this folder; on hosts but the first, and without project, nothing.

    UserError if W&B refuses project or key. Nothing else that goes wrong there ends the block: it
    is warned of, and nothing more is sent.
    """
    if not project or not hosts.is_first():
        yield nowhere
        return
    kept = _kept(workdir, project)
    # What the library raises is written nowhere and changes: a thread takes whatever comes.
    with ThreadPoolExecutor(1, "wandb") as thread:
        run = _started(thread, kept, workdir, settings, warn)
        if run is None:
            yield nowhere
            return
        with _sending(thread, run, kept, workdir, warn) as track:
            yield track


@contextlib.contextmanager
def _sending(
    thread: ThreadPoolExecutor, run: Any, kept: _Kept, workdir: Path, warn: Callable[[str], None]
) -> Iterator[Track]:
    """The Track of a run, which is finished at the end."""
    # Its server knows best how far it is; offline there is none.
    last = before = kept.step if run.offline else run.starting_step - 1
    names: set[str] = set()  # of what was sent for that step
    lost = False

    def attempt(call: Callable, *given) -> None:
        nonlocal lost
        error = None if lost else thread.submit(call, *given).exception()
        if error is not None:
            lost = True
            warn(f"W&B gets nothing more of this run: {_line(error)}; metrics.jsonl has it all")

    def track(step: int, values: Mapping[str, Any]) -> None:
        nonlocal last
        if step > last:
            last = step
            names.clear()
        if step > before and step == last and not values.keys() <= names:
            attempt(_log, run, step, values)
            attempt(_keep, workdir, kept._replace(step=step))
            names.update(values)

    status = 1
    try:
        yield track
        status = 0
    finally:
        attempt(run.finish, status)
        _end(thread)


def _kept(workdir: Path, project: str) -> _Kept:
    """What the folder says of its run in that project; of a new one if it says nothing."""
    try:
        kept = _Kept(**json.loads((workdir / _KEPT).read_text()))
    except (OSError, ValueError, TypeError):
        kept = None
    return kept if kept and kept.project == project else _Kept(project, uuid.uuid4().hex[:12], 0)


def _keep(workdir: Path, kept: _Kept) -> None:
    folder.write_atomic(workdir / _KEPT, json.dumps(kept._asdict()).encode())


def _started(
    thread: ThreadPoolExecutor, kept: _Kept, workdir: Path, settings: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Any:  # fmt: skip
    """W&B's run, or None and a warning."""
    import wandb  # takes seconds

    started = thread.submit(_init, kept, workdir, settings)
    match started.exception():
        case None:
            _keep(workdir, kept)
            return started.result()
        case wandb.UsageError() | wandb.errors.AuthenticationError() as error:
            raise UserError(
                f"config.log.wandb_project={kept.project}: W&B says: {_line(error)}; run `wandb "
                'login`, set WANDB_MODE=offline, or give --config.log.wandb_project=""'
            )
        case error:
            warn(f"W&B gets nothing of this run, which goes on: {_line(error)}")
            _end(thread)
            return None


def _init(kept: _Kept, workdir: Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.init(
        project=kept.project, id=kept.id, resume="allow", name=workdir.name, dir=str(workdir),
        config=dict(settings),
        # It shall not read what the program prints: the bar would be sent line by line.
        settings=wandb.Settings(
            console="off", init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S
        ),
    )  # fmt: skip


def _log(run: Any, step: int, values: Mapping[str, Any]) -> None:
    import wandb

    pictures = {
        name: wandb.Image(value) for name, value in values.items() if isinstance(value, np.ndarray)
    }
    run.log({**values, **pictures}, step=step)


def _end(thread: ThreadPoolExecutor) -> None:
    """Ends the library's process. It would do so last of all, and show a failure with its stack."""
    import wandb

    thread.submit(wandb.teardown).exception()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
