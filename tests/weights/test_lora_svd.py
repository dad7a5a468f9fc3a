"""A LoRA out of a full student: exact where it can be, the best of its rank where it cannot."""

import jax
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from slam_jax.errors import UserError
from slam_jax.nets import lora as lora_tree
from slam_jax.weights import lora, lora_svd, pretrained, templates

CONFIG = dict(
    block_out_channels=[64, 32], layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], cross_attention_dim=16,
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)  # fmt: skip
LINEAR_1 = "time_embedding.linear_1"


@pytest.fixture(scope="module")
def teacher():
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), templates.of_unet(CONFIG)
    )
    return pretrained.Component(CONFIG, params)


def _change(component, module, leaf, value):
    """The network with `value` added to one parameter."""
    params = jax.tree.map(lambda leaf: leaf, component.params)
    inner = params
    for name in module:
        inner = inner[name]
    inner[leaf] = inner[leaf] + value
    return component._replace(params=params)


def test_teacher_plus_lora_gives_the_lora_back(teacher):
    tree = lora_tree.init(np.random.default_rng(1), teacher.params, [".*"], 3)
    rng = np.random.default_rng(2)
    tree = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), tree)
    student = lora.merged(teacher, tree)
    additions, kept = lora_svd.extract(teacher, student, 3)
    assert jax.tree.map(np.shape, additions) == jax.tree.map(np.shape, tree)
    again = lora.merged(teacher, additions).params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), again, student.params
    )
    np.testing.assert_allclose(list(kept.values()), 1, atol=1e-6)
    assert len(kept) == len(jax.tree.leaves(tree)) / 2


def test_share_is_that_of_the_largest_singular_values(teacher):
    rng = np.random.default_rng(3)
    for module, shape in (
        (("conv_in",), (3, 3, 4, 64)),
        (("mid_block", "resnets.0", "time_emb_proj"), (256, 32)),
    ):
        change = rng.normal(size=shape).astype(np.float32)
        student = _change(teacher, module, "kernel", change)
        additions, kept = lora_svd.extract(teacher, student, 5)
        left, values, right = np.linalg.svd(change.reshape(-1, shape[-1]), full_matrices=False)
        best = ((left[:, :5] * values[:5]) @ right[:5]).reshape(shape)
        halves = additions
        for name in module:
            halves = halves[name]
        found = halves["lora_down"]["kernel"] @ halves["lora_up"]["kernel"]
        np.testing.assert_allclose(found, best, atol=1e-4)
        assert kept == {
            ".".join(module) + ".weight": pytest.approx(sum(values[:5] ** 2) / sum(values**2), 1e-4)
        }


def test_lower_layers_are_filled_up_with_zeros(teacher):
    student = _change(teacher, ("conv_out",), "kernel", 0.1 * np.arange(4, dtype=np.float32))
    additions, kept = lora_svd.extract(teacher, student, 9)
    assert additions["conv_out"]["lora_up"]["kernel"].shape == (1, 1, 9, 4)
    assert kept == {"conv_out.weight": pytest.approx(1)}


@pytest.mark.parametrize("kernel_too", [False, True])
def test_folded_gamma_is_kept_in_a_plain_lora(teacher, kernel_too):
    rng = np.random.default_rng(4)
    student = _change(
        teacher, ("time_embedding", "linear_1"), "bias", rng.normal(size=256).astype(np.float32)
    )
    if kernel_too:
        rank_2 = rng.normal(size=(64, 2)) @ rng.normal(size=(2, 256))
        student = _change(
            student, ("time_embedding", "linear_1"), "kernel", 0.1 * np.float32(rank_2)
        )
    additions, kept = lora_svd.extract(teacher, student, 3)
    # What reaches the layer is diffusers' own, at every t.
    sinusoids = Timesteps(64, True, 0)(torch.arange(1000)).numpy()
    before, expected, found = (
        sinusoids @ linear_1["kernel"] + linear_1["bias"]
        for linear_1 in (
            component.params["time_embedding"]["linear_1"]
            for component in (teacher, student, lora.merged(teacher, additions))
        )
    )
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - before)
    assert error < 1e-5
    assert kept == pytest.approx({f"{LINEAR_1}.bias": 1, f"{LINEAR_1}.weight": 1})


def test_other_biases_and_norms_are_said_to_be_lost(teacher):
    student = _change(teacher, ("conv_norm_out",), "scale", np.float32(0.1))
    student = _change(student, ("conv_in",), "bias", np.float32(0.1))
    additions, kept = lora_svd.extract(teacher, student, 2)
    assert additions == {} and kept == {"conv_norm_out.weight": 0, "conv_in.bias": 0}


def test_networks_of_other_tensors_are_refused(teacher):
    cond_proj = {"cond_proj": {"kernel": np.zeros((8, 64), np.float32)}}
    params = {**teacher.params, "time_embedding": teacher.params["time_embedding"] | cond_proj}
    with pytest.raises(UserError, match="cond_proj.kernel .* student with gamma folded"):
        lora_svd.extract(teacher, teacher._replace(params=params), 2)
    with pytest.raises(UserError, match="rank 0 must be at least 1"):
        lora_svd.extract(teacher, teacher, 0)
