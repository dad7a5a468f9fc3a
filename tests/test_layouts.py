"""However the state lies on eight devices, loss and gradient are those of one device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Arguments: a model folder. Prints, for each layout, the largest errors relative to one device.
PROGRAM = """
import importlib.util, json, pathlib, sys
import jax
import numpy as np
import optax
from slam_jax import experiment, pipeline, program, settings
from slam_jax.data import text_inputs
from slam_jax.distill import state
from slam_jax.runtime import mesh
from slam_jax.weights import pretrained, translate

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_default_matmul_precision", "highest")
# The networks here are small.
mesh._SMALL = 1

spec = importlib.util.spec_from_file_location("tiny", "configs/tiny.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
config = module.get_config()
config.update_from_flattened_dict({
    "teacher.model": sys.argv[1], "batch_size": 16, "student.gamma_dim": 8, "distill.length": 20,
    "distill.stride": 20, "student.cond_proj": "random", "distill.sigma": "markov",
    "distill.gamma": ("uniform",), "faults.max_grad_norm": 1e9,
})
chosen = settings.from_config(config.to_dict())
found = experiment.teacher(chosen)
tokens = text_inputs.read(found.tokenizer, found.tokenizer_2)
dataset = experiment.dataset(chosen, experiment.examples(chosen, found, tokens), (0, 1))
batch = dataset[0].arrays
student = experiment.student(chosen, found.unet)
student_params = translate.load(student.params, dtype=np.float32)
sgd = optax.sgd(1.0)

def run(devices, rules):
    everywhere = mesh.replicated(devices)
    teacher = pretrained.load(found, place=mesh.placer(devices, rules))
    empty = tokens.encode([""], (32, 32))
    text_encoder = pipeline.text_params(teacher)
    null_text = jax.jit(pipeline.encode_null_text(teacher, np.float32), out_shardings=everywhere)(
        text_encoder, empty
    )
    frozen = state.Frozen(teacher.unet.params, teacher.vae.params, text_encoder, null_text)
    settings_here = chosen._replace(mesh=chosen.mesh._replace(rules=rules))
    parts = program.parts(settings_here, found)._replace(optimizer=sgd)
    built = program.build(settings_here, parts, devices)
    now = jax.jit(built.first, out_shardings=built.layout)(student_params)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=everywhere)()
    put = mesh.put_batch(batch, 1, devices)
    after, metrics = built.step(now, frozen, put, key)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(after))
    after = jax.tree.map(np.asarray, after.student)
    gradient = jax.tree.map(np.subtract, student_params, after)
    shards = len(put["image"].sharding.device_set), put["image"].addressable_shards[0].data.shape[1]
    return float(metrics["loss"]), jax.tree.leaves(gradient), held / whole, shards

FSDP = ((r"(student|target|opt_state)/.*", "fsdp"), (".*", ()))
ALL_FSDP = ((".*", "fsdp"),)
NONE = ((".*", ()),)
one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
loss, gradient, _, _ = run(one, NONE)
scale = max(np.abs(leaf).max() for leaf in gradient)
for name, axes, rules in (
    ("dp", (("data", 8),), NONE),
    ("fsdp", (("data", 1), ("fsdp", 8)), ALL_FSDP),
    ("mixed", (("data", 2), ("fsdp", 4)), FSDP),
):
    other_loss, other, held, shards = run(mesh.make(axes), rules)
    error = max(np.abs(a - b).max() for a, b in zip(gradient, other, strict=True)) / scale
    print(json.dumps([name, abs(other_loss / loss - 1), float(error), held, shards]))
"""


@pytest.fixture(scope="module")
def layouts(tiny_folder):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tiny_folder)], cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {name: values for name, *values in lines}


@pytest.mark.parametrize("name", ["dp", "fsdp", "mixed"])
def test_loss_and_gradient_are_those_of_one_device(layouts, name):
    loss_error, gradient_error, _, _ = layouts[name]
    assert loss_error < 1e-5 and gradient_error < 1e-5


def test_examples_are_spread_over_all_devices(layouts):
    assert {tuple(shards) for *_, shards in layouts.values()} == {(8, 2)}


def test_fsdp_leaves_each_device_its_part_of_the_state(layouts):
    held = {name: held for name, (_, _, held, _) in layouts.items()}
    assert held["dp"] == 1
    assert held["fsdp"] < 0.14 and held["mixed"] < 0.27
