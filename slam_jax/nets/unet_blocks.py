"""The three kinds of blocks that the UNet is made of: on the way down, in the middle, going up.

`resnet(channels, name=...)` and `transformer(num_heads, num_layers, name=...)` make their parts,
with all that the levels share already filled in.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from slam_jax.nets import layers


class Level(NamedTuple):
    """One resolution of the UNet. num_transformer_layers is 0 where there is no attention."""

    channels: int
    num_resnets: int
    num_heads: int
    num_transformer_layers: int


class DownBlock2D(nn.Module):
    """Residual blocks, each followed by a transformer where the level has attention.

    Returns its output and the skip of every residual block and of the downsampling.
    """

    level: Level
    downsample: bool
    resnet: Callable[..., nn.Module]
    transformer: Callable[..., nn.Module]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W _"],
        time_embedding: Float[Array, "B E"],
        text: Float[Array, "B L D"],
    ) -> tuple[Float[Array, "B _ _ _"], list[Float[Array, "B _ _ _"]]]:
        skips = []
        for i in range(self.level.num_resnets):
            x = self.resnet(self.level.channels, name=f"resnets.{i}")(x, time_embedding)
            if self.level.num_transformer_layers:
                x = self.transformer(
                    self.level.num_heads,
                    self.level.num_transformer_layers,
                    name=f"attentions.{i}",
                )(x, text)
            skips.append(x)
        if self.downsample:
            down = layers.Downsample2D(self.level.channels, dtype=self.dtype, name="downsamplers.0")
            x = down(x)
            skips.append(x)
        return x, skips


class MidBlock2D(nn.Module):
    """residual block, transformer, residual block."""

    level: Level
    resnet: Callable[..., nn.Module]
    transformer: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        time_embedding: Float[Array, "B E"],
        text: Float[Array, "B L D"],
    ) -> Float[Array, "B H W C"]:
        x = self.resnet(self.level.channels, name="resnets.0")(x, time_embedding)
        x = self.transformer(
            self.level.num_heads, self.level.num_transformer_layers, name="attentions.0"
        )(x, text)
        return self.resnet(self.level.channels, name="resnets.1")(x, time_embedding)


class UpBlock2D(nn.Module):
    """Residual blocks, each fed the last skip left, and transformers where the level has them.

    upsample_size: height and width of the next level's skips; None on the last level.
    """

    level: Level
    upsample_size: tuple[int, int] | None
    resnet: Callable[..., nn.Module]
    transformer: Callable[..., nn.Module]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W _"],
        skips: list[Float[Array, "B H W _"]],
        time_embedding: Float[Array, "B E"],
        text: Float[Array, "B L D"],
    ) -> Float[Array, "B _ _ _"]:
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = self.resnet(self.level.channels, name=f"resnets.{i}")(x, time_embedding)
            if self.level.num_transformer_layers:
                x = self.transformer(
                    self.level.num_heads,
                    self.level.num_transformer_layers,
                    name=f"attentions.{i}",
                )(x, text)
        if self.upsample_size is not None:
            up = layers.Upsample2D(self.level.channels, dtype=self.dtype, name="upsamplers.0")
            x = up(x, self.upsample_size)
        return x
