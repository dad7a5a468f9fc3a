"""Rows of a comparison: every image is drawn and measured once, by whichever host or run."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from slam_jax.evaluation import drawing, pixels, protocol, samplers, score, store
from slam_jax.evaluation.drawing import Candidate
from slam_jax.evaluation.measure import Meters
from slam_jax.evaluation.prompts import Chosen
from slam_jax.evaluation.protocol import Protocol
from slam_jax.evaluation.reference import Reference
from slam_jax.evaluation.samplers import Entry
from slam_jax.evaluation.store import Arrays
from slam_jax.evaluation.table import Row
from slam_jax.runtime import folder, images, log

SHOWN = 8  # images of each row that are always kept


class Setup(NamedTuple):
    """What all rows share."""

    out: Path
    protocol: Protocol
    digest: str  # the protocol's hash
    chosen: Chosen
    meters: Meters
    devices: Mesh  # of this host
    part: tuple[int, int]  # index of this host, how many there are
    keep_images: bool


def num_calls(setup: Setup, candidates: Sequence[Candidate]) -> int:
    """Of the UNets, for all images of all rows: what a progress bar counts."""
    calls = sum(samplers.network_calls(entry) for each in candidates for entry in each.entries)
    return calls * len(setup.chosen.captions)


def draw_all(setup: Setup, candidates: Sequence[Candidate], progress: log.Progress) -> None:
    """Draws and measures this host's share of what is missing; one model at a time on devices."""
    for candidate in candidates:
        todo = {}
        for entry in candidate.entries:
            where = _folder(setup, candidate, entry)
            todo[entry] = _missing(setup, where)
            done = len(setup.chosen.captions) - sum(map(len, todo[entry]))
            # What was done before takes no time, and tells nothing of the time to come.
            progress.bar.initial += done * samplers.network_calls(entry)
            progress.bar.update(done * samplers.network_calls(entry))
        if any(todo.values()):
            _draw(setup, candidate, todo, progress)


def _missing(setup: Setup, where: Path) -> list[range]:
    count = len(setup.chosen.captions)
    if not setup.keep_images:
        return store.missing(where, count, setup.part)
    kept = store.missing(where, count, setup.part)
    return [
        shard
        for shard in store.shards(count, setup.part)
        if shard in kept or not all(_picture(where, number).exists() for number in shard)
    ]


def _draw(
    setup: Setup, candidate: Candidate, todo: dict[Entry, list[range]], progress: log.Progress
) -> None:  # fmt: skip
    batch_size = _batch_size(setup)
    with log.phase(progress, f"{candidate.name}: loading"):
        artist = drawing.start(
            candidate, setup.chosen.captions, setup.protocol.images.size, setup.protocol.seed,
            setup.devices,
        )  # fmt: skip
    for entry, shards in todo.items():
        where = _folder(setup, candidate, entry)
        if not shards:
            continue
        about = {"model": candidate.name, **entry._asdict(), "protocol": setup.digest}
        folder.write_atomic(where / "about.json", json.dumps(about, indent=2).encode())
        name = f"{candidate.name}, {samplers.title(entry)}"
        with log.phase(progress, f"{name}: compiling"):
            draw = drawing.drawer(artist, entry, batch_size)
        with log.phase(progress, name):
            advance = partial(_advance, progress, samplers.network_calls(entry))
            measure = partial(_measure, setup, where, draw, batch_size, advance, [])
            store.fill(where, shards, measure)


def _batch_size(setup: Setup) -> int:
    """Images at a time: no more than are kept together, and the same number on each device."""
    devices, count = setup.devices.size, min(store.SIZE, len(setup.chosen.captions))
    return devices * min(setup.protocol.comparison.batch_size, -(-count // devices))


def _measure(
    setup: Setup, where: Path, draw: Callable, batch_size: int, advance: Callable[[int], None],
    drawn_before: list[bool], shard: range,
) -> Arrays:  # fmt: skip
    """What is kept of these images."""
    batches = []
    for numbers in pixels.batches(shard, batch_size):
        start = time.perf_counter()
        drawn = draw(numbers)
        seconds = (time.perf_counter() - start) / batch_size
        measured = pixels.resized(drawn, setup.protocol.images)
        outputs = setup.meters.features_of(measured)
        scores = setup.meters.scores_of(measured, [setup.chosen.captions[n] for n in numbers])
        batches.append({
            "features": outputs.pop("pool"), **outputs, **scores,
            "seconds": np.full(batch_size, seconds),
            # Devices take their time over the first batch.
            "is_first": np.full(batch_size, not drawn_before),
        })  # fmt: skip
        drawn_before.append(True)
        count = min(batch_size, shard.stop - int(numbers[0]))
        _keep(where, numbers[:count], drawn, setup.keep_images)
        advance(count)
    return {
        name: np.concatenate([batch[name] for batch in batches])[: len(shard)]
        for name in batches[0]
    }


def _advance(progress: log.Progress, calls: int, count: int) -> None:
    progress.bar.update(calls * count)


def _keep(where: Path, numbers: np.ndarray, drawn: drawing.Pictures, keep_images: bool) -> None:
    for number, picture in zip(numbers.tolist(), drawn, strict=False):
        if keep_images or number < SHOWN:
            folder.write_atomic(_picture(where, number), images.png(picture))


def _picture(where: Path, number: int) -> Path:
    return where / f"{number:06d}.png"


def rows(setup: Setup, candidates: Sequence[Candidate], reference: Reference) -> list[Row]:
    """The numbers, once all hosts have drawn."""
    return [
        _row(setup, candidate, entry, reference)
        for candidate in candidates
        for entry in candidate.entries
    ]


def _row(setup: Setup, candidate: Candidate, entry: Entry, reference: Reference) -> Row:
    count = len(setup.chosen.captions)
    measured = store.read(_folder(setup, candidate, entry), count)
    later = ~measured["is_first"]
    seconds = measured["seconds"][later if later.any() else slice(None)]
    return Row(
        model=candidate.name,
        sampler=entry.sampler,
        steps=entry.steps,
        guidance=entry.w,
        network_calls=samplers.network_calls(entry),
        seconds=float(seconds.mean()),
        images=count,
        scores=score.scores(measured, reference, setup.chosen.labels, setup.protocol),
    )


def picture(setup: Setup, candidates: Sequence[Candidate]) -> bytes:
    """A PNG with the first images of every row."""
    captions = setup.chosen.captions[:SHOWN]
    names = [
        f"{candidate.name}, {samplers.title(entry)}"
        for candidate in candidates
        for entry in candidate.entries
    ]
    shown = [
        _shown(_folder(setup, candidate, entry), len(captions))
        for candidate in candidates
        for entry in candidate.entries
    ]
    return images.png(images.labelled_grid(np.stack(shown) / 255.0, names, captions))


def _shown(where: Path, count: int) -> drawing.Pictures:
    return np.stack([_read(_picture(where, number)) for number in range(count)])


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def _folder(setup: Setup, candidate: Candidate, entry: Entry) -> Path:
    """Where a row is kept; what decides its images and how they are measured decides its name."""
    key = protocol.of_json([candidate.identity, entry._asdict(), setup.digest])
    return setup.out / "rows" / key[:16]
