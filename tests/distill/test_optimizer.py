"""AdamW against torch's, with clipping and warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from slam_jax.distill import optimizer
from slam_jax.errors import UserError

SETTINGS = dict(weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-3)


@pytest.mark.parametrize("mu_dtype, error", [("float32", 2e-6), ("bfloat16", 4e-4)])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_updates_equal_torch_adamw(warmup_steps, mu_dtype, error):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    # Norms of about 0.3 and 30: below and above clip_norm.
    grads = rng.normal(size=(6, 4, 3)).astype(np.float32) * np.float32([[[0.1]], [[10]]] * 3)

    ours = optimizer.adamw(1e-2, warmup_steps, clip_norm=1.0, **SETTINGS, mu_dtype=mu_dtype)
    params = {"a": jnp.asarray(start)}
    state = ours.init(params)
    update = jax.jit(ours.update)
    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    for count, grad in enumerate(grads):
        updates, state = update({"a": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adamw.param_groups[0]["lr"] = (
            1e-2 * min((count + 1) / warmup_steps, 1) if warmup_steps else 1e-2
        )
        adamw.step()
    # 6 updates of at most 1e-2; a bfloat16 is off by at most 1 / 256 of itself.
    np.testing.assert_allclose(params["a"], theirs.detach().numpy(), rtol=0, atol=error)
    moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert [each["a"].dtype for each in moments] == [mu_dtype, "float32"]


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="learning_rate 0"):
        optimizer.adamw(0.0, 0, clip_norm=1.0, **SETTINGS)
