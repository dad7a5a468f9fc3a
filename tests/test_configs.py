"""Every config of a real teacher, built at its real size: shapes only, nothing is computed."""

import pathlib
import runpy
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from slam_jax import experiment, pipeline, settings
from slam_jax.distill import optimizer, state, step
from slam_jax.weights import pretrained, templates

ROOT = pathlib.Path(__file__).parents[1]
VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
LEVELS = dict(block_out_channels=[320, 640, 1280, 1280])
SD1_UNET = dict(LEVELS, sample_size=64, attention_head_dim=8, cross_attention_dim=768)
SD2_UNET = dict(
    LEVELS, sample_size=64, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
    use_linear_projection=True,
)  # fmt: skip
SDXL_UNET = dict(
    sample_size=128, block_out_channels=[320, 640, 1280], attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048, use_linear_projection=True, transformer_layers_per_block=[1, 2, 10],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def _text(width, layers, heads, **kwargs):
    return dict(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=77, layer_norm_eps=1e-5, **kwargs,
    )  # fmt: skip


CLIP_L = _text(768, 12, 12, hidden_act="quick_gelu")
OPENCLIP_H = _text(1024, 23, 16, hidden_act="gelu")
OPENCLIP_G = _text(
    1280, 32, 20, hidden_act="gelu", projection_dim=1280, eos_token_id=2,
    architectures=["CLIPTextModelWithProjection"],
)  # fmt: skip
SCHEDULER = dict(
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
    beta_schedule="scaled_linear",
)  # fmt: skip
# The UNet's, the text encoders' and what differs in the scheduler's config.
TEACHERS = {
    "sd15": (SD1_UNET, CLIP_L, None, {}),
    "lcm_sd15": (SD1_UNET, CLIP_L, None, {}),
    "sd21_base": (SD2_UNET, OPENCLIP_H, None, {}),
    "sd21": (SD2_UNET | {"sample_size": 96}, OPENCLIP_H, None, {"prediction_type": "v_prediction"}),
    "sdxl_lora": (SDXL_UNET, CLIP_L, OPENCLIP_G, {}),
}


def _teacher(name):
    unet, text, text_2, scheduler = TEACHERS[name]
    return pretrained.Pretrained(
        unet=pretrained.Component(unet, templates.of_unet(unet)),
        vae=pretrained.Component(VAE, templates.of_vae(VAE)),
        text_encoder=pretrained.Component(text, templates.of_text_encoder(text)),
        text_encoder_2=text_2 and pretrained.Component(text_2, templates.of_text_encoder(text_2)),
        scheduler=SCHEDULER | scheduler,
        tokenizer=pathlib.Path(),
    )


def test_every_config_but_the_demos_is_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {*TEACHERS, "tiny"}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_train_step_can_be_built(name):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().to_dict()
    chosen = settings.from_config(config)
    teacher = _teacher(name)
    student = experiment.student(chosen, teacher.unet)
    adamw = optimizer.adamw(**chosen.optimizer._asdict())
    is_sdxl = teacher.text_encoder_2 is not None
    batch = {
        "image": jax.ShapeDtypeStruct((1, 2, chosen.data.size, chosen.data.size, 3), jnp.uint8),
        "input_ids": jax.ShapeDtypeStruct((1, 2, 77), jnp.int32),
    }
    if is_sdxl:
        batch["input_ids_2"] = batch["input_ids"]
        batch["time_ids"] = jax.ShapeDtypeStruct((1, 2, 6), jnp.int32)
    encode_null = pipeline.encode_null_text(teacher, pipeline.dtype(chosen.teacher.dtype))
    one = {key: jax.ShapeDtypeStruct((1, *leaf.shape[2:]), leaf.dtype)
           for key, leaf in batch.items() if key != "image"}  # fmt: skip
    null_text = jax.eval_shape(encode_null, pipeline.text_params(teacher), one)
    frozen = state.Frozen(
        teacher.unet.params, teacher.vae.params, pipeline.text_params(teacher), null_text
    )
    before = jax.eval_shape(partial(state.init, optimizer=adamw), student.params)
    run = partial(
        step.train_step, nets=experiment.nets(chosen, teacher, student.config),
        method=experiment.method(chosen.distill, teacher.scheduler), optimizer=adamw,
        ema_rate=chosen.ema_rate, num_steps=chosen.num_steps,
        max_grad_norm=chosen.faults.max_grad_norm,
    )  # fmt: skip
    after, metrics = jax.eval_shape(run, before, frozen, batch, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, before)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    trained = sum(leaf.size for leaf in jax.tree.leaves(after.student))
    in_base = sum(leaf.size for leaf in jax.tree.leaves(teacher.unet.params))
    if chosen.student.lora.rank:
        assert 2e7 < trained < 3e8
    else:
        assert trained == in_base + 256 * 320
