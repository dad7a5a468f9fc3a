"""Time train steps while a checkpoint is written in the background, against undisturbed ones.

The state is random float32 numbers. The step multiplies matrices on all cores, which the writing
then takes from it; or, with --idle_ms, waits as a host does whose accelerators compute.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks import timing
from slam_jax.runtime import checkpoint, checksums

_SIDE = 1024
_LEAF_MB = _SIDE * _SIDE * 4e-6


def _state(mb: int) -> dict[str, jax.Array]:
    """As many matrices as make up the size."""
    keys = jax.random.split(jax.random.key(0), max(1, round(mb / _LEAF_MB)))
    return {f"{i:03d}": jax.random.normal(key, (_SIDE, _SIDE)) for i, key in enumerate(keys)}


def _step(products: int, idle_ms: int | None) -> Callable[[jax.Array], jax.Array]:
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, y: jnp.tanh(y @ x), x)

    def wait(x: jax.Array) -> jax.Array:
        time.sleep(1e-3 * idle_ms)
        return small(x)

    small = jax.jit(jnp.sum)
    return wait if idle_ms else jax.jit(run)


def _timed(step: Callable, x: jax.Array) -> float:
    started = time.perf_counter()
    step(x).block_until_ready()
    return time.perf_counter() - started


def measure(folder: Path, mb: int, step: Callable, num_saves: int) -> dict[str, float]:
    """Saves, and after each as many undisturbed steps as there were during it."""
    state = _state(mb)
    x = next(iter(state.values())) / _SIDE
    _timed(step, x)
    during, alone, blocked, writing = [], [], [], []
    checkpoints = checkpoint.manager(folder, keep=1, keep_every=0)
    with checkpoint.closing(checkpoints, _fail):
        for number in range(1 + num_saves):
            steps = []
            started = time.perf_counter()
            checkpoint.save(checkpoints, number, state, _fail)
            returned = time.perf_counter()
            while checkpoints.is_saving_in_progress():
                steps.append(_timed(step, x))
            written = time.perf_counter()
            quiet = [_timed(step, x) for _ in steps]
            if number:  # the first one also makes threads and compiles the copy
                during += steps[:-1] or steps  # in the last one it came to its end
                alone += quiet
                blocked.append(returned - started)
                writing.append(written - started)
        started = time.perf_counter()
        damage = checksums.problem(checkpoints.directory / str(num_saves), "default")
        checking = time.perf_counter() - started
    if damage:
        raise OSError(damage)
    return _figures(during, alone, blocked, writing) | {
        "state_mb": round(sum(leaf.nbytes for leaf in state.values()) * 1e-6, 1),
        "check_ms": round(1e3 * checking, 1),
    }


def _figures(
    during: list[float], alone: list[float], blocked: list[float], writing: list[float]
) -> dict[str, float]:
    undisturbed, saving = statistics.mean(alone), statistics.mean(during)
    return {
        "ms": round(1e3 * undisturbed, 2),
        "ms_while_saving": round(1e3 * saving, 2),
        "overhead": round(saving / undisturbed - 1, 4),
        "steps": len(during),
        "blocked_ms": round(1e3 * statistics.median(blocked), 2),
        "save_ms": round(1e3 * statistics.median(writing), 1),
    }


def _copy_ms(mb: int) -> float:
    """What the copy of the state off the devices takes at the least: one of its memory."""
    host = [np.asarray(leaf) for leaf in _state(mb).values()]
    started = time.perf_counter()
    for leaf in host:
        leaf.copy()
    return round(1e3 * (time.perf_counter() - started), 2)


def _fail(problem: str) -> None:
    raise OSError(problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=timing.positive, default=400, help="size of the state")
    parser.add_argument("--products", type=timing.positive, default=8, help="in a step, of 1024²")
    parser.add_argument("--idle_ms", type=timing.positive, help="wait so long instead")
    parser.add_argument("--saves", type=timing.positive, default=5, help="after one untimed")
    parser.add_argument("--folder", help="where the temporary folder is to be; $TMPDIR by default")
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        step = _step(options.products, options.idle_ms)
        figures = measure(Path(folder), options.mb, step, options.saves)
    line = {
        "program": "checkpoint", "products": options.products, "idle_ms": options.idle_ms,
        "saves": options.saves, **figures,
        "copy_ms": _copy_ms(options.mb), "cpus": os.cpu_count(), **timing.surroundings(),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
