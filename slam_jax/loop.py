"""The steps of a run: what is counted, drawn and saved on the way, and what happens to faults."""

import collections
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from slam_jax import interrupt
from slam_jax.data import batches, tally
from slam_jax.distill.state import TrainState
from slam_jax.errors import Preempted, UserError
from slam_jax.runtime import (
    checkpoint,
    folder,
    hosts,
    images,
    log,
    peers,
    weights_and_biases,
)  # fmt: skip
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
    total: Callable[[np.ndarray], jax.Array]  # a host's counts -> those of all hosts
    draw: Callable[[Any], np.ndarray]  # target -> images [prompts, 2, H, W, 3]
    checkpoints: ocp.CheckpointManager
    push: Callable[[], None]  # copies the files of workdir to where they are kept, if not there
    track: weights_and_biases.Track
    progress: log.Progress


class Rollback(NamedTuple):
    """A line of rollbacks.jsonl: from which step back to which, and which data came then."""

    step: int
    back_to: int
    offset: int  # step n takes batch n - 1 + offset from here on


class _History(NamedTuple):
    """What happened since the loop began; its parts grow."""

    unseen: list[tuple[int, dict, jax.Array]]  # steps, metrics and counts not fetched yet
    skipped: list[int]  # steps whose updates were dropped
    counts: collections.Counter[str]  # of samples, on all hosts
    bad: collections.Counter[tuple[str, str]]  # samples of this host, by shard and reason


class DivergedError(ArithmeticError):
    """Too many updates had to be dropped."""


def to_the_end(run: Run, restored: Callable[[int], TrainState], done: int) -> TrainState:
    """The state after num_steps. `restored` gives the one of a saved step, and of step 0.

    Where too many updates are dropped the run goes back to its last checkpoint and on with other
    data. FloatingPointError if that does not help; Preempted, after Ctrl-C KeyboardInterrupt,
    once it has saved what it was left no time to go on with.
    """
    happened = _read_rollbacks(run.workdir)
    while True:
        offset = happened[-1].offset if happened else 0
        try:
            with interrupt.told_as_sigterm():
                return _steps(run, restored(done), done, offset)
        except DivergedError as error:
            failed, message = error.args
        # Outside the except clause, which would keep the old state alive beside the new one.
        if len(happened) >= run.settings.faults.max_rollbacks:
            raise FloatingPointError(
                f"{message}; the last checkpoint is kept: lower optimizer.learning_rate, or look "
                "at the data, and run again"
            )
        done = checkpoint.back(run.checkpoints, partial(log.say, run.progress)) or 0
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
    if hosts.is_first():
        folder.write_atomic(workdir / _ROLLBACKS, lines.encode())


def _steps(run: Run, now: TrainState, done: int, offset: int) -> TrainState:
    """The state after num_steps, from `now`, which is after `done`."""
    settings = run.settings
    with _open(run, done, offset) as (journal, feed):
        history = _History([], [], collections.Counter(), collections.Counter())
        for number in range(done + 1, settings.num_steps + 1):
            with _kept(run, journal, history, number - 1, now, alone=True):
                batch = next(feed)
            peers.step(number)
            now, metrics = run.step(now, batch.arrays)
            history.unseen.append((number, metrics, run.total(_counts(batch))))
            _list_bad(journal, history, number, batch)
            told = hosts.preempted(number)
            last = number == settings.num_steps
            draws = last or number % settings.eval.every_steps == 0
            saves = last or told or number % settings.checkpoint.every_steps == 0
            # The metrics of a step are fetched when the next one is under way, except that no
            # state is drawn or saved before it is known whether the run goes on from it.
            _record_all(journal, settings, history, leave=0 if draws or saves else 1)
            with _kept(run, journal, history, number, now):
                _check_data(history, settings.data.max_bad_fraction)
            if draws or saves:
                peers.step(None)
            if draws:
                with log.phase(run.progress, "drawing samples"):
                    _write_samples(journal, run.workdir, number, run.draw(now.target))
            if saves:
                _save(run, number, now, waits=last or told)
            else:
                checkpoint.check(run.checkpoints, partial(log.say, run.progress))
            if told:
                saved = f"saved after step {number}; the same command goes on"
                raise (
                    KeyboardInterrupt(saved)
                    if interrupt.asked()
                    else Preempted(f"told to end: {saved}")
                )
    return now


