"""Strict JAX for every test: no silent promotion of ranks or dtypes, no key used twice.

Four fake CPU devices; slam_jax's shape annotations are checked at every call.
"""

import json
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook("slam_jax", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Stable Diffusion folder with random weights, 32x32 pixels, latents 16x16x4, no torch."""
    from tokenizers import pre_tokenizers

    from slam_jax.weights import pretrained, templates

    folder = tmp_path_factory.mktemp("tiny_folder")
    tokenizer = folder / "made_from"
    tokenizer.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    # As few blocks as have everything: a transformer between two resolutions.
    unet = dict(
        sample_size=16, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4,
        down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = dict(
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text_encoder = dict(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    )  # fmt: skip
    scheduler = dict(
        _class_name="DDIMScheduler", beta_start=8.5e-4, beta_end=1.2e-2, num_train_timesteps=1000,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip

    rng = np.random.default_rng(0)

    def draw(shape):
        leaf = rng.normal(size=shape.shape) * max(1, np.prod(shape.shape[:-1])) ** -0.5
        return leaf.astype(np.float32)

    def component(config, template):
        return pretrained.Component(config, jax.tree.map(draw, template(config)))

    model = pretrained.Pretrained(
        component(unet, templates.of_unet),
        component(vae, templates.of_vae),
        component(text_encoder, templates.of_text_encoder),
        scheduler,
        tokenizer,
    )
    pretrained.write(folder / "model", model)
    return folder / "model"
