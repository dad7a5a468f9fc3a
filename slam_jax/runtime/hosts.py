"""Which of the hosts this process is, how they find each other, and when all are to stop.

A host is a process: a machine may run several.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import jax
from etils import epath
from jax._src import clusters
from jax.experimental import multihost_utils

from slam_jax.errors import UserError
from slam_jax.runtime import peers

# Rank, size and rank within the machine as launchers give them to every process they start:
# Open MPI; MPICH, Intel MPI and Cray; SLURM.
_RANKS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
# Variables that say that there are others, but not how many.
_UNCOUNTED = ("PMIX_RANK", "JOB_COMPLETION_INDEX")
_MAX_END_S = 24 * 3600  # the first host evaluates while the others are done

_terminated = threading.Event()


class _Job(NamedTuple):
    coordinator: str  # HOST:PORT, where process 0 listens
    num_processes: int
    process_id: int
    local_devices: list[int] | None  # which of the machine's GPUs; None for all of them


class _Rank(NamedTuple):
    process_id: int
    num_processes: int
    local: int | None  # among the processes of the machine


def part() -> tuple[int, int]:
    """(index of this process, how many there are)."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes for all."""
    return jax.process_index() == 0


def start(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout_s: int,
    saves_on_sigterm: bool = False,
) -> None:
    """Joins the job's other processes, if there are any; called before any device is touched.

    The three values win if given; else the launcher's environment tells: SLURM, Open MPI, what
    else mpi4py finds, Kubernetes and Cloud TPU, as `jax.distributed` recognizes them. With none
    of it the process is alone. `coordinator` may be given alone where the launcher tells the rest.

    timeout_s: the processes wait so long for each other; later, one that died or hangs ends the
    job that late (`peers`). saves_on_sigterm: SIGTERM no longer ends the process, `preempted`
    tells of it. UserError: half-given or impossible values, or some process does not come.
    """
    if saves_on_sigterm:
        signal.signal(signal.SIGTERM, _note_sigterm)
    with _at_most(timeout_s, f"the launcher's environment gave no answer for {timeout_s} s"):
        job = _given(coordinator, num_processes, process_id) or _detected(timeout_s)
    if job is None or job.num_processes == 1:
        return
    if job.process_id == 0:
        _check_port(job.coordinator)
    # Otherwise JAX takes SIGTERM from every process, whether it asks for it or not.
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    with _at_most(timeout_s, _nobody_came(job, timeout_s)):
        jax.distributed.initialize(
            job.coordinator, job.num_processes, job.process_id, job.local_devices,
            cluster_detection_method="deactivate",
            # Where JAX's own wait ends first, the process aborts without a word about the address.
            initialization_timeout=timeout_s + 60,
            # After `peers`, which says more, but even where no Python runs. Twice, since JAX's
            # heart beats twice in that time: of a dead process the last beat may be so old.
            heartbeat_timeout_seconds=2 * (timeout_s + 10), shutdown_timeout_seconds=_MAX_END_S,
        )  # fmt: skip
    peers.start(job.process_id, timeout_s)


def check_shared(folder: epath.PathLike) -> None:
    """UserError if this process does not see what the first one writes there; all must call it."""
    if not peers.known():
        return
    name = peers.agreed("shared_folder", lambda: f".shared-{uuid.uuid4().hex}")
    shared = epath.Path(folder) / name
    if is_first():
        shared.touch()
    peers.wait_for_all("written")
    missing = not shared.exists()
    peers.wait_for_all("seen")
    if is_first():
        shared.unlink()
    if missing:
        raise UserError(
            f"{folder} on {socket.gethostname()} is not the first host's folder of that name; "
            "give one on a disk that all hosts share"
        )


def wait(until: str) -> None:
    """Returns when all hosts have called it with that word, once each."""
    if peers.known():
        peers.wait_for_all(until)


def leave(status: int) -> None:
    """Ends a process that failed. Without it, JAX waits at the end until all others end too."""
    if peers.known():
        peers.leave(status)


def preempted(step: int) -> bool:
    """Whether all processes are to save after `step` and end, since one of them got SIGTERM.

    Every process asks at every step; costs about 2 μs, and no step of any waits for it: all hear
    of it at the same later step.
    """
    if peers.known():
        return multihost_utils.reached_preemption_sync_point(step)
    return _terminated.is_set()


def _note_sigterm(_number, _frame) -> None:
    _terminated.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever sends it again means it


def _given(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> _Job | None:
    """The job as the user describes it; None if the user leaves it to the launcher."""
    if coordinator is None and num_processes is None and process_id is None:
        return None
    local = None
    if num_processes is None and process_id is None and (rank := _rank()):
        process_id, num_processes, local = rank
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            f"--coordinator {coordinator}, --num_processes {num_processes}, --process_id "
            f"{process_id}: give all three, or none of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT, such as node1:8476")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id {process_id} is not among --num_processes {num_processes}, "
            "which are counted from 0"
        )
    return _Job(coordinator, num_processes, process_id, None if local is None else [local])


def _detected(timeout_s: int) -> _Job | None:
    """What jax.distributed finds; None if this process is alone."""
    rank = _rank()
    if rank and rank.num_processes == 1:
        return None  # or JAX would leave it one GPU of several
    told = [name for name in _UNCOUNTED if name in os.environ]
    if not (rank or told) and _in_lone_pod():
        return None
    job = _ask_jax(None, timeout_s)
    if job is None and (rank or told):
        if "JOB_COMPLETION_INDEX" not in told and importlib.util.find_spec("mpi4py"):
            return _ask_jax("mpi4py", timeout_s)
        name = told[0] if told else f"process {rank.process_id} of {rank.num_processes}"
        raise UserError(
            f"the environment ({name}) tells of other processes, but not where they are; give "
            "--coordinator, --num_processes and --process_id, or install the package mpi4py "
            "(under MPI) or kubernetes (under Kubernetes)"
        )
    return job


def _in_lone_pod() -> bool:
    """JAX takes every pod for one of a job's, and fails or warns where it is none."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    return in_pod and "TPU_WORKER_HOSTNAMES" not in os.environ


def _ask_jax(method: str | None, timeout_s: int) -> _Job | None:
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, method, timeout_s
        )
    except RuntimeError as error:
        raise UserError(" ".join(str(error).split())) from None
    return _Job(*found) if found[1] is not None else None


def _rank() -> _Rank | None:
    """What the launcher tells every process; None without a launcher."""
    for rank, size, local in _RANKS:
        if rank in os.environ and size in os.environ:
            here = os.environ.get(local)
            return _Rank(
                int(os.environ[rank]), int(os.environ[size]), None if here is None else int(here)
            )
    return None


def _check_port(coordinator: str) -> None:
    """JAX crashes where it cannot listen."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at port {port} ({error.strerror}); "
                "give a --coordinator with another port"
            ) from None


def _nobody_came(job: _Job, timeout_s: int) -> str:
    if job.process_id == 0:
        return (
            f"of {job.num_processes} processes not all came to {job.coordinator} within "
            f"{timeout_s} s: some were not started, failed before, or do not reach this machine "
            "under that name and port"
        )
    return (
        f"process {job.process_id} got no answer from {job.coordinator} within {timeout_s} s: "
        f"process 0 does not run there, one of the {job.num_processes} processes is missing, or "
        "a firewall or a wrong name or port is in between"
    )


@contextlib.contextmanager
def _at_most(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with the message: no Python error ends a wait inside of JAX."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
