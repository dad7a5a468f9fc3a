"""The laws of weak scaling, on a small network and 2, 4 and 8 devices, and what says they hold."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Prints, for each layout, (devices, arrays, sent, kinds), the gradient's error, and the verdict.
PROGRAM = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import scaling
from slam_jax.runtime import collectives, hlo, mesh

def loss(params, x, devices, rules):
    whole, x = mesh.fetched(params, "student", devices, rules), mesh.spread(x, devices)
    return jnp.mean(jnp.square(jnp.tanh(x @ whole["a"]) @ whole["b"]))

params = {"a": np.eye(64, 128, dtype=np.float32), "b": np.eye(128, 64, dtype=np.float32)}
for name in ("dp", "fsdp"):
    layout = scaling.LAYOUTS[name]
    rows, errors = [], []
    for n in (2, 4, 8):
        devices = mesh.make(layout.axes, jax.devices()[:n])
        placed = jax.device_put(params, mesh.shardings(params, devices, layout.rules))
        x = np.sin(np.arange(4 * n * 64, dtype=np.float32)).reshape(4 * n, 64)
        spread = jax.device_put(x, jax.sharding.NamedSharding(
            devices, jax.sharding.PartitionSpec(devices.axis_names)))
        grad = jax.grad(lambda p, x: loss(p, x, devices, layout.rules))
        compiled = jax.jit(grad, out_shardings=mesh.shardings(params, devices, layout.rules)).lower(
            placed, spread).compile()
        found = collectives.count(hlo.parse(compiled.as_text()), n)
        one = jax.grad(lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["a"]) @ p["b"])))(params)
        far = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
        errors += jax.tree.leaves(jax.tree.map(far, compiled(placed, spread), one))
        rows.append(scaling.Row(
            name, n, "cpu", sum(each.payload for each in found),
            sum(each.sent for each in found), 0, 0.0,
            {each.kind: each.payload for each in found}))
    print(json.dumps([[[row.devices, row.arrays, row.sent, row.collectives] for row in rows],
                      max(errors), scaling.verdict(rows)]))
grown = [row._replace(sent=row.sent * (1 + 0.05 * row.devices)) for row in rows]
print(json.dumps(scaling.verdict(grown)))
print(json.dumps(scaling.verdict([row._replace(layout="dp", arrays=row.devices) for row in rows])))
wide = [rows[0]._replace(layout="fsdp_16", devices=n, arrays=8.0 * (n > 16)) for n in (16, 64, 256)]
print(json.dumps([scaling.verdict(wide), scaling.verdict(wide[:1])]))
from slam_jax.diffusion import guidance, parameterization, schedule
levels = schedule.from_config(json.load(open("assets/tiny_sd/scheduler/scheduler_config.json")))
devices = mesh.make((("data", -1),))
text, x = np.ones((16, 5, 3), np.float32), np.ones((16, 4, 4, 3), np.float32)
def guided(x, t, text, null):
    x, t, text = mesh.spread((x, t, text), devices)
    net = lambda x, t, text: mesh.spread(x * jnp.mean(text, axis=1)[:, None, None], devices)
    return guidance.guided(net, x, t, text, null, 2.0, levels, parameterization.EPSILON)
spread = jax.device_put((x, np.ones(16, np.int32), text), mesh.rows_sharding(devices))
compiled = jax.jit(guided).lower(*spread, text[:1]).compile()
print(json.dumps([each.kind for each in collectives.count(hlo.parse(compiled.as_text()), 8)]))
"""


@pytest.fixture(scope="module")
def printed():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


NUM_BYTES = 4 * 2 * 64 * 128


def test_dp_sums_the_gradients_whatever_the_number_of_devices(printed):
    rows, error, verdict = printed[0]
    assert [row[:2] for row in rows] == [[n, NUM_BYTES] for n in (2, 4, 8)] and error < 1e-5
    assert verdict == "dp: arrays per device stay constant: holds"


def test_fsdp_fetches_the_layers_and_moves_no_activations(printed):
    rows, error, verdict = printed[1]
    assert error < 1e-5 and verdict.endswith("(n - 1) / n: holds")
    for n, _, sent, kinds in rows:
        # Once in all to compute with; and of the gradients' sum.
        assert kinds["all-gather"] == NUM_BYTES
        summed = {"all-reduce": 2, "reduce-scatter": 1}
        parts = sum(factor * kinds.get(kind, 0) for kind, factor in summed.items())
        assert NUM_BYTES <= parts <= 2 * NUM_BYTES
        assert sent == (NUM_BYTES + parts) * (n - 1) / n


def test_what_grows_is_told(printed):
    assert all(verdict.endswith("DOES NOT HOLD") for verdict in printed[2:4])


def test_copies_of_a_cut_state_are_judged_where_there_are_several(printed):
    several, one = printed[-2]
    assert several == "fsdp_16: arrays per device stay constant: holds"
    assert one == "fsdp_16: its law is about more than 16 devices"


def test_guidance_moves_nothing_between_devices(printed):
    assert printed[-1] == []
