"""Time what feeds a train step: pictures, worker processes, the cache of latents, tars.

Makes its own data, up to 2 GB, in a temporary folder, and reads it from the page cache.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from absl import flags
from PIL import Image

from benchmarks import synthetic, timing
from slam_jax.data import batches, image, pictures, sources

_SIZE = 512  # pixels


def jpeg(folder: Path, quick: bool) -> dict[str, float]:
    """A JPEG file in memory -> a training example, against Pillow alone; one thread."""
    files = synthetic.photographs(4 if quick else 48)
    made = _pictures(folder, files, len(files))
    seconds = {"ours": [], "bare": []}
    for _ in range(1 if quick else 9):
        seconds["bare"].append(_seconds(lambda: [_bare(file) for file in files]))
        seconds["ours"].append(
            _seconds(lambda: [made.example(i, (0, i)) for i in range(len(files))])
        )
    ours, bare = (statistics.median(seconds[name]) for name in ("ours", "bare"))
    return {
        **_rate(len(files), sum(map(len, files)), ours),
        "bare_samples_per_s": round(len(files) / bare, 1),
        "times_bare": round(ours / bare, 3),
    }


def _bare(file: bytes) -> np.ndarray:
    """The same work as few calls of Pillow's."""
    picture = Image.open(io.BytesIO(file)).convert("RGB")
    scale = _SIZE / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = (width - _SIZE) // 2, (height - _SIZE) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + _SIZE, top + _SIZE)))


def workers(folder: Path, quick: bool) -> dict[str, float]:
    """Batches of pictures from one worker process, and from two: the better of two tries each."""
    files = synthetic.photographs(4 if quick else 48)
    count, batch_size = (2, 4) if quick else (40, 64)
    made = _pictures(folder, files, 10**6)
    rates = {1: 0.0, 2: 0.0}
    for number in (1, 2) if quick else (1, 2, 1, 2):
        # The first ones were made while the processes started.
        seconds, _ = _epoch(made, batch_size, warm_up=8, count=count, num_workers=number)
        rates[number] = max(rates[number], count * batch_size / seconds)
    return {
        "samples_per_s": round(rates[1], 1),
        "samples_per_s_of_two": round(rates[2], 1),
        "two_over_one": round(rates[2] / rates[1], 3),
    }


