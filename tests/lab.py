"""Runs the program as a user does, on a random model, in a folder of its own."""

import contextlib
import importlib
import json
import os
import pathlib
import pty
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp

sys.path.append(str(pathlib.Path(__file__).parent))
children = importlib.import_module("children")
ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 12
SAVE_EVERY = 2

# What every run begins with. Importing some packages fails, as where they are not installed.
# JAX lets process 0 alone keep what it has compiled, which on CPUs no other process can use.
SITE = """
import sys
import types

import jax._src.compiler

jax._src.compiler.distributed = types.SimpleNamespace(
    global_state=types.SimpleNamespace(process_id=0)
)

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(name + " is blocked in this test")

sys.meta_path.insert(0, Blocker())
"""


def free_port() -> int:
    """One at which nobody on this machine listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def end(processes: list[subprocess.Popen], seconds: int = 200) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each, which are killed if they take longer."""
    try:
        told = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *said) for p, said in zip(processes, told, strict=True)]


def run_on_hosts(
    program: str, num_processes: int, *arguments: str, num_devices: int = 4, seconds: int = 200
) -> list[dict]:
    """What each process of a job prints last, as json: its "processes" says that they met.

    program: Python that is given process, number of processes, port, and the arguments.
    """
    environment = {
        **os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices // num_processes),
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, (process, num_processes, port)), *arguments],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process in range(num_processes)
    ]  # fmt: skip
    done = end(processes, seconds)
    for status, _, err in done:
        assert status == 0, err
    seen = [json.loads(out.splitlines()[-1]) for _, out, _ in done]
    assert all(each["processes"] == num_processes for each in seen)
    return seen


class Lab:
    """Runs the program in a folder of its own, where the teacher is ./model."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.folder = folder
        self.environment = {
            **os.environ, "JAX_NUM_CPU_DEVICES": "1",
            # One for all labs of a process, whose programs are often the same.
            **children.keeping_programs(folder.parent / "compiled"),
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)]),
        }  # fmt: skip
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        (folder / "model").symlink_to(model)

    def start(
        self, workdir: str, cwd: str = ".", *flags: str, stderr: int = subprocess.PIPE,
        **environment: str,
    ) -> subprocess.Popen:  # fmt: skip
        """flags: further ones of the program, which win over those that are always given."""
        settings = {
            "teacher.model": "model", "num_steps": NUM_STEPS, "batch_size": 4, "accumulate": 2,
            "student.gamma_dim": 8, "student.cond_proj": "random", "distill.length": 40,
            "distill.stride": 20,
            "optimizer.learning_rate": 1e-2, "data.num_threads": 1, "log.every_steps": 1,
            "checkpoint.every_steps": SAVE_EVERY, "eval.every_steps": 5, "eval.teacher_steps": 2,
            "eval.student_steps": 2, "eval.judge": "", "faults.max_skips": 1,
            "eval.prompts": ("a circle", "a square"),
        }  # fmt: skip
        return subprocess.Popen(
            [
                sys.executable, "-m", "slam_jax.main", "--config", str(ROOT / "configs/tiny.py"),
                "--workdir", str(self.folder / workdir),
                *(f"--config.{name}={value}" for name, value in settings.items()), *flags,
            ],
            cwd=self.folder / cwd, env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip

    def on_terminal(self, *arguments: str) -> tuple[int, str]:
        """(exit status, what is shown) of what `start` starts, its stderr a terminal."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 120))
        process = self.start(*arguments, stderr=theirs)
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            # An error is how a terminal ends that nobody writes to any more.
            while chunk := terminal.read(2**16):
                shown += chunk
        process.communicate()
        return process.returncode, shown.decode()

    def finish(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of what `start` starts."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate()
        return process.returncode, out, err

    def start_hosts(self, workdir: str, *flags: str, num: int = 2) -> list[subprocess.Popen]:
        """That many processes of one job, with two devices between them."""
        job = (f"--coordinator=localhost:{free_port()}", f"--num_processes={num}")
        return [
            self.start(
                workdir, ".", *job, f"--process_id={process}", *flags,
                JAX_NUM_CPU_DEVICES=str(2 // num),
            )
            for process in range(num)
        ]  # fmt: skip


def lines(workdir: pathlib.Path) -> list[dict]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir: pathlib.Path) -> list[dict]:
    """All that was logged, but for the speed."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(workdir)]


def saved(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def state(workdir: pathlib.Path, step: int = NUM_STEPS) -> dict:
    """What the checkpoint of a step holds, as numpy arrays, whatever devices wrote it."""
    path = (workdir / "checkpoints" / str(step) / "default").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def flat(tree, path="") -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every leaf."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield from flat(value, f"{path}/{key}")
    elif tree is not None:
        yield path, np.asarray(tree)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Pictures, weights and schedulers below the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name.startswith(("step_", "diffusion", "model", "scheduler"))
    }
