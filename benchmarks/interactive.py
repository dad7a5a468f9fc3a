"""Time drawing on request, and how soon `sample` has its first image.

    python benchmarks/interactive.py --model runs/tiny/student
    python benchmarks/interactive.py --model runs/tiny/student --starts 5 --steps 4

The first prints the milliseconds from a prompt that was not there before to pixels on the host, and
the memory; the second seconds from the start of `python -m slam_jax.sample` to its end, the first
time with an empty cache folder and later with what it left there.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from slam_jax import interactive
from slam_jax.weights import hub


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or ORG/NAME, a student")
    parser.add_argument("--dtype", default="float32", help="in which it computes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="pictures at once")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--starts", type=int, default=0, help="time as many later starts instead")
    options = parser.parse_args()
    if options.starts:
        time_starts(options.model, options.steps[-1], options.starts)
    else:
        time_pictures(options)


def time_pictures(options: argparse.Namespace) -> None:
    found = hub.find(options.model, "", "", "")
    drawer = interactive.start(found, dtype=options.dtype)
    device = jax.devices()[0].device_kind
    for batch in options.batch:
        interactive.prepare(drawer, [batch])
        for steps in options.steps:
            taken = [
                seconds(drawer, [f"{batch} {steps} {repeat} {i}" for i in range(batch)], steps)
                for repeat in range(options.repeats)
            ]
            wall, processor = (
                [1e3 * each for each in column] for column in zip(*taken, strict=True)
            )
            print(
                f"{device}, batch {batch}, {steps} steps: {statistics.median(wall):.1f} ms ("
                f"fastest {min(wall):.1f}; {statistics.median(processor):.1f} ms of processor)"
            )
        print(f"batch {batch}: {interactive.memory(drawer) / 2**20:.1f} MiB")


def seconds(drawer: interactive.Drawer, prompts: list[str], steps: int) -> tuple[float, float]:
    """That pictures of prompts, which are encoded first, take: in all, and of processors."""
    started, before = time.perf_counter(), time.process_time()
    interactive.pictures(drawer, prompts, [0] * len(prompts), steps)
    return time.perf_counter() - started, time.process_time() - before


def time_starts(model: str, steps: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "slam_jax.sample", f"--model={model}", f"--steps={steps}",
            "--prompt=a red circle above a blue square", f"--out={folder}/out.png",
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
        given = {**os.environ, "PYTHONPATH": paths, "SLAM_JAX_CACHE": f"{folder}/cache"}
        taken = []
        for _ in range(1 + count):
            started, before = time.perf_counter(), os.times()
            subprocess.run(command, env=given, check=True, stderr=subprocess.DEVNULL)
            after = os.times()
            processor = sum(after[2:4]) - sum(before[2:4])
            taken.append((time.perf_counter() - started, processor))
    first, *later = taken
    print(f"first start: {first[0]:.2f} s ({first[1]:.2f} s of processor)")
    wall, processor = (statistics.median(each) for each in zip(*later, strict=True))
    print(f"later starts, median of {count}: {wall:.2f} s ({processor:.2f} s of processor)")


if __name__ == "__main__":
    main()
