"""Joining a job under every launcher that can be faked, and what a missing process does to it.

Processes on this machine, which talk through gloo.
"""

import importlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from slam_jax.errors import UserError
from slam_jax.runtime import hosts, peers

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
labs = importlib.import_module("lab")
TIMEOUT_S = 8

# Arguments: what goes wrong, and in which process; then the flags. Prints what it is as json.
PROGRAM = """
import json, os, signal, sys, time
from absl import flags
from slam_jax import command
from slam_jax.errors import UserError
from slam_jax.runtime import hosts, peers

given = command.hosts_flags()
fault, num_steps = sys.argv.pop(1), int(sys.argv.pop(1))

def main():
    hosts.start(*given(), timeout_s=TIMEOUT_S, saves_on_sigterm=True)
    import jax, numpy as np
    process, num = hosts.part()
    about = {"part": [process, num], "first": hosts.is_first(), "pid": os.getpid()}
    about["gpus"] = jax.config.values["jax_cuda_visible_devices"]
    print(json.dumps(about), flush=True)
    mesh = jax.make_mesh((num,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    total = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    mine = jax.make_array_from_process_local_data(rows, np.full(1, process + 1.0, np.float32))
    for step in range(1, num_steps + 1):
        if step == 3 and process == 1:
            if fault == "hangs":
                time.sleep(1000)
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "mistaken":
                raise UserError("a bad file")
            if fault == "busy":
                peers.step(None)
                time.sleep(1.5 * TIMEOUT_S)
            if fault == "buggy":
                raise KeyError("a bug")
        peers.step(step)
        assert float(total(mine)) == num * (num + 1) / 2
        time.sleep(0.05)
        if hosts.preempted(step):
            print("saved at", step, flush=True)
            sys.exit(42)
    peers.step(None)

command.run(main, required=(), leave=hosts.leave)
""".replace("TIMEOUT_S", str(TIMEOUT_S))

LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_COORD")
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}


def begin(*flags: str, fault: str = "", num_steps: int = 4, **environment) -> subprocess.Popen:
    env = {
        **clean(), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(ROOT), **environment,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, fault, str(num_steps), *flags],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def begin_two(**options) -> list[subprocess.Popen]:
    port = labs.free_port()
    return [
        begin(
            f"--coordinator=localhost:{port}", "--num-processes=2", f"--process-id={process}",
            **options,
        )
        for process in range(2)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    return labs.end(processes, seconds=60)


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


# Launchers.


def slurm(process: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process),
        "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def open_mpi(process: int, port: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def open_mpi_4(process: int, port: int) -> dict[str, str]:
    return open_mpi(process, port) | {OPEN_MPI_4: "1531576320.0;tcp://127.0.0.1:34911"}


def mpich(process: int, port: int) -> dict[str, str]:
    return {"PMI_SIZE": "2", "PMI_RANK": str(process), "MPI_LOCALRANKID": str(process)}


@pytest.mark.parametrize(
    ("launcher", "told_where"),
    [(slurm, False), (open_mpi_4, False), (open_mpi, True), (mpich, True)],
)
def test_processes_find_each_other_under_a_launcher(launcher, told_where):
    port = labs.free_port()
    flags = [f"--coordinator=localhost:{port}"] if told_where else []
    done = end([begin(*flags, **launcher(process, port)) for process in range(2)])
    for process, (status, out, err) in enumerate(done):
        assert status == 0, err
        about = json.loads(out.splitlines()[0])
        assert about["part"] == [process, 2] and about["first"] == (process == 0)
        assert about["gpus"] == str(process)  # one process per GPU


def alone(monkeypatch, *given, **environment) -> bool:
    for name in set(os.environ) - set(clean()):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    hosts.start(*(given or (None, None, None)), timeout_s=60)
    assert time.monotonic() - began < 1
    return not peers.known()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        slurm(0, 1) | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        # In the script of sbatch or the shell of salloc, not started by srun.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process_starts_at_once(monkeypatch, environment):
    assert alone(monkeypatch, **environment)


def test_one_process_may_say_so(monkeypatch):
    assert alone(monkeypatch, "localhost:9", 1, 0, **slurm(1, 1))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((None, 2, None), "give all three"),
        ((None, None, 0), "give all three"),
        (("localhost:9", None, None), "give all three"),
        (("localhost:9", 2, None), "give all three"),
        (("localhost", 2, 0), "'localhost' is not HOST:PORT"),
        (("localhost:", 2, 0), "is not HOST:PORT"),
        ((":9", 2, 0), "is not HOST:PORT"),
        (("localhost:70000", 2, 0), "is not HOST:PORT"),
        (("localhost:9", 2, 2), "--process_id 2 is not among --num_processes 2"),
        (("localhost:9", 2, -1), "--process_id -1 is not among"),
        (("localhost:9", 0, 0), "--process_id 0 is not among --num_processes 0"),
    ],
)
def test_flags_that_make_no_job_are_refused(monkeypatch, given, told):
    with pytest.raises(UserError, match=re.escape(told)):
        alone(monkeypatch, *given)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (open_mpi(1, 1), "process 1 of 2"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX"),
    ],
)
def test_processes_that_would_each_train_alone_are_refused(monkeypatch, environment, told):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{told}.*give --coordinator"):
        alone(monkeypatch, **environment)


