"""Run implementations of one program in turns, and print what each cost as a line of JSON."""

import argparse
import contextlib
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import models
from slam_jax import flops
from slam_jax.errors import UserError
from slam_jax.nets import kernels

IMPLEMENTATIONS = ("jax", "torch", "torch_compile")


class Runner(NamedTuple):
    """An implementation that is ready to run."""

    call: Callable[[], Any]  # one call, until its results are there; returns what is to be finite
    figures: dict[str, Any]  # what its line says besides the times


def parser(description: str) -> argparse.ArgumentParser:
    """The options that both programs have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--size", choices=models.SIZES, default="tiny")
    options.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, default=["jax"], help="run in turns"
    )
    options.add_argument("--batch", type=positive, default=8, help="images per call")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument(
        "--attention", choices=kernels.BY_NAME, default="xla", help="JAX's: flash on TPUs"
    )
    options.add_argument(
        "--repeat", type=positive, default=10, help="timed calls, after some untimed"
    )
    options.add_argument(
        "--compile_mode", default="default", help="of torch.compile, such as reduce-overhead"
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


@contextlib.contextmanager
def refusing(options: argparse.ArgumentParser) -> Iterator[None]:
    """Within it a user's mistake ends the program with one line and status 2."""
    try:
        yield
    except UserError as error:
        options.error(str(error))


def report(
    program: str, options: argparse.Namespace, shared: Mapping[str, Any],
    runners: Mapping[str, Runner],
) -> None:  # fmt: skip
    """Runs them in turns, A B A B, and prints a line for each.

    shared: what all lines say.
    """
    common = {**shared, **surroundings()}
    if options.dry_run:
        print(json.dumps({"program": program, **vars(options), **common}), flush=True)
        return
    seconds = {name: [] for name in runners}
    for _ in range(options.repeat):
        for name, runner in runners.items():
            seconds[name].append(_timed(runner, name))
    for name, runner in runners.items():
        line = {
            "program": program, **vars(options), "impl": name, "in_turns_with": [*runners],
            **common, **runner.figures, "device_peak_bytes": _peak(name),
            **_spread(seconds[name]),
        }  # fmt: skip
        line["images_per_s"] = round(1e3 * options.batch / line["ms"], 3)
        line["tflops_per_s"] = round(1e-9 * line["flops"] / line["ms"], 4)
        if name != "jax" and "jax" in runners:
            ratios = [a / b for a, b in zip(seconds[name], seconds["jax"], strict=True)]
            line["ms_over_jax"] = round(statistics.median(ratios), 3)
        print(json.dumps(line), flush=True)


def _timed(runner: Runner, name: str) -> float:
    started = time.perf_counter()
    output = runner.call()
    seconds = time.perf_counter() - started
    # NaN and infinity can take another time than numbers.
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(output))):
        raise FloatingPointError(f"what {name} computes is not finite: its time means nothing")
    return seconds


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    values = {
        "ms": median, "ms_min": min(seconds), "ms_q1": low, "ms_q3": high, "ms_max": max(seconds)
    }  # fmt: skip
    return {name: round(1e3 * float(value), 3) for name, value in values.items()}


def _peak(name: str) -> int | None:
    """Most memory in use since the process started; null on a CPU, and torch has its own."""
    if name != "jax":
        # Here, since a machine without torch runs the rest.
        from benchmarks import torch_nets

        return torch_nets.peak_bytes()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def count(function: Callable, *inputs: Any) -> int:
    """FLOPs of a call, from shapes alone."""
    return flops.count(jax.jit(function).trace(*inputs).jaxpr.jaxpr)


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


def of_jax(function: Callable, inputs: tuple) -> Runner:
    """function(carry, *rest) -> (carry, output), compiled ahead of time and its carry donated.

    Each call takes the carry that the one before returned.
    """
    started = time.perf_counter()
    traced = jax.jit(function, donate_argnums=0).trace(*inputs)
    lowered = traced.lower()
    traced_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    carry, *rest = inputs
    held = [carry]

    def call() -> Any:
        held[0], output = jax.block_until_ready(compiled(held[0], *rest))
        return output

    return Runner(call, {
        "trace_s": round(traced_at - started, 2),
        "compile_s": round(compiled_at - traced_at, 2),
        "executed_flops": flops.count(traced.jaxpr.jaxpr),
        **_compiler_view(compiled),
    })  # fmt: skip


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
