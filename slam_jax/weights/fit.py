"""Whether networks belong together, told from their config.json files before any is loaded."""

from collections.abc import Mapping

from slam_jax.errors import UserError
from slam_jax.nets import clip, unet, vae

_REMEDY = "take all parts from one text-to-image model"


def check(
    source: str,
    unet_config: Mapping,
    vae_config: Mapping,
    text_encoder_config: Mapping,
    text_encoder_2_config: Mapping | None = None,
) -> None:
    """UserError unless VAE and text encoders give the UNet what it takes. source: for messages."""
    net = unet.from_config(unet_config)
    _check_latents(source, net, vae.from_config(vae_config).latent_channels)
    configs = (text_encoder_config, text_encoder_2_config)
    encoders = [clip.from_config(each) for each in configs if each is not None]
    _check_text(source, net, encoders)
    _check_pooled(source, net, encoders)


def _check_latents(source: str, net: unet.UNet2DConditionModel, latent_channels: int) -> None:
    for key, channels in (("in_channels", net.in_channels), ("out_channels", net.out_channels)):
        if channels != latent_channels:
            inpainting = " (9 are an inpainting model's)" * (channels == 9)
            raise UserError(
                f"{source}: the UNet has {key} {channels}{inpainting}, but the VAE's "
                f"latent_channels are {latent_channels}; {_REMEDY}"
            )


def _check_text(
    source: str, net: unet.UNet2DConditionModel, encoders: list[clip.CLIPTextModel]
) -> None:
    widths = [encoder.hidden_size for encoder in encoders]
    if sum(widths) != net.cross_attention_dim:
        raise UserError(
            f"{source}: the text is {' + '.join(map(str, widths))} wide (hidden_size), but the "
            f"UNet's cross_attention_dim is {net.cross_attention_dim}; {_REMEDY}"
        )


def _check_pooled(
    source: str, net: unet.UNet2DConditionModel, encoders: list[clip.CLIPTextModel]
) -> None:
    needed = None if net.addition_embed_type is None else net.pooled_width()
    given = encoders[-1].projection_dim
    if given != needed:
        raise UserError(
            f"{source}: the pooled text is {given} wide (projection_dim of text_encoder_2), but "
            f"the UNet's addition_embed_type {net.addition_embed_type!r} takes {needed}; {_REMEDY}"
        )