def test_a_busy_port_is_told(monkeypatch):
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port}.*another port"):
            alone(monkeypatch, f"localhost:{port}", 2, 0)


def test_a_process_that_does_not_come_is_told_in_time():
    """Process 1 of a job without 0, and 0 of a job without 1."""
    ports = labs.free_port(), labs.free_port()
    began = time.monotonic()
    done = end(
        [
            begin(f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={process}")
            for process, port in enumerate(ports)
        ]
    )
    assert time.monotonic() - began < TIMEOUT_S + 15
    for port, word, (status, _, err) in zip(
        ports, ("not all came", "no answer"), done, strict=True
    ):
        (line,) = err.splitlines()
        assert status == 2 and word in line
        assert f"localhost:{port}" in line and f"{TIMEOUT_S} s" in line


# What happens to the others.


def test_sigterm_at_one_process_ends_both_after_the_same_step():
    processes = begin_two(num_steps=10_000)
    about = json.loads(processes[1].stdout.readline())
    os.kill(about["pid"], signal.SIGTERM)
    (status, out, err), (other_status, other_out, _) = end(processes)
    assert status == other_status == 42, err
    saved = out.splitlines()[-1]
    assert saved.startswith("saved at") and other_out.splitlines()[-1] == saved


def test_sigterm_at_a_lone_process_ends_it_after_its_step():
    process = begin(num_steps=10_000)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    ((status, out, err),) = end([process])
    assert status == 42 and out.startswith("saved at"), err


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        ("hangs", 1, "process 1 on .*: not past step 2 for"),
        ("dies", -signal.SIGKILL, "process 1 on .*: not a sign of life for"),
        ("mistaken", 2, "process 1 on .*: failed"),
        ("buggy", 1, "process 1 on .*: failed"),
    ],
)
def test_a_process_ends_in_time_and_names_the_one_that_failed(fault, status, told):
    began = time.monotonic()
    (other_status, _, err), (first_status, _, first_err) = end(begin_two(fault=fault))
    assert time.monotonic() - began < TIMEOUT_S + 15
    assert other_status == 1 and first_status == status
    (line,) = errors(err)
    assert re.search(told, line) and "process 0" not in line and "last checkpoint" in line
    if fault == "hangs":
        assert "in main" in first_err  # where it hangs
    if fault == "mistaken":
        assert errors(first_err) == ["error: a bad file"]


def test_a_process_that_says_it_takes_its_time_is_waited_for():
    done = end(begin_two(fault="busy"))
    assert [status for status, _, _ in done] == [0, 0], done


# What one process makes of the others' beats.


def heard(*beats: tuple[int, int, float], at: float = 100.0) -> peers._Heard:
    """(count, step, when it was new) of processes 0, 1, ..."""
    return peers._Heard(
        {
            process: (peers._Beat(count, step, f"host{process}"), since)
            for process, (count, step, since) in enumerate(beats)
        },
        at,
    )


@pytest.mark.parametrize(
    ("others", "here", "blamed"),
    [
        (heard((9, 5, 99), (9, 5, 98)), (5, 95.0), None),
        # A slow step of all, in which nobody is to be named but everybody.
        (heard((9, 5, 99), (9, 5, 98)), (5, 60.0), [0, 1]),
        (heard((9, 5, 99), (9, 4, 98), (9, 4, 99)), (5, 60.0), [1, 2]),
        # Whoever is silent comes before whoever is behind.
        (heard((9, 5, 99), (9, 5, 70), (9, 4, 99)), (5, 60.0), [1]),
        (heard((9, 5, 99), (9, 5, 60)), (5, 99.0), [1]),
        # Where no step is under way, only silence counts.
        (heard((9, -1, 99), (9, 3, 98)), None, None),
        (heard((9, -1, 99), (9, 3, 60)), None, [1]),
        # The end of one is not silence; its failure is.
        (heard((9, -1, 99), (0, -1, 1)), None, None),
        (heard((9, 5, 99), (-1, 5, 99)), (5, 99.0), [1]),
    ],
)
def test_whom_a_process_blames(others, here, blamed):
    verdict = peers._verdict(others, here, limit=30.0, now=100.0)
    assert (verdict and verdict[1]) == blamed
    for process in blamed or []:
        assert f"process {process} on host{process}" in verdict[0]
