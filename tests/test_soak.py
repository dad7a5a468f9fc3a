"""Faults, many times over, in runs of two hosts; ends with a table. Minutes: make soak

What must come out is what came out of a run that nothing disturbed, bit for bit.
"""

import contextlib
import importlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import psutil
import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
labs = importlib.import_module("lab")

pytestmark = pytest.mark.soak
NUM_STEPS = 16
TIMEOUT_S = 12
FLAGS = (
    f"--config.num_steps={NUM_STEPS}", "--config.accumulate=1", "--config.distill.length=20",
    "--config.eval.every_steps=16", f"--config.faults.timeout_s={TIMEOUT_S}",
)  # fmt: skip


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    tried: int
    survived: int
    lost: list[int]  # steps that were made again, each time


@pytest.fixture(scope="module")
def table(pytestconfig) -> Iterator[list[Row]]:
    rows = []
    yield rows
    lines = [f"{'fault':46} {'tried':>5} {'survived':>8}   steps lost: mean, most"]
    for row in rows:
        lost = f"{np.mean(row.lost):.1f}, {max(row.lost)}"
        lines.append(f"{row.fault:46} {row.tried:>5} {row.survived:>8}   {lost}")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_folder):
    return labs.Lab(tmp_path_factory.mktemp("soak"), small_folder)


@pytest.fixture(scope="module")
def straight(lab):
    """The files and the last state of a run that nothing disturbed, and how long it took."""
    finish(lab, "straight")  # compiles
    (lab.folder / "straight").rename(lab.folder / "first")
    began = time.monotonic()
    workdir = finish(lab, "straight")
    return outcome(workdir), time.monotonic() - began


def start(lab, workdir: str, *flags: str) -> list[subprocess.Popen]:
    return lab.start_hosts(workdir, *FLAGS, *flags)


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    labs.end(processes)


def finish(lab, workdir: str) -> pathlib.Path:
    done = labs.end(start(lab, workdir))
    assert [status for status, *_ in done] == [0, 0], done
    return lab.folder / workdir


def outcome(workdir: pathlib.Path) -> dict[str, bytes]:
    """All that a run leaves behind, but for times and machines."""
    state = {name: leaf.tobytes() for name, leaf in labs.flat(labs.state(workdir, NUM_STEPS))}
    assert len(state) > 100
    files = labs.files(workdir / "student") | labs.files(workdir / "samples")
    return state | files | {"metrics": json.dumps(labs.numbers(workdir)).encode()}


