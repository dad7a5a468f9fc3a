"""Attention: as XLA computes it, or, where it is large, by a kernel made for a kind of chip."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Of queries; for fewer, weights are small and XLA's way is as good.
_LARGE = 1024
# Of queries or keys that the TPU's kernel takes at a time, the first that divides all.
_BLOCKS = (1024, 768, 512, 384, 256, 128)
# Numbers in a row of a TPU's registers.
_LANES = 128


def attend(
    query: Float[Array, "B Q N D"], key: Float[Array, "B K N D"], value: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """softmax(query key^T / sqrt(D)) value, for each of N heads; logits and softmax in float32.

    The one place where attention is computed: a kernel replaces this function alone. Divided by the
    sum last, [Q, D] numbers instead of [Q, K], which is faster on a CPU, backwards too (LOG.md).
    """
    logits = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * (1 / math.sqrt(query.shape[-1]))
    # The largest cancels out, so nothing need be differentiated through it.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    mixed = jnp.einsum(
        "bnqk,bknd->bqnd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    total = jnp.einsum("bnqk->bqn", weights)[..., None]
    return (mixed / total).astype(value.dtype)


def flash(
    query: Float[Array, "B Q N D"], key: Float[Array, "B K N D"], value: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """`attend` on TPUs, the weights never leaving the chip: flash attention, arXiv 2205.14135.

    JAX's splash attention with nothing masked, which moves a third of what its older kernel does
    (LOG.md).
    """
    # Imported here, since it takes as long as a small program's start, and few need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (queries, heads, depth), keys = query.shape[1:], key.shape[1]
    filled = keys + -keys % _LANES
    by_query, by_key = _block(queries), _block(filled)
    if queries < _LARGE or not by_query or (depth > _LANES and depth % _LANES):
        return attend(query, key, value)
    # Backwards in one kernel: weights are computed again once instead of twice.
    sizes = splash.BlockSizes(
        by_query, by_key, by_key, by_query, by_key, by_key, use_fused_bwd_kernel=True
    )
    everything = splash.MultiHeadMask([splash.FullMask((queries, filled))] * heads)
    kernel = splash.make_splash_mha_single_device(everything, block_sizes=sizes)
    parts = None
    if filled > keys:  # as of a prompt, which has 77
        added = (np.arange(filled) >= keys).astype(np.int32)
        parts = splash.SegmentIds(np.zeros(queries, np.int32), added)
        key, value = _filled(key, value, _LANES)

    scaled = query * jnp.asarray(1 / math.sqrt(depth), query.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled, key, value))
    mixed = jax.vmap(lambda *example: kernel(*example, parts))(*heads_first)
    return jnp.swapaxes(mixed, 1, 2)


def _block(length: int) -> int:
    """How many of so many queries or keys a TPU's kernel takes at a time; 0 if there is no way."""
    return next((size for size in _BLOCKS if length % size == 0), 0)


def _filled(key: jax.Array, value: jax.Array, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, K, N, D] with zeros up to a multiple; they must be told not to count."""
    missing = -key.shape[1] % multiple
    return tuple(jnp.pad(each, ((0, 0), (0, missing), (0, 0), (0, 0))) for each in (key, value))


def cudnn(
    query: Float[Array, "B Q N D"], key: Float[Array, "B K N D"], value: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """`attend` on NVIDIA GPUs from Ampere on, by cuDNN: 16-bit numbers and heads of up to 128 only.

    Others, such as the 160 of SD 1.x's coarsest level, are few and computed by `attend`.
    """
    depth = query.shape[-1]
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and depth <= 128 and depth % 8 == 0
    if query.shape[1] < _LARGE or not fits:
        return attend(query, key, value)
    batch, keys = key.shape[:2]
    if keys % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    # JAX takes gradients for an even number of keys only, and prompts have 77 tokens: it is told
    # how many count of a few more.
    key, value = _filled(key, value, 8)
    lengths = jnp.full(batch, keys, jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )


# As a config names them.
BY_NAME = {"xla": attend, "flash": flash, "cudnn": cudnn}


def by_name(name: str, on_own_examples: Callable[[Callable], Callable]) -> Callable:
    """One of BY_NAME; of a kernel, which XLA cannot cut, what on_own_examples makes of it.

    on_own_examples: of a function of arrays [B, ...] that lie on many devices, makes one that each
    of them calls on its own part.
    """
    return attend if name == "xla" else on_own_examples(BY_NAME[name])
