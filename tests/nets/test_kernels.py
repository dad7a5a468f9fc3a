"""Attention against torch's, and the chips' own kernels against it."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu

from slam_jax import flops
from slam_jax.nets import kernels
from slam_jax.runtime import apart, mesh


def test_attention_logits_do_not_overflow_float16():
    """What upcast_attention is for: |q k| beyond 65504, and differences that float16 would lose."""
    rng = np.random.default_rng(0)
    query = (rng.standard_normal((1, 3, 1, 8)) + 150).astype(np.float16)
    key = (rng.standard_normal((1, 4, 1, 8)) * 0.01 + 150).astype(np.float16)
    value = rng.standard_normal((1, 4, 1, 8)).astype(np.float16)
    q, k, v = (x[0, :, 0].astype(np.float64) for x in (query, key, value))
    logits = q @ k.T / np.sqrt(8)
    assert (q @ k.T).min() > 65504
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ v
    out = kernels.attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value))
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["even weights", "few weights are all"])
def test_attend_and_its_gradient_are_torchs(scale):
    rng = np.random.default_rng(0)
    inputs = [scale * rng.normal(size=(2, n, 3, 5)).astype(np.float32) for n in (6, 7, 7)]
    weight = rng.normal(size=(2, 6, 3, 5)).astype(np.float32)

    def total(*inputs):
        mixed = kernels.attend(*inputs)
        return jnp.sum(weight * mixed), mixed

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    ours, mixed = jax.device_get(gradient(*map(jnp.asarray, inputs)))
    theirs = [torch.from_numpy(each).requires_grad_() for each in inputs]
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.swapaxes(1, 2) for x in theirs))
    wanted = wanted.swapaxes(1, 2)
    (torch.from_numpy(weight) * wanted).sum().backward()
    np.testing.assert_allclose(mixed, wanted.detach().numpy(), rtol=1e-5, atol=1e-5 * scale)
    for name, got, each in zip(("query", "key", "value"), ours, theirs, strict=True):
        np.testing.assert_allclose(
            got, each.grad.numpy(), rtol=1e-5, atol=1e-5 * scale, err_msg=name
        )


def inputs(num_keys: int, depth: int, dtype=np.float32, batch: int = 2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, num_keys, 1, depth)), dtype) for _ in range(3)]


def mixed_and_gradient(attend, *inputs):
    def total(*inputs):
        mixed = attend(*inputs)
        return jnp.sum(jnp.sin(mixed)), mixed

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)


@pytest.mark.parametrize(("num_queries", "num_keys", "depth"), [
    (1024, 1024, 40), (2304, 2304, 8), (1024, 77, 40),
], ids=["one block", "several", "a prompt's"])  # fmt: skip
def test_flash_and_its_gradient_are_attends(num_queries, num_keys, depth):
    """The TPU's kernel, carried out by JAX's interpreter of TPUs."""
    query, key, value = inputs(num_queries, depth, batch=1)
    arrays = query, key[:, :num_keys], value[:, :num_keys]
    wanted = mixed_and_gradient(kernels.attend, *arrays)
    with tpu.force_tpu_interpret_mode():
        found = mixed_and_gradient(kernels.flash, *arrays)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        error = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
        assert error <= 1e-6


@pytest.mark.parametrize("num_keys, depth", [(4096, 40), (1024, 80), (9216, 64)])
def test_flash_is_made_for_tpus_at_stable_diffusions_sizes(num_keys, depth):
    """Lowered for a TPU that is not here: forward and backward."""
    shapes = jax.eval_shape(lambda: inputs(num_keys, depth, jnp.bfloat16))
    gradient = jax.jit(lambda *x: mixed_and_gradient(kernels.flash, *x))
    text = gradient.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == 2
    assert f"{num_keys}x{num_keys}" not in text
    # What is kept between forward and backward, a number a query, is not written 1,024 times.
    assert f"{num_keys}x1024xf32" not in text


def test_kernels_leave_what_is_small_or_odd_to_attend():
    for num_keys, depth in ((256, 40), (1024, 160), (1100, 40)):
        shapes = jax.eval_shape(lambda n=num_keys, d=depth: inputs(n, d))
        assert "pallas_call" not in str(jax.make_jaxpr(kernels.flash)(*shapes))
    for depth, dtype in ((160, jnp.bfloat16), (36, jnp.bfloat16), (40, np.float32)):
        shapes = jax.eval_shape(lambda d=depth, t=dtype: inputs(1024, d, t))
        jax.make_jaxpr(kernels.cudnn)(*shapes)  # cuDNN's would refuse them, and any on a CPU


def test_each_device_calls_a_kernel_on_its_own_examples():
    """What XLA cannot cut: here each device's own mean, which is seen where it is called."""
    devices = mesh.make((("data", 2), ("fsdp", 2)))
    rows = mesh.rows_sharding(devices)
    x = np.arange(8.0, dtype=np.float32).reshape(8, 1, 1, 1)
    kernel = apart.on_own_examples(lambda query, key, value: query + key.mean() + 0 * value)

    def call(x):
        with apart.scope(devices):
            return kernel(x, x, x)

    program = jax.jit(call).lower(jax.device_put(x, rows)).compile()
    found = program(jax.device_put(x, rows))
    assert "all-gather" not in program.as_text() and "all-reduce" not in program.as_text()
    assert found.sharding.is_equivalent_to(rows, 4)
    means = x.reshape(4, 2).mean(axis=1).repeat(2).reshape(x.shape)
    np.testing.assert_array_equal(found, x + means)
    np.testing.assert_array_equal(jax.jit(kernel)(x, x, x), x + x.mean())  # without a mesh


