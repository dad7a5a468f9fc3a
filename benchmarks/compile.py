"""Time until a config's train step is compiled: with empty caches, and in a process after that.

    python benchmarks/compile.py --config configs/sd15.py --batch 16

Nothing runs, and of the teacher shapes alone are needed, so neither weights nor memory for them.
--topology h200 compiles for a GPU that is not here, machine code included, but without trying out
algorithms on it as XLA does where there is one; once, since nothing is kept. Prints a line of JSON.
"""

import argparse
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from benchmarks import timing
from slam_jax import arguments, program, settings
from slam_jax.runtime import mesh, topologies


def compile_step(options: argparse.Namespace) -> dict[str, float]:
    """Seconds that it takes here and now; with no_xla as far as XLA's input."""
    values = runpy.run_path(options.config)["get_config"]().to_dict()
    chosen = settings.from_config(
        values | {"batch_size": options.batch, "accumulate": 1, "attention": options.attention}
    )
    elsewhere = options.topology
    places = topologies.devices(elsewhere, options.attention) if elsewhere else jax.devices()
    devices = mesh.make(chosen.mesh.axes, places)
    teacher, _ = arguments.teacher(chosen)
    built = program.build(chosen, program.parts(chosen, teacher), devices)
    frozen = arguments.frozen(chosen, teacher, devices)
    inputs = frozen, arguments.batch(chosen, teacher, devices), arguments.key(devices)
    started = time.perf_counter()
    lower = built.step.lower if elsewhere else built.lower
    lowered = lower(built.like, *inputs)
    lowered_at = time.perf_counter()
    if options.no_xla:
        return {"lower_s": lowered_at - started}
    lowered.compile(compiler_options=topologies.options(places[0].platform))
    return {"lower_s": lowered_at - started, "compile_s": time.perf_counter() - lowered_at}


def in_a_process(arguments: list[str], caches: str) -> dict[str, float]:
    """The same in one of its own."""
    environment = {
        **os.environ, "SLAM_JAX_CACHE": caches, "JAX_COMPILATION_CACHE_DIR": f"{caches}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", __file__, *arguments, "--once"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/sd15.py")
    parser.add_argument("--batch", type=timing.positive, default=16, help="images")
    parser.add_argument("--attention", default="xla", help="flash on TPUs, cudnn on GPUs")
    parser.add_argument("--topology", help="a GPU that is not here, such as h200")
    parser.add_argument("--no_xla", action="store_true", help="stop at what XLA would be given")
    parser.add_argument("--once", action="store_true", help="here, with whatever is cached")
    options = parser.parse_args()
    if options.once:
        with timing.refusing(parser):
            print(json.dumps(compile_step(options)))
        return
    with tempfile.TemporaryDirectory() as caches:
        times = ("cold",) if options.topology else ("cold", "warm")
        measured = {name: in_a_process(sys.argv[1:], caches) for name in times}
    found = {"program": "compile", "config": options.config, "batch": options.batch}
    found |= {"attention": options.attention, **timing.surroundings()}
    if options.topology:
        found |= {"topology": options.topology, "cpus": os.cpu_count()}
    for name, seconds in measured.items():
        found |= {f"{name}_{part}": round(each, 2) for part, each in seconds.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
