"""The launchers, as far as a machine without a cluster can run them."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ["local.sh", "mpi.sh", "slurm.sbatch", "tpu_pod.sh"]

# Prints its part of the job; what goes wrong, if anything, is its only argument.
JOB = """
import json, pathlib, signal, sys, time
from slam_jax import command
from slam_jax.runtime import hosts
fault = sys.argv.pop(1) if not sys.argv[1].startswith("--") else ""
given = command.hosts_flags()

def main():
    hosts.start(*given(), timeout_s=30, saves_on_sigterm=True)
    process, num = hosts.part()
    print(json.dumps([process, num]), flush=True)
    once = pathlib.Path(f"preempted{process}")
    if fault == "preempted" and not once.exists():
        once.touch()
        sys.exit(42)
    if fault == "fails" and process == 1:
        hosts.leave(7)
    step = 0
    while fault in ("fails", "waits"):
        step += 1
        time.sleep(0.1)
        if hosts.preempted(step):
            sys.exit(42)

command.run(main, required=(), leave=hosts.leave)
"""

# Stands for mpirun, srun, scontrol or gcloud: notes its arguments, ends with the next of the
# statuses that the file NAME.statuses lists.
STUB = """#!/usr/bin/env bash
name=$(basename "$0")
printf '%s\\n' "$name" "$@" "" >> calls
read -r status < "$name.statuses" || status=0
sed -i 1d "$name.statuses" 2>/dev/null
exit "${status:-0}"
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    found = subprocess.run(
        [pathlib.Path(sys.executable).parent / "shellcheck", "--shell=bash", LAUNCH / script],
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_variable_is_explained(script):
    lines = (LAUNCH / script).read_text().splitlines()
    settings = [line for line in lines if re.match(r"[A-Z_]+=\$\{", line)]
    assert any(line.startswith("MODULE=${MODULE:-slam_jax.main}") for line in settings)
    for line in settings:
        assert " # " in line or ":?" in line, line


def begin(folder, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHON": sys.executable,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "MODULE": "job",
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", **environment,
    }  # fmt: skip
    return subprocess.Popen(
        [LAUNCH / script, *arguments], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments, **environment) -> tuple[int, str, str]:
    process = begin(*arguments, **environment)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.terminate()
    return process.returncode, out, err


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


def parts(out: str) -> list[list[int]]:
    # Processes write into each other's lines.
    return sorted([int(process), int(num)] for process, num in re.findall(r"\[(\d+), (\d+)\]", out))


def test_local_runs_every_process(job):
    status, out, err = run(job, "local.sh", "2")
    assert status == 0, err
    assert parts(out) == [[0, 2], [1, 2]]


def test_local_starts_again_after_42(job):
    status, out, err = run(job, "local.sh", "2", "preempted")
    assert status == 0, err
    assert parts(out) == [[0, 2], [0, 2], [1, 2], [1, 2]]


def test_local_ends_all_where_one_fails(job):
    began = time.monotonic()
    status, _, err = run(job, "local.sh", "2", "fails")
    assert status == 7, err
    assert time.monotonic() - began < 25


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_local_passes_on_what_ends_it(job, number, status):
    script = begin(job, "local.sh", "2", "waits")
    lines = [script.stdout.readline() for _ in range(2)]
    # Ctrl-C reaches all of a terminal's processes; here, as from kill, only the script.
    script.send_signal(number)
    out, err = script.communicate(timeout=200)
    assert script.returncode == status, (lines, err)
    assert parts("".join(lines) + out) == [[0, 2], [1, 2]]  # and not again


@pytest.mark.parametrize("arguments", [(), ("--config",), ("0",), ("two",)])
def test_local_wants_a_number(job, arguments):
    status, _, err = run(job, "local.sh", *arguments)
    assert status == 2 and err.startswith("usage: ")


# Those of clusters, with programs that stand for the cluster's.


@pytest.fixture
def stubs(job):
    """(folder, statuses that a program ends with, one call after the other) -> its calls."""
    (job / "bin").mkdir()
    for name in ("mpirun", "srun", "scontrol", "gcloud"):
        (job / "bin" / name).write_text(STUB)
        (job / "bin" / name).chmod(0o755)
        (job / f"{name}.statuses").touch()
    return job


def calls(folder) -> list[list[str]]:
    text = (folder / "calls").read_text()
    return [call.split("\n") for call in text.removesuffix("\n\n").split("\n\n")]


def test_mpi_starts_again_after_42(stubs):
    (stubs / "mpirun.statuses").write_text("42\n3\n")
    arguments = ("-n", "4", "--", "--workdir", "a b")
    status, _, err = run(stubs, "mpi.sh", *arguments, COORDINATOR="node1:8476")
    assert status == 3, err
    call = ["mpirun", "-n", "4", sys.executable, "-m", "job", "--coordinator=node1:8476"]
    assert calls(stubs) == [[*call, "--workdir", "a b"]] * 2


def test_mpi_needs_its_divider(stubs):
    status, _, err = run(stubs, "mpi.sh", "--config", "x")
    assert status == 2 and err.startswith("usage: ") and not (stubs / "calls").exists()


def test_tpu_pod_starts_again_after_42(stubs):
    (stubs / "gcloud.statuses").write_text("42\n0\n")
    status, _, err = run(
        stubs,
        "tpu_pod.sh",
        "--workdir",
        "gs://b/a b",
        TPU="pod",
        ZONE="z",
        PROJECT="p",
        PYTHON="py",
    )
    assert status == 0, err
    first, second = calls(stubs)
    assert first == second
    assert first[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=z", "--project=p", "--worker=all"} <= set(first)
    # What a shell on the hosts makes of it.
    command = first[-1].removeprefix("--command=").replace("exec ", "printf '%s\\n' ")
    (stubs / "slam_jax").mkdir()
    told = subprocess.run(["bash", "-c", command], cwd=stubs, capture_output=True, text=True)
    assert told.stdout.splitlines() == ["py", "-m", "job", "--workdir", "gs://b/a b"]


def test_tpu_pod_wants_a_slice(stubs):
    status, _, err = run(stubs, "tpu_pod.sh", ZONE="z", PROJECT="p")
    assert status != 0 and "TPU: the name of the slice" in err


@pytest.mark.parametrize(("ends", "requeues"), [(42, True), (0, False), (1, False)])
def test_slurm_requeues_after_42(stubs, ends, requeues):
    shutil.copy(LAUNCH / "slurm.sbatch", stubs / "bin" / "script")
    (stubs / "bin" / "script").chmod(0o755)
    (stubs / "srun.statuses").write_text(f"{ends}\n")
    status, _, err = run(stubs, stubs / "bin" / "script", "--workdir", "a b", SLURM_JOB_ID="4711")
    assert status == ends, err
    first, *rest = calls(stubs)
    assert first[0] == "srun"
    assert first[-5:] == [sys.executable, "-m", "job", "--workdir", "a b"]
    assert rest == ([["scontrol", "requeue", "4711"]] if requeues else [])


def test_slurm_header_is_read_by_sbatch():
    """sbatch reads options until the first command, one a line."""
    header = []
    for line in (LAUNCH / "slurm.sbatch").read_text().splitlines():
        if line and not line.startswith("#"):
            break
        header.append(line)
    options = [line for line in header if line.startswith("#SBATCH")]
    for line in options:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line), line
    names = dict(line.split()[1].removeprefix("--").partition("=")[::2] for line in options)
    assert (LAUNCH / "slurm.sbatch").read_text().count("#SBATCH --") == len(names) == len(options)
    # One task per GPU, as jax.distributed gives them out; a warning before the end; a way back.
    assert names["ntasks-per-node"] == names["gpus-per-node"]
    assert re.fullmatch(r"TERM@\d+", names["signal"])
    assert names["requeue"] == "" and re.fullmatch(r"[\d:-]+", names["time"])


def only(items: list) -> dict:
    (item,) = items
    return item


def test_jobset_has_what_its_controller_needs():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # Pods are called NAME-JOB-INDEX-INDEX-xxxxx; the whole has to be a DNS label.
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", jobset["metadata"]["name"])
    assert jobset["spec"].keys() <= {"network", "failurePolicy", "successPolicy", "replicatedJobs"}
    replicated = only(jobset["spec"]["replicatedJobs"])
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = only(pod["containers"])
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    # Kubernetes takes a podFailurePolicy only with these.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert container["name"] and container["image"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(shape[0]) * int(shape[1]) == chips * job["completions"]
    told = {name for arg in container["args"] for name in re.findall(r"\$\((\w+)\)", arg)}
    assert told <= {variable["name"] for variable in container["env"]}
    assert container["command"] == ["python", "-m", "slam_jax.main"]
    assert (ROOT / container["args"][0].removeprefix("--config=")).exists()


def test_jobset_restarts_after_42_and_a_lost_node_only():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    replicated = only(spec["replicatedJobs"])
    job = replicated["template"]["spec"]
    by_status, by_node = job["podFailurePolicy"]["rules"]
    assert by_status["action"] == by_node["action"] == "FailJob"
    name = only(job["template"]["spec"]["containers"])["name"]
    assert by_status["onExitCodes"] == {"containerName": name, "operator": "In", "values": [42]}
    assert only(by_node["onPodConditions"]) == {"type": "DisruptionTarget", "status": "True"}
    rule = only(spec["failurePolicy"]["rules"])
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] == 0


def test_jobset_addresses_the_first_pod_where_there_are_no_tpus():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    name, job = jobset["metadata"]["name"], only(jobset["spec"]["replicatedJobs"])
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:8476" in text
    assert f"--num_processes={job['template']['spec']['completions']}\n" in text
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
