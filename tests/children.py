"""Programs run as children of one process that has imported them once, so that each starts fast."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]

# Reads the requests from stdin and prints the answers.
_SERVER = """
import io, json, os, re, runpy, signal, sys, tempfile
import slam_jax.evaluation.history, slam_jax.train, ml_collections.config_flags
from jax._src import xla_bridge
sys.modules["wandb"] = None  # as where it is not installed

class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True

def interrupt_at(moment):
    told = []

    def watch(event, given):
        if not told and event in ("open", "os.rename"):
            if re.search(moment, " ".join(map(str, given[:2]))):
                told.append(True)
                os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(watch)

def run(module, arguments, moment, terminal):
    if terminal:
        sys.stderr = Terminal(sys.stderr.buffer, write_through=True)
    if moment:
        interrupt_at(moment)
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(f"slam_jax.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    return status

answers = []
for request in json.load(sys.stdin):
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as touched,
    ):
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            status = run(*request)
            if xla_bridge.backends_are_initialized():
                os.write(touched.fileno(), b"yes")
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, errors, touched):
            file.seek(0)
        said = out.read().decode(), errors.read().decode()
        answers.append([status, *said, bool(touched.read())])
json.dump(answers, sys.stdout)
"""


class Request(NamedTuple):
    """A program and how it is run."""

    module: str  # "train" for slam_jax.train
    arguments: list[str]
    moment: str = ""  # a regex: SIGINT when a file that it fits is first opened or renamed
    terminal: bool = False  # whether stderr is one


class Answer(NamedTuple):
    """What became of it."""

    status: int
    stdout: str
    stderr: str
    touched: bool  # whether it began with devices


def run(
    requests: Mapping[str, Request], *, num_devices: int, **environment: str
) -> dict[str, Answer]:
    """What becomes of each, in this order."""
    server = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SERVER], input=json.dumps(list(requests.values())),
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), **environment},
    )  # fmt: skip
    answers = (Answer(*each) for each in json.loads(server.stdout))
    return dict(zip(requests, answers, strict=True))


def keeping_programs(folder: pathlib.Path) -> dict[str, str]:
    """The environment in which what is compiled is kept there."""
    return {
        "SLAM_JAX_CACHE": str(folder),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
