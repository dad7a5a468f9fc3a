"""The UNet's transformer against diffusers' torch class, where the epsilons of its norms count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_2d

from slam_jax.nets import attention
from slam_jax.weights import translate


@pytest.mark.parametrize("use_linear_projection", [False, True])
def test_transformer_matches_torch_at_small_variance(use_linear_projection):
    model = transformer_2d.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=8, norm_num_groups=2,
        cross_attention_dim=6, use_linear_projection=use_linear_projection,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.5).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        # The tokens' variance is then about LayerNorm's epsilon, that of x about GroupNorm's.
        model.proj_in.weight.mul_(2e-3)
        model.proj_in.bias.mul_(2e-3)
        x, text = 1e-3 * torch.randn(2, 8, 3, 4), torch.randn(2, 5, 6)
        reference = model(x, encoder_hidden_states=text).sample.permute(0, 2, 3, 1).numpy()

    module = attention.Transformer2DModel(2, 1, 2, use_linear_projection)
    inputs = jnp.asarray(x.permute(0, 2, 3, 1).numpy()), jnp.asarray(text.numpy())
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    tensors = {name: t.numpy() for name, t in model.state_dict().items()}
    params = translate.to_params(tensors, shapes, "torch")
    out = jax.jit(module.apply)({"params": params}, *inputs)
    assert np.linalg.norm(out - reference) / np.linalg.norm(reference) <= 1e-5


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
    out = attention.attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value))
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["even weights", "few weights are all"])
def test_attend_and_its_gradient_are_torchs(scale):
    rng = np.random.default_rng(0)
    inputs = [scale * rng.normal(size=(2, n, 3, 5)).astype(np.float32) for n in (6, 7, 7)]
    weight = rng.normal(size=(2, 6, 3, 5)).astype(np.float32)

    def total(*inputs):
        mixed = attention.attend(*inputs)
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
