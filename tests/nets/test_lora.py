"""LoRA trees against PEFT: which modules, first values; and merging against running both paths."""

from functools import partial

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import traverse_util

from slam_jax.errors import UserError
from slam_jax.nets import lora
from slam_jax.weights import templates

UNET = dict(
    sample_size=8, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], cross_attention_dim=16,
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], attention_head_dim=2,
)  # fmt: skip
# Those of diffusers' LCM-LoRA training script.
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes():
    return templates.of_unet(UNET)


@pytest.fixture(scope="module")
def tree(shapes):
    return lora.init(np.random.default_rng(0), shapes, TARGETS, 4)


def test_modules_and_first_values_are_pefts(tree):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel.from_config(UNET)
    theirs.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    theirs = {
        name.replace(".default.weight", ""): tensor.detach().numpy()
        for name, tensor in theirs.named_parameters()
        if "lora_" in name
    }
    ours = {".".join(path[:-1]): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}
    letters = {
        name: name.replace("lora_down", "lora_A").replace("lora_up", "lora_B") for name in ours
    }
    assert sorted(letters.values()) == sorted(theirs)
    for name, leaf in ours.items():
        expected = theirs[letters[name]]
        *window, fan_in, fan_out = leaf.shape
        assert leaf.dtype == np.float32 and (fan_out, fan_in, *window) == expected.shape, name
        # Uniform of one width, or zeros: the largest is close to the bound.
        np.testing.assert_allclose(np.abs(leaf).max(), np.abs(expected).max(), rtol=0.3)
        np.testing.assert_allclose(leaf.std(), expected.std(), rtol=0.3)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(6), nn.Conv(6, (1, 1)),
        nn.Conv(6, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
    ],
    ids=["dense", "conv1x1", "conv3x3"],
)  # fmt: skip
def test_merged_layer_is_the_layer_plus_both_halves_one_after_the_other(layer):
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    base = {"to_q": layer.init(jax.random.key(1), x)["params"]}
    down = layer.clone(features=2, use_bias=False)
    up = nn.Dense(6, use_bias=False)
    down_params = down.init(jax.random.key(2), x)
    h = down.apply(down_params, x)
    up_params = up.init(jax.random.key(3), h)
    expected = layer.apply({"params": base["to_q"]}, x) + 0.5 * up.apply(up_params, h)

    tree = lora.init(np.random.default_rng(0), base, ["to_q"], 2)
    shape = tree["to_q"]["lora_up"]["kernel"].shape
    tree["to_q"] = {
        "lora_down": down_params["params"],
        "lora_up": {"kernel": up_params["params"]["kernel"].reshape(shape)},
    }
    merged = jax.jit(partial(lora.merge, scale=0.5))(base, tree)
    np.testing.assert_allclose(layer.apply({"params": merged["to_q"]}, x), expected, atol=1e-5)
    on_host = lora.merge(jax.device_get(base), jax.device_get(tree), 0.5)
    np.testing.assert_allclose(on_host["to_q"]["kernel"], merged["to_q"]["kernel"], atol=1e-6)


def test_first_guess_changes_nothing_and_other_leaves_are_laid_over(shapes, tree):
    base = jax.tree.map(lambda leaf: np.ones(leaf.shape, jnp.bfloat16), shapes)
    kernel = np.full((4, 8), 2.0, np.float32)
    merged = lora.merge(base, {**tree, "time_embedding": {"cond_proj": {"kernel": kernel}}}, 1.0)
    assert merged["time_embedding"].pop("cond_proj")["kernel"] is kernel
    jax.tree.map(np.testing.assert_array_equal, merged, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_regexes_match_whole_names_or_ends(shapes):
    def chosen(*targets):
        tree = lora.init(np.random.default_rng(0), shapes, targets, 1)
        return {".".join(path[:-2]) for path in traverse_util.flatten_dict(tree)}

    assert chosen("conv_in", "mid_block.*attn1.to_q") == {
        "conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    }  # fmt: skip
    assert chosen(r"upsamplers\.0\.conv") == {"up_blocks.0.upsamplers.0.conv"}


@pytest.mark.parametrize(
    "target, said",
    [("to_p", "'to_p' matches no module; there are conv_in, "), ("to_(q", "not a regex"),
     ("o_q", "matches no module")],
)  # fmt: skip
def test_what_matches_nothing_is_refused(shapes, target, said):
    with pytest.raises(UserError, match=said):
        lora.init(np.random.default_rng(0), shapes, ["to_q", target], 1)
