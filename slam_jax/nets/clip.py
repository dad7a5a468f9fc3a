"""CLIP's text encoder: Stable Diffusion 1.x's ViT-L, 2.x's OpenCLIP-H, SDXL's ViT-L and OpenCLIP-G.

Submodules carry the names of the hub's text_encoder files, `text_model.` included
(weights/names.py).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

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


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}

_READ = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "layer_norm_eps",
)  # fmt: skip

# What a config.json may also hold and what then must stand there; any value of the inert ones.
_REQUIRED_VALUES = {
    "model_type": "clip_text_model",
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
_ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")
# What transformers takes for a config.json without the key.
_EOS_TOKEN_ID = 49407
_INERT = {
    # where the text ends and the projection matter to a CLIPTextModelWithProjection alone
    "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim",
    # training and bookkeeping
    "attention_dropout", "dropout", "initializer_factor", "initializer_range", "torch_dtype",
    "dtype",
    "transformers_version", "return_dict", "output_hidden_states", "output_attentions",
    "gradient_checkpointing", "use_cache", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "is_encoder_decoder",
}  # fmt: skip


class CLIPAttention(nn.Module):
    """Multi-head self-attention, softmax in float32; without mask every token sees all."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: shapes.Text, mask: Bool[Array, "1 1 L L"] | None) -> shapes.Text:
        batch, length, width = x.shape
        split = (batch, length, self.num_heads, width // self.num_heads)
        query = layers.Dense(width, dtype=self.dtype, name="q_proj")(x).reshape(split)
        key = layers.Dense(width, dtype=self.dtype, name="k_proj")(x).reshape(split)
        value = layers.Dense(width, dtype=self.dtype, name="v_proj")(x).reshape(split)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * split[-1] ** -0.5, key)
        logits = logits.astype(jnp.float32)
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        weights = nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return layers.Dense(width, dtype=self.dtype, name="out_proj")(mixed)


class CLIPMLP(nn.Module):
    """Two dense layers with the activation between."""

    intermediate_size: int
    activation: Callable
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: shapes.Text) -> shapes.Text:
        h = self.activation(layers.Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x))
        return layers.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    num_heads: int
    intermediate_size: int
    activation: Callable
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: shapes.Text, mask: Bool[Array, "1 1 L L"] | None) -> shapes.Text:
        h = layers.layer_norm(self.epsilon, self.dtype, "layer_norm1")(x)
        x = x + CLIPAttention(self.num_heads, self.dtype, name="self_attn")(h, mask)
        h = layers.layer_norm(self.epsilon, self.dtype, "layer_norm2")(x)
        return x + CLIPMLP(self.intermediate_size, self.activation, self.dtype, name="mlp")(h)


class TextStates(NamedTuple):
    """What Stable Diffusion reads of the encoder; what a jitted caller leaves is not computed."""

    last: shapes.Text  # after the final layer norm
    penultimate: shapes.Text  # hidden_states[-2] of transformers: into the last layer, no norm
    pooled: Float[Array, "B P"] | None  # None without projection


class CLIPTextModel(nn.Module):
    """Causal transformer over token ids; fields are the keys of transformers' CLIPTextConfig.

    projection_dim is that of a CLIPTextModelWithProjection, None in a plain CLIPTextModel;
    eos_token_id matters to the former alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    activation: Callable = quick_gelu
    projection_dim: int | None = None
    eos_token_id: int = _EOS_TOKEN_ID
    dtype: DTypeLike = jnp.float32

    def __call__(self, input_ids: shapes.TokenIds) -> shapes.Text:
        """Last hidden state after the final layer norm. UserError above max_position_embeddings."""
        return self.states(input_ids).last

    @nn.compact
    def states(self, input_ids: shapes.TokenIds) -> TextStates:
        """Last, penultimate and pooled state. UserError above max_position_embeddings."""
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
            penultimate = x
            x = CLIPEncoderLayer(
                num_heads=self.num_attention_heads,
                intermediate_size=self.intermediate_size,
                activation=self.activation,
                epsilon=self.layer_norm_eps,
                dtype=self.dtype,
                name=f"text_model.encoder.layers.{i}",
            )(x, mask)
        norm = layers.layer_norm(self.layer_norm_eps, self.dtype, "text_model.final_layer_norm")
        last = norm(x)
        return TextStates(last, penultimate, self._pooled(last, input_ids))

    def _pooled(self, last: shapes.Text, input_ids: shapes.TokenIds) -> Float[Array, "B P"] | None:
        """The projected state at the end of the text."""
        if self.projection_dim is None:
            return None
        # As in transformers: 2 stands in all configs older than its pull request 24773, SDXL's
        # among them, and is not the id of the end, which is the vocabulary's last.
        is_end = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        end = jnp.argmax(is_end, axis=-1)[:, None, None]
        state = jnp.take_along_axis(last, end, axis=1)[:, 0]
        projection = layers.Dense(
            self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
        )
        return projection(state)

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
        activation=ACTIVATIONS[config["hidden_act"]],
        **_projection(config),
        dtype=dtype,
    )


def _projection(config: Mapping) -> dict[str, int]:
    """The fields that only a CLIPTextModelWithProjection has."""
    if config.get("architectures") != ["CLIPTextModelWithProjection"]:
        return {}
    found = {"eos_token_id": _EOS_TOKEN_ID, "projection_dim": None, **config}
    fields = {key: found[key] for key in ("projection_dim", "eos_token_id")}
    for key, value in fields.items():
        if not isinstance(value, int):
            raise errors.UserError(
                f"text encoder {key} {value!r} must be a number in a CLIPTextModelWithProjection; "
                "correct its config.json"
            )
    return fields


def _refuse_unbuilt(key: str, value) -> None:
    if key == "architectures" and value not in (None, *([name] for name in _ARCHITECTURES)):
        raise errors.UserError(
            f"text encoder architectures {value!r} is not supported; it may be "
            + " or ".join(_ARCHITECTURES)
        )
    if key == "hidden_act" and value not in ACTIVATIONS:
        raise errors.UserError(
            f"text encoder hidden_act {value!r} is not supported; it may be "
            + " or ".join(map(repr, ACTIVATIONS))
        )
    if key in _REQUIRED_VALUES and value not in (_REQUIRED_VALUES[key], None):
        raise errors.UserError(
            f"text encoder {key} {value!r} is not supported; it must be {_REQUIRED_VALUES[key]!r}"
        )
    if key not in (*_READ, "hidden_act", "architectures", *_REQUIRED_VALUES, *_INERT):
        raise errors.UserError(
            f"text encoder config has the unknown key {key} = {value!r}; "
            "remove it if it does not change the network"
        )
