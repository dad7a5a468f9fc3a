"""CLIP's text encoder, as Stable Diffusion 1.x (ViT-L) and 2.x (OpenCLIP-H) use it.

Submodules carry the names of the hub's text_encoder files, `text_model.` included
(weights/names.py).
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from slam_jax import errors, shapes
from slam_jax.nets import layers


def quick_gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """OpenAI CLIP's approximation, x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The exact, erf form, as torch's default."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}

_READ = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "layer_norm_eps",
)  # fmt: skip

# What a config.json may also hold and what then must stand there; any value of the inert ones.
_REQUIRED_VALUES = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
_INERT = {
    # token ids and the projection feed only the pooled output, which Stable Diffusion never reads
    "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim",
    # training and bookkeeping
    "attention_dropout", "dropout", "initializer_factor", "initializer_range", "torch_dtype",
    "dtype",
    "transformers_version", "return_dict", "output_hidden_states", "output_attentions",
    "gradient_checkpointing", "use_cache", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "is_encoder_decoder",
}  # fmt: skip


class CLIPAttention(nn.Module):
    """Masked multi-head self-attention, softmax in float32."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: shapes.Text, mask: Bool[Array, "1 1 L L"]) -> shapes.Text:
        batch, length, width = x.shape
        split = (batch, length, self.num_heads, width // self.num_heads)
        query = nn.Dense(width, dtype=self.dtype, name="q_proj")(x).reshape(split)
        key = nn.Dense(width, dtype=self.dtype, name="k_proj")(x).reshape(split)
        value = nn.Dense(width, dtype=self.dtype, name="v_proj")(x).reshape(split)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * split[-1] ** -0.5, key)
        logits = jnp.where(mask, logits.astype(jnp.float32), -jnp.inf)
        weights = nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(mixed)


class CLIPMLP(nn.Module):
    """Two dense layers with the activation between."""

    intermediate_size: int
    activation: Callable
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: shapes.Text) -> shapes.Text:
        h = self.activation(nn.Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    num_heads: int
    intermediate_size: int
    activation: Callable
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: shapes.Text, mask: Bool[Array, "1 1 L L"]) -> shapes.Text:
        h = layers.layer_norm(self.epsilon, self.dtype, "layer_norm1")(x)
        x = x + CLIPAttention(self.num_heads, self.dtype, name="self_attn")(h, mask)
        h = layers.layer_norm(self.epsilon, self.dtype, "layer_norm2")(x)
        return x + CLIPMLP(self.intermediate_size, self.activation, self.dtype, name="mlp")(h)


class CLIPTextModel(nn.Module):
    """Causal transformer over token ids; fields are the keys of transformers' CLIPTextConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    activation: Callable = quick_gelu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, input_ids: shapes.TokenIds) -> shapes.Text:
        """Last hidden state after the final layer norm. UserError above max_position_embeddings."""
        length = input_ids.shape[1]
        if length > self.max_position_embeddings:
            raise errors.UserError(
                f"{length} tokens per prompt, but the text encoder has max_position_embeddings "
                f"{self.max_position_embeddings}; set the tokenizer's model_max_length to it"
            )
        x = self._embedding(self.vocab_size, "token_embedding")(input_ids)
        x = x + self._embedding(self.max_position_embeddings, "position_embedding")(
            jnp.arange(length)[None]
        )
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
        for i in range(self.num_hidden_layers):
            x = CLIPEncoderLayer(
                num_heads=self.num_attention_heads,
                intermediate_size=self.intermediate_size,
                activation=self.activation,
                epsilon=self.layer_norm_eps,
                dtype=self.dtype,
                name=f"text_model.encoder.layers.{i}",
            )(x, mask)
        return layers.layer_norm(self.layer_norm_eps, self.dtype, "text_model.final_layer_norm")(x)

    def _embedding(self, rows: int, name: str) -> nn.Embed:
        name = f"text_model.embeddings.{name}"
        return nn.Embed(rows, self.hidden_size, dtype=self.dtype, name=name)


def from_config(config: Mapping, *, dtype: DTypeLike = jnp.float32) -> CLIPTextModel:
    """The network that a text_encoder/config.json describes; UserError for what is not built."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    missing = [key for key in (*_READ, "hidden_act") if key not in config]
    if missing:
        raise errors.UserError(
            f"text encoder config lacks {', '.join(missing)}; "
            "give a CLIPTextModel's config.json, as in a Stable Diffusion folder's text_encoder"
        )
    for key, value in config.items():
        _refuse_unbuilt(key, value)
    if config["hidden_size"] % config["num_attention_heads"]:
        raise errors.UserError(
            f"text encoder hidden_size {config['hidden_size']} is not a multiple of "
            f"num_attention_heads {config['num_attention_heads']}; correct its config.json"
        )
    return CLIPTextModel(
        **{key: config[key] for key in _READ},
        activation=_ACTIVATIONS[config["hidden_act"]],
        dtype=dtype,
    )


def _refuse_unbuilt(key: str, value) -> None:
    if key == "architectures" and value == ["CLIPTextModelWithProjection"]:
        # SDXL's second encoder: its pooled, projected output has no place here yet.
        raise errors.UserError(
            "text encoder architectures ['CLIPTextModelWithProjection'] is an SDXL encoder; "
            "only Stable Diffusion 1.x and 2.x folders are supported"
        )
    if key == "hidden_act" and value not in _ACTIVATIONS:
        raise errors.UserError(
            f"text encoder hidden_act {value!r} is not supported; it may be "
            + " or ".join(map(repr, _ACTIVATIONS))
        )
    if key in _REQUIRED_VALUES and value not in (_REQUIRED_VALUES[key], None):
        raise errors.UserError(
            f"text encoder {key} {value!r} is not supported; it must be {_REQUIRED_VALUES[key]!r}"
        )
    if key not in (*_READ, "hidden_act", *_REQUIRED_VALUES, *_INERT):
        raise errors.UserError(
            f"text encoder config has the unknown key {key} = {value!r}; "
            "remove it if it does not change the network"
        )
