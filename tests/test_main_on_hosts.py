"""The whole program on two hosts, which are processes on this machine with a device each.

A run of one process with both devices is what they are compared with.
"""

import importlib
import io
import json
import pathlib
import re
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(pathlib.Path(__file__).parent))
labs = importlib.import_module("lab")
TIMEOUT_S = 15
PNG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(PNG, "PNG")
FLAGS = (f"--config.faults.timeout_s={TIMEOUT_S}",)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_folder):
    return labs.Lab(tmp_path_factory.mktemp("lab"), small_folder)


def finish(lab, workdir: str, *flags: str) -> pathlib.Path:
    """The work folder of a job of two that came to its end."""
    done = labs.end(lab.start_hosts(workdir, *FLAGS, *flags))
    assert [status for status, *_ in done] == [0, 0], done
    return lab.folder / workdir


@pytest.fixture(scope="module")
def two_hosts(lab):
    return finish(lab, "two")


@pytest.fixture(scope="module")
def one_host(lab):
    status, _, err = lab.finish("one", ".", *FLAGS, JAX_NUM_CPU_DEVICES="2")
    assert status == 0, err
    return lab.folder / "one"


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
    path = workdir / "metrics.jsonl"
    until = time.monotonic() + 120
    while not path.exists() or len(path.read_bytes().splitlines()) < step:
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_same_run(found: pathlib.Path, expected: pathlib.Path, rtol: float) -> None:
    """Metrics and the last state, as far as the order of sums allows."""
    ours, theirs = labs.numbers(found), labs.numbers(expected)
    assert [line["step"] for line in ours] == list(range(1, labs.NUM_STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=rtol)
    states = [dict(labs.flat(labs.state(workdir))) for workdir in (found, expected)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    for name in states[0]:
        a, b = states[0][name], states[1][name]
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=name)


def test_two_hosts_train_as_one_does(two_hosts, one_host):
    # AdamW divides by the root of second moments near zero, which magnifies rounding.
    assert_same_run(two_hosts, one_host, 1e-3)
    first = [labs.numbers(workdir)[0] for workdir in (two_hosts, one_host)]
    np.testing.assert_allclose(first[0]["loss"], first[1]["loss"], rtol=1e-6)


def test_the_first_host_writes_what_all_know(two_hosts, one_host):
    """Each file once, and the same ones; only bad samples are listed by each host for itself."""

    def names(workdir):
        found = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
        return {
            name for name in found if not name.startswith(("checkpoints", "events"))
        }  # fmt: skip

    assert names(two_hosts) == names(one_host) | {"bad_samples.1.jsonl"}
    assert len((two_hosts / "revision.txt").read_text().splitlines()) == 1
    assert len(list((two_hosts / "events").iterdir())) == 1
    assert labs.saved(two_hosts) == labs.saved(one_host)


def test_sigterm_to_one_saves_all_and_another_number_of_hosts_goes_on(lab, one_host):
    processes = lab.start_hosts("told", *FLAGS)
    workdir = lab.folder / "told"
    wait_for_step(workdir, 3)
    processes[1].send_signal(signal.SIGTERM)
    done = labs.end(processes)
    assert [status for status, *_ in done] == [42, 42], done
    (step,) = re.findall(r"told to end: saved after step (\d+)", done[0][2])
    assert int(step) in labs.saved(workdir)
    assert [line["step"] for line in labs.lines(workdir)] == list(range(1, int(step) + 1))

    status, _, err = lab.finish("told", ".", *FLAGS, JAX_NUM_CPU_DEVICES="2")
    assert status == 0, err
    assert_same_run(workdir, one_host, 1e-3)


def test_ctrl_c_reaches_all_of_a_terminal_and_the_run_goes_on(lab, two_hosts):
    processes = lab.start_hosts("ctrl_c", *FLAGS)
    workdir = lab.folder / "ctrl_c"
    wait_for_step(workdir, 3)
    for process in processes:
        process.send_signal(signal.SIGINT)
    done = labs.end(processes)
    assert [status for status, *_ in done] == [130, 130], done
    for _, _, err in done:
        (step,) = re.findall(r"\ninterrupted: saved after step (\d+); the same command goes", err)
        assert "Traceback" not in err and int(step) in labs.saved(workdir)
    assert labs.numbers(finish(lab, "ctrl_c")) == labs.numbers(two_hosts)


def test_a_killed_host_ends_the_other_and_the_run_goes_on_bit_for_bit(lab, two_hosts):
    processes = lab.start_hosts("killed", *FLAGS)
    wait_for_step(lab.folder / "killed", 5)
    processes[1].kill()
    began = time.monotonic()
    (status, _, err), _ = labs.end(processes)
    assert time.monotonic() - began < TIMEOUT_S + 5
    assert status in (1, -signal.SIGABRT) and "process 1 on" in err, err

    workdir = finish(lab, "killed")
    assert labs.numbers(workdir) == labs.numbers(two_hosts)
    expected, found = (dict(labs.flat(labs.state(each))) for each in (two_hosts, workdir))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert labs.files(workdir / "student") == labs.files(two_hosts / "student")
    assert labs.files(workdir / "samples") == labs.files(two_hosts / "samples")


def test_hosts_without_a_folder_in_common_are_told(lab):
    job = lab.start_hosts("mine", *FLAGS)
    job[1].kill()
    job[1].communicate()
    port = re.search(r"localhost:(\d+)", " ".join(job[1].args))[0]
    other = lab.start(
        "yours", ".", *FLAGS, f"--coordinator={port}", "--num_processes=2", "--process_id=1"
    )
    (first_status, *_), (status, _, err) = labs.end([job[0], other])
    assert (first_status, status) == (1, 2)
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "is not the first host's folder" in line and "disk that all hosts share" in line


def test_bad_samples_of_all_hosts_count_together(lab, tmp_path):
    """Each host alone sees too few to stop; both end at the same step, with a checkpoint."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(16):
        # Not a picture; every second one is.
        content = b"no picture" if number % 2 else PNG.getvalue()
        (folder / f"{number:02d}.png").write_bytes(content)
        (folder / f"{number:02d}.txt").write_text("a")
    done = labs.end(
        lab.start_hosts(
            "bad", *FLAGS, f"--config.data.source={folder}", "--config.data.max_bad_fraction=0.003",
        )
    )  # fmt: skip
    assert [status for status, *_ in done] == [2, 2], done
    told = [re.search(r"error: (\d+) of (\d+) samples cannot", err).groups() for *_, err in done]
    assert told[0] == told[1]
    # 3 of the first 1,000 may be bad, 8 by chance: no more than 8 on either host.
    listed = [
        (lab.folder / "bad" / name).read_text().splitlines()
        for name in ("bad_samples.jsonl", "bad_samples.1.jsonl")
    ]
    step = max(labs.saved(lab.folder / "bad"))
    seen = [sum(json.loads(line)["step"] <= step for line in lines) for lines in listed]
    assert sum(seen) == int(told[0][0]) and all(0 < each <= 8 for each in seen)
