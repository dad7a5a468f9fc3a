"""AutoencoderKL: images to the posterior of their latents, and back. NHWC.

The architecture and every submodule's name are those of diffusers' AutoencoderKL, as the
Stable Diffusion checkpoints configure it. Latents here are unscaled: scaling_factor belongs
to pipeline.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from slam_jax.errors import UserError
from slam_jax.nets import kernels, layers
from slam_jax.shapes import Image, Latent

_EPSILON = 1e-6
_Features = Float[Array, "B _ _ _"]


class Posterior(NamedTuple):
    """The diagonal Gaussian q(z | image): mean and log-variance, [B, h, w, C] each."""

    mean: Latent
    logvar: Latent


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    num_groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: _Features) -> _Features:
        batch, height, width, channels = x.shape
        h = layers.group_norm(self.num_groups, _EPSILON, self.dtype, "group_norm")(x)
        h = h.reshape(batch, height * width, channels)
        query = layers.Dense(channels, dtype=self.dtype, name="to_q")(h)
        key = layers.Dense(channels, dtype=self.dtype, name="to_k")(h)
        value = layers.Dense(channels, dtype=self.dtype, name="to_v")(h)
        h = kernels.attend(*(each[:, :, None] for each in (query, key, value)))[:, :, 0]
        h = layers.Dense(channels, dtype=self.dtype, name="to_out.0")(h)
        return x + h.reshape(batch, height, width, channels)


class MidBlock(nn.Module):
    """Residual block, attention (unless the checkpoint leaves it out), residual block."""

    channels: int
    num_groups: int
    attention: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: _Features) -> _Features:
        resnet = (self.channels, self.num_groups, _EPSILON, self.dtype)
        x = layers.ResnetBlock2D(*resnet, name="resnets.0")(x)
        if self.attention:
            x = Attention(self.num_groups, self.dtype, name="attentions.0")(x)
        return layers.ResnetBlock2D(*resnet, name="resnets.1")(x)


class CodecBlock(nn.Module):
    """Residual blocks at one resolution, then a halving, a doubling or neither."""

    channels: int
    num_resnets: int
    num_groups: int
    downsample: bool = False
    upsample: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: _Features) -> _Features:
        for i in range(self.num_resnets):
            x = layers.ResnetBlock2D(
                self.channels, self.num_groups, _EPSILON, self.dtype, name=f"resnets.{i}"
            )(x)
        if self.downsample:
            # The encoder pads only below and to the right.
            x = layers.Downsample2D(
                self.channels, ((0, 1), (0, 1)), self.dtype, name="downsamplers.0"
            )(x)
        if self.upsample:
            x = layers.Upsample2D(self.channels, self.dtype, name="upsamplers.0")(x)
        return x


class Encoder(nn.Module):
    """Image [-1, 1] to the 2 C moments of its posterior, before quant_conv."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    num_groups: int
    latent_channels: int
    mid_block_add_attention: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: _Features) -> _Features:
        x = layers.conv3x3(self.block_out_channels[0], self.dtype, "conv_in")(x)
        last = len(self.block_out_channels) - 1
        for i, channels in enumerate(self.block_out_channels):
            x = CodecBlock(
                channels, self.layers_per_block, self.num_groups, downsample=i < last,
                dtype=self.dtype, name=f"down_blocks.{i}",
            )(x)  # fmt: skip
        x = MidBlock(
            channels, self.num_groups, self.mid_block_add_attention, self.dtype, name="mid_block"
        )(x)
        x = nn.silu(layers.group_norm(self.num_groups, _EPSILON, self.dtype, "conv_norm_out")(x))
        return layers.conv3x3(2 * self.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents, after post_quant_conv, to an image in about [-1, 1]."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    num_groups: int
    out_channels: int
    mid_block_add_attention: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: _Features) -> _Features:
        widths = self.block_out_channels[::-1]
        x = layers.conv3x3(widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(
            widths[0], self.num_groups, self.mid_block_add_attention, self.dtype, name="mid_block"
        )(x)
        for i, channels in enumerate(widths):
            x = CodecBlock(
                channels, self.layers_per_block + 1, self.num_groups, upsample=i < len(widths) - 1,
                dtype=self.dtype, name=f"up_blocks.{i}",
            )(x)  # fmt: skip
        x = nn.silu(layers.group_norm(self.num_groups, _EPSILON, self.dtype, "conv_norm_out")(x))
        return layers.conv3x3(self.out_channels, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """The VAE of latent diffusion. Fields are the keys of diffusers' vae/config.json."""

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 1
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        shared = dict(
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            num_groups=self.norm_num_groups,
            mid_block_add_attention=self.mid_block_add_attention,
            dtype=self.dtype,
        )
        self.encoder = Encoder(latent_channels=self.latent_channels, **shared)
        self.decoder = Decoder(out_channels=self.out_channels, **shared)
        if self.use_quant_conv:
            self.quant_conv = layers.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = layers.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: Image) -> Posterior:
        """images [B, H, W, 3] in [-1, 1] -> posterior of the unscaled latents, float32.

        H and W are multiples of 2 ** (len(block_out_channels) - 1).
        """
        moments = self.encoder(images.astype(self.dtype))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Latent) -> Image:
        """Unscaled latents [B, h, w, C] -> images [B, H, W, 3] in about [-1, 1], float32."""
        x = latents.astype(self.dtype)
        if self.use_post_quant_conv:
            x = self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32)

    def __call__(self, images: Image) -> Image:
        return self.decode(self.encode(images).mean)


# Keys of vae/config.json that must have this value, because nothing else is implemented.
_FIXED = {
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
}
# Keys that say how the VAE is used, not what it computes.
_INERT = ("sample_size", "scaling_factor", "force_upcast")


def from_config(config: Mapping[str, Any], *, dtype: DTypeLike = jnp.float32) -> AutoencoderKL:
    """The module that a vae/config.json describes; UserError for what is not implemented."""
    fields = AutoencoderKL.__dataclass_fields__
    kwargs = {}
    for key, value in config.items():
        if key in _FIXED:
            if any(v != _FIXED[key] for v in (value if isinstance(value, list) else [value])):
                raise UserError(
                    f"vae/config.json: {key}={value!r} is not supported; Stable Diffusion's VAEs "
                    f"have {_FIXED[key]!r}"
                )
        elif key in fields and key not in ("dtype", "name", "parent"):
            kwargs[key] = tuple(value) if isinstance(value, list) else value
        elif not key.startswith("_") and key not in _INERT:
            raise UserError(f"vae/config.json: unknown key {key}={value!r}; is this a VAE of SD?")
    return AutoencoderKL(**kwargs, dtype=dtype)
