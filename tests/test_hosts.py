"""One, two and four hosts, four devices in all: the same batches, draws and losses.

Hosts are processes on this machine that talk through gloo.
"""

import importlib
import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
labs = importlib.import_module("lab")

# Arguments: process, number of processes, port, first step. Prints what it saw as json.
PROGRAM = """
import json, pathlib, sys
from functools import partial
import jax
import jax.numpy as jnp
import numpy as np

process, num_processes, port, start = map(int, sys.argv[1:])
if num_processes > 1:
    jax.distributed.initialize(f"localhost:{port}", num_processes, process)
from jax.experimental import multihost_utils
from slam_jax.data import batches, image, pictures, shapes2d, text_inputs
from slam_jax.diffusion import parameterization, schedule, solver, subpath
from slam_jax.distill import gamma, loss, optimizer, state, step
from slam_jax.runtime import hosts, mesh

AXES = (("data", -1),)
devices = mesh.make(AXES)
everywhere = mesh.replicated(devices)
tokens = text_inputs.read(pathlib.Path("assets/tiny_sd/tokenizer"), None)
crop = image.Crop(32, random=True, flip=True)
found = pictures.Pictures(shapes2d.Shapes2D(32, 90, 0), (), crop, tokens)
dataset = batches.batches(found, num_examples=90, batch_size=16, seed=5, part=hosts.part())

def net(params, x, t, text, *gamma):
    return x * params["a"] + jnp.mean(text) + 1e-3 * sum(gamma)

nets = step.Nets(
    student=net, student_params=step.all_trained, teacher=net,
    encode_image=lambda params, batch, key: (
        batch["image"][:, ::4, ::4].astype(jnp.float32) / 255
        + 0.1 * jax.random.normal(key, (len(batch["image"]), 8, 8, 3))
    ),
    encode_text=lambda params, batch: batch["input_ids"][..., None].astype(jnp.float32) / 1e3,
)
scheduler = json.loads(pathlib.Path("assets/tiny_sd/scheduler/scheduler_config.json").read_text())
method = loss.Method(
    schedule.from_config(scheduler), parameterization.prediction_from_config(scheduler),
    solver.start_grid(50, 1000), 20, 20, 2.0,
    subpath.told_t(subpath.sigma_markov), loss.squared, gamma.uniform,
)
adamw = optimizer.adamw(1e-2, 0, 1.0, 0.0, 0.9, 0.999, 1e-8)
put = partial(mesh.put_batch, accumulate=2, mesh=devices)
params = {"a": np.float32(0.7)}
frozen = jax.device_put(
    state.Frozen(params, np.float32(0), np.float32(0), np.zeros((1, 77, 1), np.float32)), everywhere
)
now = jax.jit(partial(state.init, optimizer=adamw), out_shardings=everywhere)(params)
key = jax.jit(lambda: jax.random.key(0), out_shardings=everywhere)()
run = jax.jit(
    partial(
        step.train_step, nets=nets, method=method, optimizer=adamw, ema_rate=0.9, num_steps=9,
        max_grad_norm=1e9,
    ),
    out_shardings=everywhere,
)
everyone = partial(multihost_utils.process_allgather, tiled=True)
seen = {"losses": [], "images": [], "processes": jax.process_count(), "devices": len(jax.devices())}
for number in range(start, 4):
    batch = put(dataset[number].arrays)
    now, metrics = run(now, frozen, batch, key)
    seen["losses"].append(float(metrics["loss"]))
    whole = np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(batch["image"]))
    seen["images"].append(whole[..., ::8, ::8, 0].tolist())

# What one microbatch of that step draws, device by device.
x_0 = jax.jit(
    lambda: jnp.zeros((16, 8, 8, 3)),
    out_shardings=jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data")),
)()
draw = jax.jit(lambda key, x_0: loss.draw_subpath(key, x_0, method, 0.5), out_shardings=everywhere)
drawn = jax.tree.map(np.asarray, draw(key, x_0))
seen["draws"] = [drawn.index.tolist(), drawn.noise[:, 0, 0].tolist(), drawn.gamma.ravel().tolist()]
print(json.dumps(seen))
"""


def run(num_processes: int, start: int = 0) -> dict:
    """What process 0 saw."""
    seen = labs.run_on_hosts(PROGRAM, num_processes, str(start))
    assert seen[0]["devices"] == 4
    assert all(each["losses"] == seen[0]["losses"] for each in seen)
    return seen[0]


@pytest.fixture(scope="module")
def one_host():
    return run(1)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_any_number_of_hosts_trains_alike(one_host, num_hosts):
    several = run(num_hosts)
    np.testing.assert_array_equal(several["images"], one_host["images"])
    np.testing.assert_allclose(several["losses"], one_host["losses"], rtol=1e-6)
    for drawn, expected in zip(several["draws"], one_host["draws"], strict=True):
        np.testing.assert_array_equal(drawn, expected)


def test_no_two_examples_share_noise_or_gamma(one_host):
    """The released script seeds every rank alike (PEERS.md §6.1): each drew the same."""
    index, noise, gamma = map(np.array, one_host["draws"])
    assert len(np.unique(noise, axis=0)) == len(np.unique(gamma)) == 16
    # 16 of 50 times: no device repeats what another drew.
    assert len({tuple(part) for part in index.reshape(4, 4).tolist()}) == 4
