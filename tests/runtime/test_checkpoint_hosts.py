"""Checkpoints on several hosts, real processes that talk through gloo: what one of them saved any
other number restores, on another mesh too; damage and failures are seen alike by all."""

import importlib
import json
import pathlib
import shutil
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
labs = importlib.import_module("lab")

# Arguments: process, number of processes, port, then the job: a json list of [what, ...]. Prints
# what it saw as json. The net is a matrix product, so its gradient is summed over the batch.
PROGRAM = """
import json, pathlib, resource, shutil, sys
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

logging.set_verbosity(logging.FATAL)
process, num_processes, port = map(int, sys.argv[1:4])
from slam_jax.runtime import checkpoint, hosts, mesh
from slam_jax.errors import UserError
if num_processes > 1:
    hosts.start(f"localhost:{port}", num_processes, process, timeout_s=60)

RULES = {"dp": ((".*", ()),), "fsdp": ((".*(x|h)", "fsdp"), (".*", ()))}
AXES = {"dp": (("data", -1),), "fsdp": (("data", 1), ("fsdp", -1))}

def first():
    key = jax.random.key(0)
    x, h = jax.random.normal(key, (64, 128)) / 8, jax.random.normal(key, (128, 64)) / 8
    params = {"x": x, "h": h}
    return {"params": params, "moments": jax.tree.map(jnp.zeros_like, params), "step": jnp.int32(0)}

def train_step(state, batch):
    def loss(params):
        return jnp.mean((jnp.tanh(batch @ params["x"]) @ params["h"] - batch) ** 2)
    value, grads = jax.value_and_grad(loss)(state["params"])
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, state["moments"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], moments)
    return {"params": params, "moments": moments, "step": state["step"] + 1}, value

class Lab:
    def __init__(self, layout):
        self.devices = mesh.make(AXES[layout])
        bare = jax.eval_shape(first)
        self.like = mesh.placed(bare, self.devices, RULES[layout])
        self.layout = jax.tree.map(lambda leaf: leaf.sharding, self.like)
        out = (self.layout, mesh.replicated(self.devices))
        self.step = jax.jit(train_step, out_shardings=out)

    def batch(self, number):
        whole = np.random.default_rng(number).standard_normal((16, 64)).astype(np.float32)
        index, count = hosts.part()
        rows = len(whole) // count
        mine = whole[index * rows : (index + 1) * rows]
        return mesh.put_batch({"x": mine}, 1, self.devices)["x"][0]

said, seen = [], []
for what, *arguments in json.loads(sys.argv[4]):
    if what == "train":
        layout, folder, until = arguments
        lab = Lab(layout)
        done = checkpoint.newest(folder, said.append) or 0
        checkpoints = checkpoint.manager(folder, keep=9, keep_every=0)
        now = (
            checkpoint.restore(checkpoints, done, lab.like) if done
            else jax.jit(first, out_shardings=lab.layout)()
        )
        losses = []
        with checkpoint.closing(checkpoints, said.append):
            for number in range(done + 1, until + 1):
                now, loss = lab.step(now, lab.batch(number))
                losses.append(float(loss))
                checkpoint.save(checkpoints, number, now, said.append)
        seen.append([done, losses])
    elif what == "none left":
        try:
            checkpoint.newest(arguments[0], said.append)
        except UserError as error:
            seen.append(str(error))
    else:
        # Only one process cannot write, or only the first cannot finish what all have written.
        folder, which = arguments
        lab = Lab("fsdp")
        now = jax.jit(first, out_shardings=lab.layout)()
        checkpoints = checkpoint.manager(folder, keep=9, keep_every=0)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with checkpoint.closing(checkpoints, said.append):
            checkpoint.save_last(checkpoints, 1, now)
            if which == process:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            write = checkpoint.checksums.write
            if which == "finish":
                def fail(step, item):
                    raise OSError("No space left on device")
                checkpoint.checksums.write = fail
            try:
                checkpoint.save_last(checkpoints, 2, now)
            except UserError as error:
                seen.append(str(error))
            checkpoint.checksums.write = write
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            checkpoint.save_last(checkpoints, 3, now)
            seen.append(checkpoint.back(checkpoints, said.append))
print(json.dumps({"said": said, "seen": seen, "processes": jax.process_count()}), flush=True)
"""


def run(num_processes: int, *jobs: tuple, num_devices: int = 4) -> list[dict]:
    """What each process saw."""
    work = json.dumps(jobs, default=str)
    return labs.run_on_hosts(PROGRAM, num_processes, work, num_devices=num_devices, seconds=100)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with steps 1 and 2 as one, and as four hosts saved them; and the third loss."""
    folder = tmp_path_factory.mktemp("saved")
    jobs = [("train", layout, folder / f"1_{layout}", 2) for layout in ("dp", "fsdp")]
    jobs += [("train", layout, folder / f"straight_{layout}", 3) for layout in ("dp", "fsdp")]
    (one,) = run(1, *jobs)
    run(4, ("train", "fsdp", folder / "4_fsdp", 2), ("train", "dp", folder / "4_dp", 2))
    return folder, {layout: one["seen"][2 + i][1][2] for i, layout in enumerate(("dp", "fsdp"))}


def _copied(saved: pathlib.Path, folder: pathlib.Path, *names: str) -> list[pathlib.Path]:
    return [pathlib.Path(shutil.copytree(saved / name, folder / name)) for name in names]


def test_any_number_of_hosts_goes_on_from_what_another_saved(saved, tmp_path):
    """1 -> 4, 4 -> 2, 4 -> 1; dp and fsdp to themselves and to each other."""
    folder, third = saved
    for hosts, before in ((4, "1"), (2, "4"), (1, "4")):
        jobs, expected = [], []
        for old in ("dp", "fsdp"):
            for new in ("dp", "fsdp"):
                (copy,) = _copied(folder, tmp_path / f"{hosts}_{new}", f"{before}_{old}")
                jobs.append(("train", new, copy, 3))
                expected.append(third[new])
        for each in run(hosts, *jobs):
            assert each["said"] == [] and [done for done, _ in each["seen"]] == [2] * 4
            losses = [loss for _, (loss,) in each["seen"]]
            assert losses == pytest.approx(expected, rel=1e-6, abs=0)


def test_another_layout_and_number_of_devices_restores_the_same_bits(saved, tmp_path):
    """In one process the order of the sums is the same, and so is the loss, to the last bit."""
    folder, third = saved
    (dp, fsdp, alone) = (
        _copied(folder, tmp_path / new, f"1_{old}")[0]
        for new, old in (("to_fsdp", "dp"), ("to_dp", "fsdp"), ("alone", "fsdp"))
    )
    (one,) = run(1, ("train", "fsdp", dp, 3), ("train", "dp", fsdp, 3))
    assert [losses for _, losses in one["seen"]] == [[third["fsdp"]], [third["dp"]]]
    # On one device the batch is summed in another order.
    (single,) = run(1, ("train", "dp", alone, 3), num_devices=1)
    assert single["seen"][0][1] == pytest.approx([third["dp"]], rel=1e-6, abs=0)


def test_all_hosts_fall_back_alike(saved, tmp_path):
    folder, _ = saved
    damaged, lost = _copied(folder, tmp_path, "4_fsdp", "4_dp")
    _flip_largest(damaged / "2")
    for step in ("1", "2"):
        _flip_largest(lost / step)
    first, second = run(2, ("train", "fsdp", damaged, 2), ("none left", lost))
    assert [each["seen"][0][0] for each in (first, second)] == [1, 1]
    assert first["seen"] == second["seen"] and "nothing was deleted" in first["seen"][1]
    # The first host alone tells the user.
    assert [line.split()[4] for line in first["said"]] == ["2", "2", "1"] and not second["said"]
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "2.damaged"]


def _flip_largest(step: pathlib.Path) -> None:
    files = [path for path in step.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", [1, "finish"])
def test_where_one_host_cannot_write_all_give_up_that_save_alone(tmp_path, which):
    """Without slam_jax/runtime/votes.py the other waits for it for 20 minutes."""
    folder = tmp_path / "checkpoints"
    for each in run(2, ("fail", folder, which)):
        problem, back = each["seen"]
        assert problem.startswith(f"no checkpoint of step 2 in {folder}: ") and back == 3
        assert each["said"] == []
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]
