"""What each of four fake devices computes on its own examples."""

import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from slam_jax.runtime import apart, mesh


def test_means_are_summed_as_one_array():
    devices = mesh.make((("data", 2), ("fsdp", 2)))
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(8, 3)).astype(np.float32)}
    weights = {"a": rng.normal(size=(3, 5)).astype(np.float32), "b": np.ones(5, np.float32)}
    seen = []

    def gradient(examples, weights):
        seen.append((apart.is_here(), examples["x"].shape))

        def loss(weights):
            return jnp.mean((examples["x"] @ weights["a"] + weights["b"][None]) ** 2)

        return jax.value_and_grad(loss)(weights)

    rows = jax.sharding.NamedSharding(devices, P(("data", "fsdp")))
    inputs = jax.device_put(examples, rows), jax.device_put(weights, mesh.replicated(devices))
    program = jax.jit(apart.mean_over_devices(devices)(gradient)).lower(*inputs).compile()
    (sums,) = re.findall(r"= (\S+) all-reduce\(", program.as_text())
    assert sums.startswith("f32[21]")  # the loss, 3 x 5 and 5 numbers
    assert seen == [(True, (2, 3))]
    loss, gradients = program(*inputs)
    # By hand: d/dw of mean over N x 5 squares.
    residual = examples["x"].astype(np.float64) @ weights["a"] + weights["b"]
    np.testing.assert_allclose(loss, np.mean(residual**2), rtol=1e-6)
    np.testing.assert_allclose(gradients["a"], 2 * examples["x"].T @ residual / 40, rtol=1e-5)
    np.testing.assert_allclose(gradients["b"], 2 * residual.sum(0) / 40, rtol=1e-5)
    assert not apart.is_here()


def test_cpus_with_copies_of_everything_alone_sum_so():
    copies, cut = ((".*", ()),), ((".*", "fsdp"),)
    four, one = mesh.make((("data", -1),)), mesh.make((("data", 1),), jax.devices()[:1])
    assert apart.over_devices(four, copies) is not None
    assert apart.over_devices(one, copies) is None
    assert apart.over_devices(mesh.make((("fsdp", 4),)), cut) is None
    # The second axis has the same examples as the first.
    assert apart.over_devices(mesh.make((("data", 2), ("model", 2))), copies) is None


def test_on_gpus_gradients_of_convolutions_lie_as_their_kernels():
    gpus = mock.Mock(spec=Mesh)
    gpus.devices = np.array([types.SimpleNamespace(platform="gpu")])
    wrap = apart.over_devices(gpus, ((".*", ()),))

    def gradient(x, factor):
        return {"kernel": factor * x, "bias": factor * x[0, 0, 0]}

    x = np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)
    lowered = jax.jit(wrap(gradient)).lower(x, np.float32(2))
    (asked,) = re.findall(r"@LayoutConstraint.*dense<(.*?)> .*tensor<(.*?)>\n", lowered.as_text())
    assert asked == ("[3, 2, 1, 0]", "1x2x3x4xf32")
    found = lowered.compile()(x, np.float32(2))
    np.testing.assert_array_equal(found["kernel"], 2 * x)
    np.testing.assert_array_equal(found["bias"], 2 * x[0, 0, 0])
