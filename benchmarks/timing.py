"""Compile a program, run it a few times, and print what it cost as one line of JSON."""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import models
from slam_jax import flops


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--size", choices=models.SIZES, default="tiny")
    options.add_argument("--batch", type=positive, default=8, help="images per call")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument(
        "--repeat", type=positive, default=10, help="timed calls, after one untimed"
    )
    options.add_argument(
        "--dry_run", action="store_true", help="trace only: print sizes, allocate nothing"
    )
    return options


def positive(text: str) -> int:
    """An option's integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def report(
    program: str, function: Callable, arguments: Callable, shapes: Any, options: argparse.Namespace
) -> None:
    """Prints the line.

    function(carry, *rest) -> (carry, output) is timed, each call taking the carry that the one
    before returned. arguments(parameters) -> (carry, *rest); shapes: those of the parameters.
    """
    line = {
        "program": program,
        **vars(options),
        "parameters": {name: _size(tree) for name, tree in shapes.items()},
        **surroundings(),
    }
    if options.dry_run:
        inputs = jax.eval_shape(arguments, shapes)
        line["flops"] = flops.count(jax.jit(function).trace(*inputs).jaxpr.jaxpr)
    else:
        inputs = jax.device_put(arguments(jax.device_put(models.random_parameters(shapes))))
        line |= measure(function, inputs, options.repeat)
        line["images_per_s"] = round(1e3 * options.batch / line["ms"], 3)
    print(json.dumps(line), flush=True)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def surroundings() -> dict[str, Any]:
    """Machine, versions, date and commit."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(function: Callable, inputs: tuple, repeat: int) -> dict[str, float | int | None]:
    """Times one call, ahead-of-time compiled and its carry donated, until its results are there."""
    started = time.perf_counter()
    traced = jax.jit(function, donate_argnums=0).trace(*inputs)
    lowered = traced.lower()
    traced_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    seconds = _run(compiled, inputs, repeat)
    median = statistics.median(seconds)
    operations = flops.count(traced.jaxpr.jaxpr)
    return {
        "ms": round(1e3 * median, 3),
        "ms_min": round(1e3 * min(seconds), 3),
        "ms_max": round(1e3 * max(seconds), 3),
        "trace_s": round(traced_at - started, 2),
        "compile_s": round(compiled_at - traced_at, 2),
        "flops": operations,
        "tflops_per_s": round(1e-12 * operations / median, 4),
        **_compiler_view(compiled),
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _run(compiled: Callable, inputs: tuple, repeat: int) -> list[float]:
    """Seconds of each call but the first, which also tunes and allocates."""
    carry, *rest = inputs
    seconds = []
    for _ in range(1 + repeat):
        started = time.perf_counter()
        carry, output = jax.block_until_ready(compiled(carry, *rest))
        seconds.append(time.perf_counter() - started)
    # NaN and infinity can take another time than numbers.
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(output))):
        raise FloatingPointError("the program's output is not finite: its time means nothing")
    return seconds[1:]


def _compiler_view(compiled: jax.stages.Compiled) -> dict[str, int | None]:
    """XLA's figures: null where it has none for this device."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "cost_analysis_flops": int(cost["flops"]) if cost and "flops" in cost else None,
        "program_bytes": memory
        and memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }
