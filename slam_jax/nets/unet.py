"""Stable Diffusion's denoising UNet, for every SD 1.x, 2.x and SDXL config. NHWC.

Module and field names are diffusers' (UNet2DConditionModel), dots included: see layers.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from slam_jax.errors import UserError
from slam_jax.nets import attention, embeddings, kernels, layers, unet_blocks
from slam_jax.shapes import Conditioning, Time

# Whether a block type of the config has transformers.
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
NUM_TIME_IDS = 6  # of shapes.SDXLText


def _is_convolution(primitive: core.Primitive, *_inputs: object, **_params: object) -> bool:
    return primitive is primitives.conv_general_dilated_p


# What the backward pass computes again of residual blocks and transformers -> which results are
# kept (None: all of them). From first to last it takes less memory and more time.
REMAT = {
    "none": None,
    # Norms, activations and attention: of the matrix products, attention's alone have a batch.
    "save_products": jax.checkpoint_policies.save_from_both_policies(
        _is_convolution, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "save_convs": _is_convolution,
    "all": jax.checkpoint_policies.nothing_saveable,
}


class UNet2DConditionModel(nn.Module):
    """The network eps (or v) = unet(x_t, t, text, gamma embedding).

    Fields are the keys of a diffusers unet/config.json, with its defaults, plus `dtype` (compute;
    parameters are float32), `remat` (what the backward pass computes again: a key of REMAT) and
    `attend` (what computes attention, of kernels.py). As in those configs,
    `attention_head_dim` is the NUMBER of heads; where a field takes a tuple it has one entry per
    level, from the finest on.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_cond_proj_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attend: Callable = kernels.attend

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "B h w _"],
        timesteps: Time,
        encoder_hidden_states: Conditioning,
        timestep_cond: Float[Array, "B _"] | None = None,
    ) -> Float[Array, "B h w _"]:
        """Latents of any height and width -> output of the same size, in the sample's dtype.

        timesteps: in [0, 1000). encoder_hidden_states: an SDXLText where
        addition_embed_type is "text_time". timestep_cond: [B, time_cond_proj_dim].
        """
        assert sample.shape[-1] == self.in_channels, (sample.shape, self.in_channels)
        text = encoder_hidden_states
        embedding = self.time_embedding()(timesteps, timestep_cond)
        if self.addition_embed_type is not None:
            assert text.pooled.shape[-1] == self.pooled_width(), text.pooled.shape
            embedding = embedding + self.add_embedding()(text)
            text = text.hidden_states
        assert text.shape[-1] == self.cross_attention_dim, (
            f"text of width {text.shape[-1]}, cross_attention_dim {self.cross_attention_dim}"
        )
        text = text.astype(self.dtype)
        x = layers.conv3x3(self.block_out_channels[0], self.dtype, "conv_in")(sample)
        x = self.down_mid_up(x, embedding, text)
        x = layers.group_norm(self.norm_num_groups, self.norm_eps, self.dtype, "conv_norm_out")(x)
        x = layers.conv3x3(self.out_channels, self.dtype, "conv_out")(nn.silu(x))
        return x.astype(sample.dtype)

    def down_mid_up(
        self,
        x: Float[Array, "B h w _"],
        embedding: Float[Array, "B E"],
        text: Float[Array, "B L D"],
    ) -> Float[Array, "B h w _"]:
        """Everything between the first and the last convolution."""
        down, mid, up = self.levels()
        resnet, transformer = self.makers()
        skips = [x]
        for i, level in enumerate(down):
            block = unet_blocks.DownBlock2D(
                level, i < len(down) - 1, resnet, transformer, self.dtype, name=f"down_blocks.{i}"
            )
            x, new_skips = block(x, embedding, text)
            skips += new_skips
        x = unet_blocks.MidBlock2D(mid, resnet, transformer, name="mid_block")(x, embedding, text)
        for i, level in enumerate(up):
            own, skips = skips[-level.num_resnets :], skips[: -level.num_resnets]
            # Downsampling rounds odd sizes up: go back to the size that the next skips have.
            size = skips[-1].shape[1:3] if skips else None
            block = unet_blocks.UpBlock2D(
                level, size, resnet, transformer, self.dtype, name=f"up_blocks.{i}"
            )
            x = block(x, own, embedding, text)
        return x

    def time_embedding(self) -> embeddings.TimestepEmbedding:
        """The submodule of that name."""
        return embeddings.TimestepEmbedding(
            self.block_out_channels[0],
            4 * self.block_out_channels[0],
            self.flip_sin_to_cos,
            self.freq_shift,
            self.time_cond_proj_dim,
            name="time_embedding",
        )

    def add_embedding(self) -> embeddings.TextTimeEmbedding:
        """The submodule of that name."""
        return embeddings.TextTimeEmbedding(
            self.addition_time_embed_dim,
            4 * self.block_out_channels[0],
            self.flip_sin_to_cos,
            self.freq_shift,
            name="add_embedding",
        )

    def pooled_width(self) -> int:
        """P of the SDXLText that this UNet takes."""
        return (
            self.projection_class_embeddings_input_dim - NUM_TIME_IDS * self.addition_time_embed_dim
        )

    def makers(self) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
        """The residual block and the transformer with what all levels share filled in."""
        resnet, transformer = layers.ResnetBlock2D, attention.Transformer2DModel
        if policy := REMAT[self.remat]:
            recomputed = functools.partial(nn.remat, policy=policy)
            resnet, transformer = recomputed(resnet), recomputed(transformer)
        return (
            functools.partial(
                resnet,
                num_groups=self.norm_num_groups,
                epsilon=self.norm_eps,
                dtype=self.dtype,
            ),
            functools.partial(
                transformer,
                num_groups=self.norm_num_groups,
                use_linear_projection=self.use_linear_projection,
                dtype=self.dtype,
                attend=self.attend,
            ),
        )

    def levels(self) -> tuple[list[unet_blocks.Level], unet_blocks.Level, list[unet_blocks.Level]]:
        """The levels of the way down (finest first), of the middle, and of the way up."""
        num_levels = len(self.block_out_channels)
        plain = [
            unet_blocks.Level(*numbers)
            for numbers in zip(
                self.block_out_channels,
                per_level(self.layers_per_block, num_levels),
                per_level(self.attention_head_dim, num_levels),
                per_level(self.transformer_layers_per_block, num_levels),
                strict=True,
            )
        ]
        down = [
            level if DOWN_BLOCKS[kind] else level._replace(num_transformer_layers=0)
            for level, kind in zip(plain, self.down_block_types, strict=True)
        ]
        up = [
            level._replace(
                num_resnets=level.num_resnets + 1,
                num_transformer_layers=UP_BLOCKS[kind] * level.num_transformer_layers,
            )
            for level, kind in zip(reversed(plain), self.up_block_types, strict=True)
        ]
        return down, plain[-1], up


def per_level(value: int | tuple[int, ...], num_levels: int) -> tuple[int, ...]:
    """One entry per level, from one number for all or from the entries themselves."""
    return (value,) * num_levels if isinstance(value, int) else value


# Keys of unet/config.json that change nothing here. upcast_attention: attention logits are
# float32 always. sample_size is the pipeline's affair.
INERT_KEYS = frozenset({"sample_size", "upcast_attention", "addition_embed_type_num_heads"})

# Keys that are implemented for these values only.
ONLY_VALUES = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}

DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(UNet2DConditionModel)
    if field.name not in ("dtype", "remat", "attend", "parent", "name")
}


def from_config(
    config: Mapping,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    attend: Callable = kernels.attend,
) -> UNet2DConditionModel:
    """The UNet that a diffusers unet/config.json describes; missing keys take diffusers' defaults.

    Raises UserError for a value that is not implemented.
    """
    if remat not in REMAT:
        raise UserError(f"remat {remat!r} is not one of {', '.join(REMAT)}")
    fields = dict(DEFAULTS)
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in ONLY_VALUES and value not in ONLY_VALUES[key]:
            allowed = " or ".join(repr(allowed) for allowed in ONLY_VALUES[key])
            raise UserError(f"UNet config: {key} is {value!r}; only {allowed} is supported")
        if key in DEFAULTS:
            fields[key] = value
        elif key not in ONLY_VALUES and key not in INERT_KEYS and not key.startswith("_"):
            raise UserError(f"UNet config: unknown key {key!r} (value {value!r}); remove it")
    fields["cross_attention_dim"] = one_width(fields["cross_attention_dim"])
    check_levels(fields)
    check_divisible(fields)
    check_addition(fields)
    return UNet2DConditionModel(**fields, dtype=dtype, remat=remat, attend=attend)


def one_width(cross_attention_dim: int | tuple[int, ...]) -> int:
    """The text's width, from a number or from equal numbers per level."""
    widths = set(per_level(cross_attention_dim, 1))
    if len(widths) != 1:
        raise UserError(
            f"UNet config: cross_attention_dim is {cross_attention_dim}; "
            "only one width for all levels is supported"
        )
    return widths.pop()


def check_levels(fields: Mapping) -> None:
    """Refuse unknown block types and lists that do not have one number per level."""
    num_levels = len(fields["block_out_channels"])
    kinds = {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS}
    for key, value in fields.items():
        if not isinstance(value, tuple):
            continue
        if len(value) != num_levels:
            raise UserError(
                f"UNet config: {key} has {len(value)} entries and block_out_channels {num_levels}; "
                "give one per level"
            )
        for entry in value:
            if key in kinds and entry not in kinds[key]:
                known = " or ".join(kinds[key])
                raise UserError(f"UNet config: {key} has {entry!r}; only {known} is supported")
            if key not in kinds and not isinstance(entry, int):
                raise UserError(f"UNet config: {key} has {entry!r}; only integers are supported")


def check_divisible(fields: Mapping) -> None:
    """Refuse channels that the heads or the groups of the norms do not divide."""
    if fields["norm_num_groups"] is None:
        raise UserError("UNet config: norm_num_groups is None; only a number is supported")
    heads = per_level(fields["attention_head_dim"], len(fields["block_out_channels"]))
    for channels, num_heads in zip(fields["block_out_channels"], heads, strict=True):
        for key, divisor in (
            ("attention_head_dim (the number of heads)", num_heads),
            ("norm_num_groups", fields["norm_num_groups"]),
        ):
            if channels % divisor:
                raise UserError(
                    f"UNet config: {channels} channels are not a multiple of {key} {divisor}"
                )


def check_addition(fields: Mapping) -> None:
    """Refuse a "text_time" without its two widths, or with no room for the pooled text."""
    if fields["addition_embed_type"] is None:
        return
    width = fields["projection_class_embeddings_input_dim"]
    sinusoid_dim = fields["addition_time_embed_dim"]
    if not (width and sinusoid_dim) or width <= NUM_TIME_IDS * sinusoid_dim:
        raise UserError(
            f"UNet config: projection_class_embeddings_input_dim is {width} and "
            f"addition_time_embed_dim {sinusoid_dim}; text_time needs the first to be "
            f"{NUM_TIME_IDS} times the second and the pooled text's width"
        )
