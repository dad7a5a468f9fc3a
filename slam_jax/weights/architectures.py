"""The teachers of configs/ as their config.json files describe them, for where no file is at hand.

Only what differs from the networks' defaults (nets/), which are diffusers' and transformers'.
"""

from pathlib import Path
from typing import NamedTuple

from slam_jax.weights import pretrained

_VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
_SD1_UNET = dict(
    block_out_channels=[320, 640, 1280, 1280], sample_size=64, attention_head_dim=8,
    cross_attention_dim=768,
)  # fmt: skip
_SD2_UNET = _SD1_UNET | dict(
    attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True
)
_SDXL_UNET = dict(
    sample_size=128, block_out_channels=[320, 640, 1280], attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048, use_linear_projection=True, transformer_layers_per_block=[1, 2, 10],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def _text(width: int, layers: int, heads: int, **kwargs) -> dict:
    return dict(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=77, layer_norm_eps=1e-5, **kwargs,
    )  # fmt: skip


_CLIP_L = _text(768, 12, 12, hidden_act="quick_gelu")
_OPENCLIP_H = _text(1024, 23, 16, hidden_act="gelu")
_OPENCLIP_G = _text(
    1280, 32, 20, hidden_act="gelu", projection_dim=1280, eos_token_id=2,
    architectures=["CLIPTextModelWithProjection"],
)  # fmt: skip
_SCHEDULER = dict(
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
    beta_schedule="scaled_linear",
)  # fmt: skip


class _Architecture(NamedTuple):
    unet: dict
    text_encoder: dict
    text_encoder_2: dict | None = None
    scheduler: dict = _SCHEDULER


_OF_MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _Architecture(_SD1_UNET, _CLIP_L),
    "stabilityai/stable-diffusion-2-1-base": _Architecture(_SD2_UNET, _OPENCLIP_H),
    "stabilityai/stable-diffusion-2-1": _Architecture(
        _SD2_UNET | {"sample_size": 96}, _OPENCLIP_H,
        scheduler=_SCHEDULER | {"prediction_type": "v_prediction"},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": _Architecture(_SDXL_UNET, _CLIP_L, _OPENCLIP_G),
}  # fmt: skip


def known(model: str) -> bool:
    """Whether that model of the hub is described here."""
    return model in _OF_MODELS


def find(model: str) -> pretrained.Pretrained:
    """A known model without tokenizers, its parameters as shapes."""
    unet, text_encoder, text_encoder_2, scheduler = _OF_MODELS[model]
    configs = {
        "unet": unet, "vae": _VAE, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2
    }  # fmt: skip
    networks = {part.name: (part, configs[part.name]) for part in pretrained.PARTS}
    return pretrained.Pretrained(
        **{
            name: config and pretrained.Component(config, part.template(config))
            for name, (part, config) in networks.items()
        },
        scheduler=scheduler,
        tokenizer=Path(),
    )
