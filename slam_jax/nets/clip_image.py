"""CLIP's image tower: OpenAI's ViT-B/32 and L/14, OpenCLIP's H/14 and g/14 and their like.

Submodules carry the names of transformers' CLIPModel files, dots included (weights/names.py).
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from slam_jax import errors
from slam_jax.nets import clip, layers

_READ = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "layer_norm_eps", "projection_dim",
)  # fmt: skip


class _Embeddings(nn.Module):
    """Patches in rows from the top left, an embedding of their own before them, and positions."""

    width: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        side = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.width, side, strides=side, padding="VALID", use_bias=False, dtype=self.dtype,
            name="patch_embedding",
        )(pixels)  # fmt: skip
        patches = patches.reshape(len(pixels), -1, self.width)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))
        first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, self.width))
        x = jnp.concatenate([first, patches], axis=1)
        length = x.shape[1]
        positions = nn.Embed(length, self.width, dtype=self.dtype, name="position_embedding")
        return x + positions(jnp.arange(length)[None])


class CLIPImageModel(nn.Module):
    """Vision transformer and projection; fields are the keys of transformers' CLIPVisionConfig.

    But projection_dim: it is that of the CLIPModel as a whole.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    projection_dim: int
    activation: Callable = clip.quick_gelu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Embeddings, not normalized, of square pictures as data/clip_image.py prepares them.

        transformers' get_image_features. UserError unless H and W are image_size.
        """
        if pixels.shape[1:3] != (self.image_size, self.image_size):
            raise errors.UserError(
                f"pictures of {pixels.shape[1]} x {pixels.shape[2]} pixels, but the image tower "
                f"takes {self.image_size} x {self.image_size}; correct preprocessor_config.json"
            )
        name = "vision_model.embeddings"
        x = _Embeddings(self.hidden_size, self.patch_size, self.dtype, name=name)(pixels)
        x = self._norm("pre_layrnorm")(x)  # so it is spelt in the files
        for i in range(self.num_hidden_layers):
            x = clip.CLIPEncoderLayer(
                num_heads=self.num_attention_heads,
                intermediate_size=self.intermediate_size,
                activation=self.activation,
                epsilon=self.layer_norm_eps,
                dtype=self.dtype,
                name=f"vision_model.encoder.layers.{i}",
            )(x, None)
        pooled = self._norm("post_layernorm")(x[:, 0])
        projection = nn.Dense(
            self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection"
        )
        return projection(pooled)

    def _norm(self, name: str) -> Callable:
        return layers.layer_norm(self.layer_norm_eps, self.dtype, f"vision_model.{name}")


def from_config(config: Mapping, *, dtype: DTypeLike = jnp.float32) -> CLIPImageModel:
    """The tower that a CLIPVisionConfig describes, all its keys given; UserError if not built."""
    if config["hidden_act"] not in clip.ACTIVATIONS:
        raise errors.UserError(
            f"image tower hidden_act {config['hidden_act']!r} is not supported; it may be "
            + " or ".join(map(repr, clip.ACTIVATIONS))
        )
    if config["num_channels"] != 3:
        raise errors.UserError(
            f"image tower num_channels {config['num_channels']!r} is not supported; it must be 3"
        )
    for key, divisor in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if not isinstance(config[key], int) or config[key] % config[divisor]:
            raise errors.UserError(
                f"image tower {key} {config[key]!r} is no multiple of {divisor} "
                f"{config[divisor]}; correct its config.json"
            )
    return CLIPImageModel(
        **{key: config[key] for key in _READ},
        activation=clip.ACTIVATIONS[config["hidden_act"]],
        dtype=dtype,
    )