def logged(workdir: pathlib.Path) -> int:
    """How many steps a run has made."""
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def saved(workdir: pathlib.Path) -> int:
    """The step that it can go on from."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def wait_for(processes: list[subprocess.Popen], happens) -> None:
    until = time.monotonic() + 100
    while not happens():
        assert time.monotonic() < until and all(p.poll() is None for p in processes)
        time.sleep(0.001)


def lost(workdir: pathlib.Path) -> int:
    return max(0, logged(workdir) - saved(workdir))


def test_killed_at_random_moments(lab, straight, table):
    """Both processes at once, as when the power fails; a run that ends is followed by another."""
    expected, seconds = straight
    rng, steps, runs = random.Random(0), [], [lab.folder / "killed0"]
    while len(steps) < 20:
        processes = start(lab, runs[-1].name)
        moment = time.monotonic() + rng.uniform(0.0, seconds)
        while time.monotonic() < moment and any(p.poll() is None for p in processes):
            time.sleep(0.01)
        if any(p.poll() is None for p in processes):
            kill(processes)
            steps.append(lost(runs[-1]))
        else:
            assert [status for status, *_ in labs.end(processes)] == [0, 0]
            runs.append(lab.folder / f"killed{len(runs)}")
    finish(lab, runs[-1].name)
    assert all(outcome(workdir) == expected for workdir in runs)
    table.append(Row("both processes killed at a random moment", len(steps), len(steps), steps))


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_killed(lab, straight, table, victim):
    workdir, steps = lab.folder / f"one{victim}", []
    for step in (5, 11):
        processes = start(lab, workdir.name)
        wait_for(processes, lambda step=step: logged(workdir) >= step)
        processes[victim].kill()
        began = time.monotonic()
        statuses = [status for status, *_ in labs.end(processes)]
        assert statuses[1 - victim] not in (0, 42)
        assert time.monotonic() - began < TIMEOUT_S + 3
        steps.append(lost(workdir))
    finish(lab, workdir.name)
    assert outcome(workdir) == straight[0]
    table.append(Row(f"process {victim} of two killed, the other ends in time", 2, 2, steps))


def test_told_to_end_during_a_save(lab, straight, table):
    workdir, steps = lab.folder / "told", []
    for step in (4, 8, 12):
        processes = start(lab, workdir.name)

        def saving(step=step):
            return list((workdir / "checkpoints").glob(f"{step}.*tmp*"))

        wait_for(processes, saving)
        processes[1].send_signal(signal.SIGTERM)
        done = labs.end(processes)
        assert [status for status, *_ in done] == [42, 42], done
        steps.append(lost(workdir))
        assert saved(workdir) >= step
    finish(lab, workdir.name)
    assert outcome(workdir) == straight[0]
    table.append(Row("SIGTERM during a save", 3, 3, steps))


def test_newest_checkpoint_damaged(lab, straight, table):
    workdir, steps, rng = lab.folder / "flipped", [], np.random.default_rng(0)
    for step in (4, 8, 12):
        processes = start(lab, workdir.name)
        wait_for(processes, lambda step=step: saved(workdir) >= step)
        kill(processes)
        before, newest = logged(workdir), workdir / "checkpoints" / str(saved(workdir))
        data = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        content = np.fromfile(data, np.uint8)
        content[rng.integers(content.size, size=3)] ^= 1
        content.tofile(data)
        processes = start(lab, workdir.name)
        aside = newest.with_name(f"{newest.name}.damaged")
        wait_for(processes, aside.exists)
        steps.append(max(0, before - saved(workdir)))
        kill(processes)
    finish(lab, workdir.name)
    assert outcome(workdir) == straight[0]
    table.append(Row("bytes of the newest checkpoint flipped", 3, 3, steps))


def test_data_stop_for_half_a_minute(lab, straight, table):
    """The process that reads for one of the hosts is stopped, as a disk that does not answer."""
    workdir = lab.folder / "waits"
    patient = ("--config.data.num_workers=1", "--config.faults.timeout_s=90")
    processes = start(lab, workdir.name, *patient)
    wait_for(processes, lambda: logged(workdir) >= 5)
    readers = psutil.Process(processes[1].pid).children()
    assert readers
    for reader in readers:
        reader.suspend()
    time.sleep(30)
    stood_at = logged(workdir)
    assert stood_at < NUM_STEPS
    for reader in readers:
        reader.resume()
    done = labs.end(processes)
    assert [status for status, *_ in done] == [0, 0], done
    assert outcome(workdir) == straight[0]
    table.append(Row("data of one host stop for 30 s", 1, 1, [0]))


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[None]:
    """A file system in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_disk_full_for_a_while(lab, straight, table):
    workdir = lab.folder / "full"
    with small_disk(workdir):
        processes = start(lab, workdir.name)
        wait_for(processes, lambda: saved(workdir) >= 4)
        filler = workdir / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        # What is left is enough for metrics, not for checkpoints.
        with open(filler, "r+b") as file:
            file.truncate(file.seek(0, 2) - 2**17)
        kept = saved(workdir)
        wait_for(processes, lambda: logged(workdir) >= kept + 4)
        assert saved(workdir) == kept
        filler.unlink()
        done = labs.end(processes)
        assert [status for status, *_ in done] == [0, 0], done
        assert "No space left on device" in done[0][2] and "training goes on" in done[0][2]
        assert outcome(workdir) == straight[0]
    table.append(Row("disk full for a while", 1, 1, [0]))
