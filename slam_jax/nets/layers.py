"""Blocks that the UNet and the VAE share: residual block, down- and upsampling. NHWC.

Submodules carry diffusers' names, dots included, so a parameter's torch name is its
path joined with dots (weights/names.py).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def _taking(module: type[nn.Module]) -> type[nn.Module]:
    """A module that takes parameters that are there as they are.

    Linen traces the drawing of every parameter at every call, only to compare shapes: a quarter of
    the time that tracing a train step takes. They are compared where weights are read.
    """

    def param(self: nn.Module, name: str, init_fn: Callable, *arguments: Any) -> Any:
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return nn.Module.param(self, name, init_fn, *arguments)

    return type(module.__name__, (module,), {"param": param})


Conv, Dense, LayerNorm = map(_taking, (nn.Conv, nn.Dense, nn.LayerNorm))


@_taking
class GroupNorm(nn.Module):
    """GroupNorm as torch computes it: in float32, two-pass variance; the result is in `dtype`.

    Means are taken over the pixels first, then over a group's channels: XLA's CPU compiler adds
    whole rows so, and the VAE's encoder takes a quarter less time (LOG.md).
    """

    num_groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *_ C"]) -> Float[Array, "B *_ C"]:
        batch, *pixels, channels = x.shape
        width = channels // self.num_groups
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)

        def mean(values: Float[Array, "B L C"]) -> Float[Array, "B 1 C"]:
            of_groups = values.mean(1).reshape(batch, self.num_groups, width).mean(2)
            return jnp.repeat(of_groups, width, axis=1)[:, None]

        rows = x.astype(jnp.float32).reshape(batch, math.prod(pixels), channels)
        rows = rows - mean(rows)
        factor = jax.lax.rsqrt(mean(jnp.square(rows)) + self.epsilon) * scale[None, None]
        return (rows * factor + bias[None, None]).reshape(x.shape).astype(self.dtype)


def group_norm(num_groups: int, epsilon: float, dtype: DTypeLike, name: str) -> GroupNorm:
    """A GroupNorm of that name."""
    return GroupNorm(num_groups, epsilon, dtype, name=name)


def layer_norm(
    epsilon: float, dtype: DTypeLike, name: str
) -> Callable[[Float[Array, "B *_ C"]], Float[Array, "B *_ C"]]:
    """LayerNorm as torch computes it: in float32, two-pass variance; the result is in `dtype`."""
    norm = LayerNorm(epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
    return lambda x: norm(x.astype(jnp.float32)).astype(dtype)


def dense(channels: int, dtype: DTypeLike, name: str, use_bias: bool = True) -> nn.Dense:
    """Dense layer of [B, ..., C], multiplied as one matrix of rows [B ..., C].

    XLA's CPU compiler makes the gradient of [B, L, C] otherwise, which takes three times as long
    (LOG.md).
    """
    return Dense(channels, use_bias, dtype, dot_general=_rows_times, name=name)


def _rows_times(
    x: Float[Array, "B *_ C"], kernel: Float[Array, "C D"], dimensions: tuple, **options: Any
) -> Float[Array, "B *_ D"]:
    """jax.lax.dot_general as Linen's Dense calls it."""
    contract_last = (((1,), (0,)), ((), ()))
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())), dimensions
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, contract_last, **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[1])


def conv3x3(channels: int, dtype: DTypeLike, name: str, stride: int = 1) -> nn.Conv:
    """3x3 convolution padded by one pixel on every side."""
    return Conv(
        channels, (3, 3), strides=(stride, stride), padding=((1, 1), (1, 1)), dtype=dtype, name=name
    )


def conv1x1(channels: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """1x1 convolution."""
    return Conv(channels, (1, 1), padding="VALID", dtype=dtype, name=name)


class ResnetBlock2D(nn.Module):
    """norm-silu-conv twice, the time embedding added in between, plus the shortcut."""

    out_channels: int
    num_groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W _"], time_embedding: Float[Array, "B _"] | None = None
    ) -> Float[Array, "B H W _"]:
        h = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm1")(x))
        h = conv3x3(self.out_channels, self.dtype, "conv1")(h)
        if time_embedding is not None:
            shift = Dense(self.out_channels, dtype=self.dtype, name="time_emb_proj")(
                nn.silu(time_embedding)
            )
            h = h + shift[:, None, None, :]
        h = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm2")(h))
        h = conv3x3(self.out_channels, self.dtype, "conv2")(h)
        if x.shape[-1] != self.out_channels:
            x = conv1x1(self.out_channels, self.dtype, "conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """Halves height and width by a strided 3x3 convolution.

    padding: ((1, 1), (1, 1)) in the UNet, ((0, 1), (0, 1)) in the VAE's encoder.
    """

    channels: int
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B _ _ _"]:
        return Conv(
            self.channels, (3, 3), strides=(2, 2), padding=self.padding, dtype=self.dtype,
            name="conv",
        )(x)  # fmt: skip


class Upsample2D(nn.Module):
    """Nearest-neighbour resize, then convolution.

    size: height and width, each twice the input's (the default) or one less.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B _ _ _"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B _ _ _"]:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        # Row i comes from row i // 2: torch's rule too, for an even and for an odd size.
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]
        return conv3x3(self.channels, self.dtype, "conv")(x)
