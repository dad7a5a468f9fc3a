"""Embeddings of the numbers that a UNet is told: the time, gamma, an image's sizes. In float32."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from slam_jax.nets import layers
from slam_jax.shapes import SDXLText


def sinusoid_angles(
    timesteps: Real[Array, "B"], num_frequencies: int, freq_shift: int
) -> Float[Array, "B F"]:
    """t * 10000^(-i / (F - freq_shift)) in float32 for i = 0 ... F-1 (Vaswani et al. 2017).

    An angle of 1000 rad feels the last bit of its frequency, so the exponent is rounded to
    float32 as the checkpoints' training code rounded it.
    """
    index = np.arange(num_frequencies, dtype=np.float32)
    exponent = np.float32(-math.log(10000)) * index / np.float32(num_frequencies - freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    return timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]


def sinusoid(
    numbers: Real[Array, "B"], dim: int, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "B F"]:
    """Sines, then cosines, of every number's angles, float32; flipped: cosines first."""
    angles = sinusoid_angles(numbers, dim // 2, freq_shift)
    parts = (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class TimestepEmbedding(nn.Module):
    """Timestep (and condition) -> embedding, in float32 whatever the compute dtype of the rest.

    bfloat16 would turn 999 into 1000. The condition is the student's embedding of gamma.
    """

    sinusoid_dim: int
    embedding_dim: int
    flip_sin_to_cos: bool
    freq_shift: int
    time_cond_proj_dim: int | None

    @nn.compact
    def __call__(
        self, timesteps: Real[Array, "B"], condition: Float[Array, "B _"] | None
    ) -> Float[Array, "B _"]:
        x = sinusoid(timesteps, self.sinusoid_dim, self.flip_sin_to_cos, self.freq_shift)
        if self.time_cond_proj_dim is None:
            assert condition is None, "a timestep condition needs time_cond_proj_dim"
        else:
            # Without bias, so a condition of zeros is the same as none.
            if condition is None:
                condition = jnp.zeros((x.shape[0], self.time_cond_proj_dim), jnp.float32)
            assert condition.shape[-1] == self.time_cond_proj_dim, condition.shape
            cond_proj = layers.Dense(self.sinusoid_dim, use_bias=False, name="cond_proj")
            x = x + cond_proj(condition.astype(jnp.float32))
        x = nn.silu(layers.Dense(self.embedding_dim, name="linear_1")(x))
        return layers.Dense(self.embedding_dim, name="linear_2")(x)


class TextTimeEmbedding(nn.Module):
    """SDXL's pooled text and time_ids -> a term of its time embedding, in float32.

    diffusers' addition_embed_type "text_time". bfloat16 would turn a height of 1023 into 1024.
    """

    sinusoid_dim: int
    embedding_dim: int
    flip_sin_to_cos: bool
    freq_shift: int

    @nn.compact
    def __call__(self, text: SDXLText) -> Float[Array, "B _"]:
        numbers = text.time_ids.reshape(-1)
        sizes = sinusoid(numbers, self.sinusoid_dim, self.flip_sin_to_cos, self.freq_shift)
        sizes = sizes.reshape(text.time_ids.shape[0], -1)
        x = jnp.concatenate([text.pooled.astype(jnp.float32), sizes], axis=-1)
        x = nn.silu(layers.Dense(self.embedding_dim, name="linear_1")(x))
        return layers.Dense(self.embedding_dim, name="linear_2")(x)
