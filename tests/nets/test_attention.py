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