def test_flash_costs_the_products_of_attend():
    shapes = jax.eval_shape(lambda: inputs(4096, 40))
    ours, theirs = (jax.make_jaxpr(each)(*shapes).jaxpr for each in (kernels.attend, kernels.flash))
    assert flops.count(ours) == flops.count(theirs) == 2 * 2 * 2 * 4096**2 * 40
    assert flops.count(theirs, unrolled=False) == 0  # XLA does not look into kernels


@pytest.mark.parametrize(("num_keys", "told"), [(4096, 4096), (77, 80)])
def test_cudnn_asks_for_flash_attention_forward_and_backward(num_keys, told):
    """Lowered for a GPU that is not here; only what asks which GPU it is was replaced."""
    shapes = jax.eval_shape(lambda: prompted(4096, num_keys))
    here = fused_attention_stablehlo
    with (
        mock.patch.object(here, "check_cudnn_version", return_value=91000),
        mock.patch.object(here, "check_compute_capability", return_value=False),
        mock.patch.object(here, "is_cuda_compute_capability_equal", return_value=False),
    ):
        gradient = jax.jit(lambda *x: mixed_and_gradient(kernels.cudnn, *x))
        traced = gradient.trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Two products forward, and five backward, since the weights were not kept.
    for unrolled in (True, False):
        found = flops.count(traced.jaxpr.jaxpr, unrolled=unrolled)
        assert found == (2 + 5) * 2 * 2 * 4096 * told * 40
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    assert f"4096x{num_keys}x" not in text and f"4096x{told}x" not in text


def prompted(num_queries, num_keys):
    """Queries of pixels, keys and values of a prompt."""
    query, key, value = inputs(num_queries, 40, jnp.bfloat16)
    return query, key[:, :num_keys], value[:, :num_keys]


def test_keys_that_were_added_for_cudnn_change_nothing():
    """In the place of cuDNN, which is not here, XLA does what JAX defines for both."""
    arrays = prompted(1024, 77)
    wanted = mixed_and_gradient(kernels.attend, *arrays)
    asked = []

    def as_xla(*arrays, implementation, **named):
        asked.append((implementation, arrays[1].shape))
        return attention(*arrays, **named, implementation="xla")

    attention = jax.nn.dot_product_attention
    with (
        mock.patch.object(jax.nn, "dot_product_attention", as_xla),
        jax.numpy_dtype_promotion("standard"),
    ):
        found = mixed_and_gradient(kernels.cudnn, *arrays)
    assert asked == [("cudnn", (2, 80, 1, 40))]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) <= 0.01 * np.linalg.norm(theirs)
