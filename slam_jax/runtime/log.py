"""What a run tells while it runs: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar.

The first host tells it; every other one lists only its own bad samples, in a file of its own.
"""

import collections
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from slam_jax.runtime import hosts, weights_and_biases

METRICS = "metrics.jsonl"


class Progress(NamedTuple):
    """The bar, and how long its last steps took."""

    bar: tqdm
    seconds: collections.deque[float]
    mark: list[float]  # when the last step ended, unless something else was done since


class Log(NamedTuple):
    """The open ends: the metrics file, TensorBoard's writer, Weights & Biases and the progress."""

    lines: TextIO
    events: Any  # tensorboardX.SummaryWriter
    track: weights_and_biases.Track
    progress: Progress
    bad: TextIO
    counts: collections.Counter[str]  # since the last line


@contextlib.contextmanager
def bar(step: int, num_steps: int) -> Iterator[Progress]:
    """A progress bar over the steps, with the time to come; shown on a terminal alone."""
    with open(os.devnull, "w") as nowhere, tqdm(
        total=num_steps, initial=step, dynamic_ncols=True, desc="starting", mininterval=0.5,
        file=sys.stderr if hosts.is_first() and sys.stderr.isatty() else nowhere,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        "[{elapsed}<{remaining}{postfix}]",
    ) as progress:  # fmt: skip
        yield Progress(progress, collections.deque(maxlen=32), [])


@contextlib.contextmanager
def started(
    workdir: Path, step: int, track: weights_and_biases.Track, progress: Progress
) -> Iterator[Log]:
    """The log of a run that stands at `step`; later lines, and a half-written one, are cut off."""
    host, num_hosts = hosts.part()
    # Imported here, since it takes seconds where torch is installed, and few programs log.
    from tensorboardX import SummaryWriter

    metrics = workdir / METRICS if host == 0 else Path(os.devnull)
    bad_samples = workdir / _bad_samples_name(host)
    left = (path for path in workdir.glob("bad_samples.*.jsonl") if _host(path) >= num_hosts)
    for path in (metrics, bad_samples, *(left if host == 0 else ())):
        _truncate(path, step)
    events = partial(SummaryWriter, str(workdir / "events"), write_to_disk=hosts.is_first())
    with (
        open(metrics, "a") as lines,
        open(bad_samples, "a") as bad,
        events(purge_step=step + 1) as writer,
    ):
        progress.bar.set_description_str("training")
        if track is not weights_and_biases.nowhere:
            for line in metrics.read_text().splitlines():
                values = json.loads(line)
                track(values.pop("step"), values)
        yield Log(lines, writer, track, progress, bad, collections.Counter())


def _bad_samples_name(host: int) -> str:
    return "bad_samples.jsonl" if host == 0 else f"bad_samples.{host}.jsonl"


def _host(bad_samples: Path) -> int:
    number = bad_samples.name.split(".")[1]
    return int(number) if number.isdecimal() else 0


def _truncate(path: Path, step: int) -> None:
    """Keeps the lines of steps <= `step`, in place: a kill midway loses none of them."""
    if not path.is_file():
        return
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
    with open(path, "r+b") as file:
        file.truncate(kept)


def write(log: Log, step: int, values: Mapping[str, float]) -> None:
    """One line of metrics.jsonl, flushed, and the same for TensorBoard and Weights & Biases."""
    log.lines.write(json.dumps({"step": step, **values}) + "\n")
    log.lines.flush()
    for name, value in values.items():
        log.events.add_scalar(name, value, step)
    log.track(step, values)


def say(progress: Progress, warning: str) -> None:
    """A line on the first host's stderr, above the bar."""
    if hosts.is_first():
        progress.bar.write(f"warning: {warning}", file=sys.stderr)


def bad_samples(log: Log, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """A line of bad_samples.jsonl for each sample that was left out; says so the first time."""
    if samples and not log.bad.tell():
        first = samples[0]
        log.progress.bar.write(
            f"warning: {first['shard']}: {first['key']}: {first['reason']}; the next good sample "
            f"is taken instead; all such samples are listed in {log.bad.name}", file=sys.stderr,
        )  # fmt: skip
    for sample in samples:
        log.bad.write(json.dumps({"step": step, **sample}) + "\n")
    log.bad.flush()


def picture(log: Log, step: int, name: str, pixels: np.ndarray) -> None:
    """A picture, uint8 [h, w, 3], for TensorBoard and Weights & Biases."""
    log.events.add_image(name, pixels, step, dataformats="HWC")
    log.track(step, {name: pixels})


def advance(progress: Progress, batch_size: int, loss: float) -> float:
    """Moves the bar on by one step; returns the images per second, 0 before that is known."""
    now = time.perf_counter()
    if progress.mark:
        progress.seconds.append(now - progress.mark[0])
    progress.mark[:] = [now]
    rate = batch_size * len(progress.seconds) / (sum(progress.seconds) or 1.0)
    progress.bar.update()
    progress.bar.set_postfix_str(f"{rate:.1f} images/s, loss {loss:.4g}", refresh=False)
    return rate


@contextlib.contextmanager
def phase(progress: Progress, name: str) -> Iterator[None]:
    """Shows `name` on the bar, kept ticking, while something other than training goes on.

    The time it takes counts neither in the images per second nor in the time to come.
    """
    finished = threading.Event()
    shown = progress.bar

    def tick() -> None:
        while not finished.wait(shown.mininterval):
            shown.refresh()

    before = shown.desc
    shown.set_description_str(name)
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        finished.set()
        ticker.join()
        # tqdm measures its rate from here.
        shown.last_print_t = time.time()
        progress.mark.clear()
        shown.set_description_str(before)
