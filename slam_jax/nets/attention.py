"""The transformer that Stable Diffusion's UNet puts after a residual block."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from slam_jax.nets import kernels, layers


class Attention(nn.Module):
    """Multi-head attention from x to `context`; queries, keys and values without bias."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    attend: Callable = kernels.attend

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q C"], context: Float[Array, "B K _"]
    ) -> Float[Array, "B Q C"]:
        channels = x.shape[-1]

        def heads(inputs, name):
            y = layers.dense(channels, self.dtype, name, use_bias=False)(inputs)
            return y.reshape(*y.shape[:2], self.num_heads, channels // self.num_heads)

        y = self.attend(heads(x, "to_q"), heads(context, "to_k"), heads(context, "to_v"))
        return layers.dense(channels, self.dtype, "to_out.0")(y.reshape(x.shape))


class FeedForward(nn.Module):
    """GEGLU: four times wider, half of it gated by the exact (erf) gelu of the other half."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        channels = x.shape[-1]
        y = layers.dense(8 * channels, self.dtype, "net.0.proj")(x)
        hidden, gate = jnp.split(y, 2, axis=-1)
        y = hidden * nn.gelu(gate, approximate=False)
        return layers.dense(channels, self.dtype, "net.2")(y)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each after a LayerNorm."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    attend: Callable = kernels.attend

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q C"], text: Float[Array, "B L D"]
    ) -> Float[Array, "B Q C"]:
        h = layers.layer_norm(1e-5, self.dtype, "norm1")(x)
        x = x + Attention(self.num_heads, self.dtype, self.attend, name="attn1")(h, h)
        h = layers.layer_norm(1e-5, self.dtype, "norm2")(x)
        x = x + Attention(self.num_heads, self.dtype, self.attend, name="attn2")(h, text)
        h = layers.layer_norm(1e-5, self.dtype, "norm3")(x)
        return x + FeedForward(self.dtype, name="ff")(h)


class Transformer2DModel(nn.Module):
    """norm, projection in, transformer blocks over the pixels, projection out, plus the input.

    use_linear_projection: the projections are Dense (SD 2.x) or 1x1 convolutions (SD 1.x), one
    and the same map stored in two shapes.
    """

    num_heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool
    dtype: DTypeLike = jnp.float32
    attend: Callable = kernels.attend

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], text: Float[Array, "B L D"]
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        h = layers.group_norm(self.num_groups, 1e-6, self.dtype, "norm")(x)
        h = self.project(h, "proj_in").reshape(batch, height * width, channels)
        for i in range(self.num_layers):
            block = BasicTransformerBlock(
                self.num_heads, self.dtype, self.attend, name=f"transformer_blocks.{i}"
            )
            h = block(h, text)
        return x + self.project(h.reshape(x.shape), "proj_out")

    def project(self, x: Float[Array, "B H W C"], name: str) -> Float[Array, "B H W C"]:
        """The pointwise map called `name`, as wide as its input."""
        if self.use_linear_projection:
            return layers.dense(x.shape[-1], self.dtype, name)(x)
        return layers.conv1x1(x.shape[-1], self.dtype, name)(x)
