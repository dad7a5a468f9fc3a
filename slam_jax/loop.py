"""The steps of a run: what is counted, drawn and saved on the way, and what happens to faults."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from slam_jax.data import batches, tally
from slam_jax.distill.state import TrainState
from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint, folder, images, log
from slam_jax.settings import Settings

_NUM_PREFETCH = 4  # batches held ready
_WINDOW = 1000  # steps in which faults.max_skips updates may be dropped
_ROLLBACKS = "rollbacks.jsonl"


class Run(NamedTuple):
    """What the loop works with."""

    settings: Settings
    workdir: Path
    dataset: grain.MapDataset  # batch n is dataset[n]
    step: Callable[[TrainState, dict[str, np.ndarray]], tuple[TrainState, dict]]  # and metrics
    draw: Callable[[Any], np.ndarray]  # target -> images [prompts, 2, H, W, 3]
    checkpoints: ocp.CheckpointManager
    progress: log.Progress


class Rollback(NamedTuple):
    """A line of rollbacks.jsonl: from which step back to which, and which data came then."""

    step: int
    back_to: int
    offset: int  # step n takes batch n - 1 + offset from here on


class DivergedError(ArithmeticError):
    """Too many updates had to be dropped."""


def to_the_end(run: Run, restored: Callable[[int], TrainState], done: int) -> TrainState:
    """The state after num_steps. `restored` gives the one of a saved step, and of step 0.

    Where too many updates are dropped the run goes back to its last checkpoint and on with other
    data. FloatingPointError if that does not help.
    """
    happened = _read_rollbacks(run.workdir)
    while True:
        offset = happened[-1].offset if happened else 0
        try:
            return _steps(run, restored(done), done, offset)
        except DivergedError as error:
            failed, message = error.args
        # Outside the except clause, which would keep the old state alive beside the new one.
        if len(happened) >= run.settings.faults.max_rollbacks:
            raise FloatingPointError(
                f"{message}; the last checkpoint is kept: lower optimizer.learning_rate, or look "
                "at the data, and run again"
            )
        run.checkpoints.wait_until_finished()
        done = checkpoint.latest(run.workdir / "checkpoints") or 0
        happened.append(Rollback(failed, done, offset + failed - done))
        _write_rollbacks(run.workdir, happened)
        log.say(run.progress, f"{message}: back to step {done}, and on with other data")


def _read_rollbacks(workdir: Path) -> list[Rollback]:
    """What went wrong before, the last one last."""
    path = workdir / _ROLLBACKS
    if not path.exists():
        return []
    return [Rollback(**json.loads(line)) for line in path.read_text().splitlines()]


def _write_rollbacks(workdir: Path, happened: list[Rollback]) -> None:
    lines = "".join(json.dumps(each._asdict()) + "\n" for each in happened)
    folder.write_atomic(workdir / _ROLLBACKS, lines.encode())


def _steps(run: Run, now: TrainState, done: int, offset: int) -> TrainState:
    """The state after num_steps, from `now`, which is after `done`."""
    settings = run.settings
    with _open(run, done, offset) as (journal, feed):
        unseen, skipped, counted = [], [], tally.EMPTY
        for number in range(done + 1, settings.num_steps + 1):
            try:
                batch = next(feed)
                counted = _count(journal, settings, number, batch, counted)
            except UserError:
                # The data's fault: what has been learnt until here is kept.
                _record_all(journal, settings, unseen, skipped, leave=0)
                if number - 1 > done and number - 1 not in run.checkpoints.all_steps():
                    checkpoint.save(run.checkpoints, number - 1, now)
                raise
            now, metrics = run.step(now, batch.arrays)
            unseen.append((number, metrics, tally.summary(batch.dropped, batch.num_cut)))
            last = number == settings.num_steps
            draws = last or number % settings.eval.every_steps == 0
            saves = last or number % settings.checkpoint.every_steps == 0
            # The metrics of a step are fetched when the next one is under way, except that no
            # state is drawn or saved before it is known whether the run goes on from it.
            _record_all(journal, settings, unseen, skipped, leave=0 if draws or saves else 1)
            if draws:
                with log.phase(run.progress, "drawing samples"):
                    _write_samples(journal, run.workdir, number, run.draw(now.target))
            # After metrics and samples: whatever precedes a checkpoint is never missing.
            if saves:
                checkpoint.save(run.checkpoints, number, now)
    return now


@contextlib.contextmanager
def _open(run: Run, done: int, offset: int) -> Iterator[tuple[log.Log, Iterator[batches.Batch]]]:
    """The log and the batches from step `done` on; nothing moves unasked to or from a device."""
    data = run.settings.data
    feed = batches.iterate(
        run.dataset, done + offset,
        num_threads=data.num_threads, num_workers=data.num_workers, num_prefetch=_NUM_PREFETCH,
    )  # fmt: skip
    with (
        log.started(run.workdir, done, run.progress) as journal,
        contextlib.closing(feed),
        jax.transfer_guard("disallow"),
    ):
        yield journal, feed


def _count(
    journal: log.Log, settings: Settings, number: int, batch: batches.Batch, counted: tally.Tally
) -> tally.Tally:
    """Lists the batch's bad samples; UserError if with them there are too many."""
    bad = [dropped._asdict() for dropped in batch.dropped if not dropped.filtered]
    log.bad_samples(journal, number, bad)
    counted = tally.add(counted, len(batch.arrays["input_ids"]), batch.dropped)
    tally.check(counted, settings.data.max_bad_fraction)
    return counted


def _record_all(
    journal: log.Log, settings: Settings, unseen: list, skipped: list[int], *, leave: int
) -> None:
    """Records all but the last `leave` steps; DivergedError if too many updates were dropped.

    skipped: the steps whose updates were, to which this adds.
    """
    while len(unseen) > leave:
        number, metrics, counts = unseen.pop(0)
        if _record(journal, settings, number, metrics, counts):
            skipped.append(number)
            recent = sum(step > number - _WINDOW for step in skipped)
            if recent > settings.faults.max_skips:
                raise DivergedError(
                    number, f"step {number}: {recent} updates within {_WINDOW} steps were dropped"
                )


def _record(
    journal: log.Log, settings: Settings, number: int, metrics: dict, counts: dict[str, int]
) -> bool:
    """Fetches a step's metrics, shows them, writes a line if one is due; whether it was dropped.

    counts: of the samples left out of its batch; a line has their sums since the one before.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    skipped = values.pop("skipped") > 0
    journal.counts.update({**counts, "skipped_updates": int(skipped)})
    if skipped:
        log.say(
            journal.progress,
            f"step {number}: the update was dropped, since the loss is {values['loss']:g} and the "
            f"gradient's norm {values['grad_norm']:g}",
        )
    rate = log.advance(journal.progress, settings.batch_size, values["loss"])
    if number % settings.log.every_steps == 0:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        log.write(journal, number, {**known, "images_per_second": rate, **journal.counts})
        journal.counts.clear()
    return skipped


def _write_samples(journal: log.Log, workdir: Path, number: int, drawn: np.ndarray) -> None:
    pixels = images.grid(drawn)
    folder.write_atomic(workdir / "samples" / f"step_{number:06d}.png", images.png(pixels))
    log.picture(journal, number, "teacher and student", pixels)