def _save(run: Run, number: int, now: TrainState, *, waits: bool = False) -> None:
    """After metrics and samples, and copying them: what precedes a checkpoint is never missing."""
    run.push()
    if waits:
        checkpoint.save_last(run.checkpoints, number, now)
    else:
        checkpoint.save(run.checkpoints, number, now, partial(log.say, run.progress))


@contextlib.contextmanager
def _open(run: Run, done: int, offset: int) -> Iterator[tuple[log.Log, Iterator[batches.Batch]]]:
    """The log and the batches from step `done` on; nothing moves unasked to or from a device."""
    data = run.settings.data
    feed = batches.iterate(
        run.dataset, done + offset,
        num_threads=data.num_threads, num_workers=data.num_workers, num_prefetch=_NUM_PREFETCH,
    )  # fmt: skip
    with (
        log.started(run.workdir, done, run.track, run.progress) as journal,
        contextlib.closing(feed),
        jax.transfer_guard("disallow"),
    ):
        yield journal, feed


@contextlib.contextmanager
def _kept(
    run: Run, journal: log.Log, history: _History, number: int, now: TrainState,
    *, alone: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Saves `now`, which is after `number`, where the data are at fault: it has been learnt.

    alone: the fault may be seen by this host alone. Then it cannot save if there are others.
    """
    try:
        yield
    except UserError:
        if not (alone and peers.known()) and number not in {0, *run.checkpoints.all_steps()}:
            _record_all(journal, run.settings, history, leave=0)
            _save(run, number, now)
        raise


def _counts(batch: batches.Batch) -> np.ndarray:
    return tally.counts(len(batch.arrays["input_ids"]), batch.dropped, batch.num_cut)


def _list_bad(journal: log.Log, history: _History, number: int, batch: batches.Batch) -> None:
    """Notes the bad samples of this host's part of the batch."""
    history.bad.update(tally.of_shards(batch.dropped))
    bad = [dropped._asdict() for dropped in batch.dropped if not dropped.filtered]
    log.bad_samples(journal, number, bad)


def _check_data(history: _History, max_bad_fraction: float) -> None:
    """UserError, on all hosts alike, if too many of the samples are bad."""
    tally.check(
        history.counts["good_samples"], history.counts["bad_samples"], history.bad,
        max_bad_fraction, "data.max_bad_fraction", so_far=True,
    )  # fmt: skip


def _record_all(journal: log.Log, settings: Settings, history: _History, *, leave: int) -> None:
    """Records all but the last `leave` steps; DivergedError if too many updates were dropped."""
    while len(history.unseen) > leave:
        number, metrics, counts = jax.device_get(history.unseen.pop(0))
        counted = dict(zip(tally.COUNTED, counts.tolist(), strict=True))
        history.counts.update(counted)
        del counted["good_samples"]
        if _record(journal, settings, number, metrics, counted):
            history.skipped.append(number)
            recent = sum(step > number - _WINDOW for step in history.skipped)
            if recent > settings.faults.max_skips:
                raise DivergedError(
                    number, f"step {number}: {recent} updates within {_WINDOW} steps were dropped"
                )


def _record(
    journal: log.Log,
    settings: Settings,
    number: int,
    metrics: dict[str, np.ndarray],
    counts: dict[str, int],
) -> bool:
    """Shows a step's metrics and writes a line if one is due; whether its update was dropped.

    counts: of the samples left out of its batch; a line has their sums since the one before.
    """
    values = {name: float(value) for name, value in metrics.items()}
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
    if not hosts.is_first():
        return
    pixels = images.grid(drawn)
    folder.write_atomic(workdir / "samples" / f"step_{number:06d}.png", images.png(pixels))
    log.picture(journal, number, "teacher and student", pixels)