def cache(folder: Path, quick: bool) -> dict[str, float]:
    """Batches of 256 posteriors [64, 64, 8] at random; a thread ahead of this one.

    The rate of a core is that of all the seconds that the process computed.
    """
    count, batch_size = (16, 4) if quick else (12_288, 256)
    made = synthetic.latents(folder / "cache", count, 64, per_shard=count // 4)
    num_bytes = made.manifest.num_bytes
    steps = count // batch_size
    seconds, cpu_seconds = _epoch(made, batch_size, warm_up=steps, count=steps, num_workers=0)
    return {
        **_rate(count, num_bytes, seconds),
        "samples_per_core_s": round(count / cpu_seconds, 1),
        "mb_per_core_s": round(1e-6 * num_bytes / cpu_seconds, 1),
    }


def memory(folder: Path, quick: bool) -> dict[str, float]:
    """Resident memory over an epoch of a million small records, after a tenth of one.

    Of Linux alone.
    """
    count, batch_size = (1_000, 10) if quick else (1_000_000, 250)
    made = synthetic.latents(folder / "cache", count, 8, per_shard=count // 100)
    steps, resident = count // batch_size, []
    seconds, _ = _epoch(
        made, batch_size, warm_up=steps // 10, count=steps, num_workers=0,
        between=lambda: resident.append(_resident_bytes()),
    )  # fmt: skip
    return {
        **_rate(count, made.manifest.num_bytes, seconds),
        "mb_before": round(1e-6 * resident[0], 1),
        "mb_after": round(1e-6 * resident[1], 1),
        "after_over_before": round(resident[1] / resident[0], 3),
    }


def tar(folder: Path, quick: bool) -> dict[str, float]:
    """The index of a large tar, and the first batch of many that are indexed."""
    files = synthetic.photographs(1)
    samples, many = (20, 10) if quick else (6_500, 10_000)
    large = folder / "large"
    large.mkdir()
    synthetic.tar(large / "00000.tar", files, samples, extra=max(0, 160_000 - len(files[0])))
    num_bytes = (large / "00000.tar").stat().st_size
    seconds = _seconds(
        lambda: len(sources.find(str(large / "*.tar"), str(folder / "index_of_large")))
    )
    shutil.rmtree(large)
    first, again = _many_tars(folder, files, many)
    return {
        "index_s": round(seconds, 3),
        **_rate(samples, num_bytes, seconds),
        "shards": many,
        "index_all_s": round(first, 3),
        "first_batch_s": round(again, 3),
    }


def _many_tars(folder: Path, files: tuple[bytes, ...], many: int) -> tuple[float, float]:
    """Seconds to the first batch of so many tars: without their indices, and with them."""
    shards = folder / "many"
    shards.mkdir()
    small = io.BytesIO()
    Image.open(io.BytesIO(files[0])).resize((64, 64)).save(small, "JPEG")
    synthetic.tar(shards / "00000.tar", (small.getvalue(),), 2, extra=0)
    content = (shards / "00000.tar").read_bytes()
    for number in range(1, many):
        (shards / f"{number:05d}.tar").write_bytes(content)
    tokenizers = synthetic.letters(folder / "tokenizer")

    def first_batch() -> None:
        source = sources.find(str(shards / "*.tar"), str(folder / "index"))
        made = pictures.Pictures(source, (), image.Crop(64, True, True), tokenizers)
        _epoch(made, 8, warm_up=0, count=1, num_workers=0)

    return _seconds(first_batch), _seconds(first_batch)


def _pictures(folder: Path, files: tuple[bytes, ...], size: int) -> pictures.Pictures:
    source, crop = synthetic.InMemory(files, size), image.Crop(_SIZE, random=True, flip=True)
    return pictures.Pictures(source, (), crop, synthetic.letters(folder / "tokenizer"))


def _epoch(
    examples, batch_size: int, *, warm_up: int, count: int, num_workers: int,
    between: Callable[[], Any] = lambda: None,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of the clock and of all cores in this process for `count` batches after a warm-up.

    between: called before and after these.
    """
    dataset = batches.batches(examples, num_examples=len(examples), batch_size=batch_size, seed=0)
    made = batches.iterate(dataset, 0, num_threads=1, num_workers=num_workers, num_prefetch=2)
    with contextlib.closing(made) as iterator:
        _drain(iterator, warm_up)
        between()
        started, computed = time.perf_counter(), time.process_time()
        _drain(iterator, count)
        seconds = time.perf_counter() - started, time.process_time() - computed
        between()
    return seconds


def _drain(iterator, count: int) -> None:
    for batch in itertools.islice(iterator, count):
        assert not batch.dropped, batch.dropped


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _rate(samples: int, num_bytes: int, seconds: float) -> dict[str, float]:
    return {
        "samples_per_s": round(samples / seconds, 1),
        "mb_per_s": round(1e-6 * num_bytes / seconds, 1),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


_MEASURES = {each.__name__: each for each in (jpeg, workers, cache, memory, tar)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=_MEASURES, default=list(_MEASURES))
    parser.add_argument(
        "--quick", action="store_true", help="a few samples: the figures say nothing"
    )
    parser.add_argument("--folder", help="where the temporary folder is to be; $TMPDIR by default")
    options = parser.parse_args()
    # Grain's worker processes ask absl.
    flags.FLAGS(sys.argv[:1])
    for name in options.only:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures = _MEASURES[name](Path(folder), options.quick)
        line = {
            "program": "data", "measure": name, "quick": options.quick, **figures,
            "cpus": os.cpu_count(), **timing.surroundings(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
