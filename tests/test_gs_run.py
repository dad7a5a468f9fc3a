"""Runs whose folder is in a bucket, on a server of our own: killed, resumed, on two hosts, read.

They must come to the same as a run in a local folder.
"""

import importlib
import json
import pathlib
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
labs = importlib.import_module("lab")
BUCKET = "gs://bucket/runs/tiny"
FLAGS = (
    "--config.num_steps=6", "--config.accumulate=1", "--config.distill.length=20",
    "--config.eval.every_steps=4", "--config.eval.prompts=('a circle',)",
    "--config.eval.teacher_steps=1", "--config.eval.student_steps=1",
    "--config.faults.timeout_s=30",
)  # fmt: skip

# One of two hosts that have nothing in common but the bucket; each holds half of an array.
HOST = """
import sys
import jax, numpy as np
from slam_jax.runtime import bucket, checkpoint, hosts, mesh

coordinator, number = sys.argv[1], int(sys.argv[2])
hosts.start(coordinator, 2, number, timeout_s=60)
devices = mesh.make((("data", 1), ("fsdp", 2)))
whole = np.arange(8192, dtype=np.float32)
layout = mesh.shardings({"a": jax.ShapeDtypeStruct(whole.shape, whole.dtype)}, devices,
                        ((".*", "fsdp"),))["a"]
state = {"a": jax.make_array_from_callback(whole.shape, layout, lambda part: whole[part])}
with bucket.mirrored("gs://bucket/hosts") as where:
    hosts.check_shared(where.checkpoints.parent)
    assert checkpoint.latest(where.checkpoints) is None
    (where.local / f"from_{number}").write_text("")
    where.push()
    checkpoints = checkpoint.manager(where.checkpoints, 1, 0)
    with checkpoint.closing(checkpoints, print):
        for step in (1, 2):
            checkpoint.save_last(checkpoints, step, state)
            # Each sees what the first one has completed since it looked last.
            assert checkpoint.latest(where.checkpoints) == step, step
        found = checkpoint.restore(checkpoints, 2, state)["a"].addressable_shards[0]
    assert found.data.shape == (4096,) and (np.asarray(found.data) == whole[found.index]).all()
"""


@pytest.fixture(scope="module")
def lab(cloud, small_folder, tmp_path_factory):
    found = labs.Lab(tmp_path_factory.mktemp("lab"), small_folder)
    temporary = found.folder / "temporary"
    temporary.mkdir()
    found.environment |= {"TMPDIR": str(temporary)}
    return found


@pytest.fixture(scope="module")
def expected(lab):
    """The files of a run in a local folder."""
    status, _, err = lab.finish("local", ".", *FLAGS)
    assert status == 0, err
    return _here(lab.folder / "local")


def _here(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _there(name):
    """The same of a folder in the bucket."""
    storage = fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
    top = name.removeprefix("gs://")
    return {path.removeprefix(f"{top}/"): storage.cat(path) for path in storage.find(top)}


def _lines(files):
    """All that was logged, but for the speed."""
    lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def _names(files):
    return {name for name in files if not name.startswith(("checkpoints/", "events/"))}


def test_killed_and_resumed_it_is_bit_identical(lab, expected):
    killed = lab.start("", ".", *FLAGS, f"--workdir={BUCKET}")
    storage = fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
    final = "{}/checkpoints/{}/commit_success.txt"
    while killed.poll() is None and not storage.exists(final.format(BUCKET, 4)):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    _, err = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, err
    assert [line["step"] for line in _lines(_there(BUCKET))][:4] == [1, 2, 3, 4]
    # As if killed while it saved: without its last file a checkpoint does not count.
    for step in (4, 6):  # the run may have come to its end meanwhile
        if storage.exists(final.format(BUCKET, step)):
            storage.rm(final.format(BUCKET, step))

    status, out, err = lab.finish("", ".", *FLAGS, f"--workdir={BUCKET}/")
    assert status == 0, err
    assert f"the student is in {BUCKET}/student" in out and "warning" not in err
    found = _there(BUCKET)
    assert _lines(found) == _lines(expected) and len(_lines(found)) == 6
    assert len(found["revision.txt"].splitlines()) == 2
    assert _names(found) == _names(expected)
    same = [name for name in found if name.startswith(("student/", "samples/", "config.json"))]
    assert len(same) > 10 and all(found[name] == expected[name] for name in same)
    saved = {name.split("/")[1] for name in found if name.startswith("checkpoints/")}
    assert saved == {"4", "6"}


def test_hosts_that_share_no_disk_share_a_bucket(lab):
    coordinator = f"localhost:{labs.free_port()}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, coordinator, str(number)], env=lab.environment,
            stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    told = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "".join(told)
    found = _there("gs://bucket/hosts")
    assert {name for name in found if not name.startswith("checkpoints/")} == {"from_0", "from_1"}
    assert any("/ocdbt.process_1/" in name for name in found)


@pytest.mark.slow
def test_two_hosts_train_in_a_bucket(lab, expected):
    """As on one."""
    name = "gs://bucket/two"
    hosts = lab.start_hosts("", *FLAGS, f"--workdir={name}")
    told = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "".join(told)
    found = _there(name)
    assert _names(found) == _names(expected) | {"bad_samples.1.jsonl"}
    written_by = [f"checkpoints/6/default/ocdbt.process_{n}/manifest.ocdbt" for n in (0, 1)]
    assert set(written_by) <= found.keys()
    for ours, theirs in zip(_lines(found), _lines(expected), strict=True):
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-3)


def test_it_is_exported_and_drawn_from(lab, expected):
    commands = [
        ["slam_jax.export", "--dtype=float32", f"--workdir={BUCKET}", "--out=exported"],
        ["slam_jax.sample", "--steps=1", "--prompt=a circle", f"--model={BUCKET}/student",
         "--out=drawn.npy"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", *command], cwd=lab.folder, env=lab.environment, check=True
        )
    exported = _here(lab.folder / "exported")
    for name in exported.keys() - {"README.md"}:
        assert exported[name] == expected[f"student/{name}"], name
    assert len(exported) > 10 and np.load(lab.folder / "drawn.npy").shape == (1, 32, 32, 3)


def test_nothing_is_left_behind(lab):
    """But by the killed run."""
    assert len(list((lab.folder / "temporary").iterdir())) == 1
