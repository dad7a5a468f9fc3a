"""Names and axes, against torch's own layers holding the same numbers."""

import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slam_jax.errors import UserError
from slam_jax.weights import names, tensorfile, translate


class Toy(nn.Module):
    """One of each kind of layer, names with dots among them."""

    @nn.compact
    def __call__(self, ids, x):
        h = nn.Embed(7, 6, name="embeddings.token")(ids)
        h = nn.LayerNorm(name="norm")(nn.Dense(5, name="mlp.0")(h))
        x = nn.Conv(4, (3, 2), padding="VALID", name="conv")(x)
        return h, nn.GroupNorm(2, name="group")(x)


def torch_toy() -> torch.nn.Module:
    toy = torch.nn.Module()
    toy.embeddings = torch.nn.ModuleDict({"token": torch.nn.Embedding(7, 6)})
    toy.mlp = torch.nn.ModuleList([torch.nn.Linear(6, 5)])
    toy.norm = torch.nn.LayerNorm(5, eps=1e-6)
    toy.conv = torch.nn.Conv2d(3, 4, (3, 2))
    toy.group = torch.nn.GroupNorm(2, 4, eps=1e-6)
    for parameter in toy.parameters():
        torch.nn.init.normal_(parameter)
    return toy


IDS, X = np.array([[1, 6, 0]]), np.random.default_rng(0).standard_normal((1, 6, 5, 3), np.float32)
SHAPES = jax.eval_shape(Toy().init, jax.random.key(0), IDS, X)["params"]


def tensors() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    return {name: tensor.numpy() for name, tensor in torch_toy().state_dict().items()}


def test_same_outputs_as_torch():
    torch.manual_seed(0)
    toy = torch_toy()
    with torch.no_grad():
        h = toy.norm(toy.mlp[0](toy.embeddings["token"](torch.tensor(IDS))))
        x = toy.group(toy.conv(torch.tensor(X).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    params = translate.to_params(tensors(), SHAPES, "toy.safetensors")
    ours = jax.jit(Toy().apply)({"params": params}, IDS, X)
    np.testing.assert_allclose(ours[0], h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], x, rtol=1e-5, atol=1e-5)


def test_round_trip_is_the_identity():
    before = tensors()
    params = translate.to_params(before, SHAPES, "toy.safetensors")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, SHAPES)
    for after in (
        translate.to_tensors(params),
        translate.to_tensors(jax.tree.map(jnp.asarray, params)),
    ):
        assert after.keys() == before.keys()
        for name in before:
            np.testing.assert_array_equal(after[name], before[name])


def test_parameters_are_own_copies_of_the_asked_dtype():
    before = tensors()
    for dtype in (np.float16, np.float32, None):
        params = translate.to_params(before, SHAPES, "toy.safetensors", dtype=dtype)
        for leaf in jax.tree.leaves(params):
            assert leaf.dtype == (dtype or np.float32)
            assert leaf.flags.c_contiguous
            assert not any(np.shares_memory(leaf, tensor) for tensor in before.values())


def changed(**changes) -> dict[str, np.ndarray]:
    after = {**tensors(), **changes}
    return {name: tensor for name, tensor in after.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv.weight": None}, "toy.safetensors lacks tensor 'conv.weight';"),
        (
            {"norm.bias": None, "conv.bias": None},
            r"toy.safetensors lacks tensor 'conv.bias' \(and 1 more\);",
        ),
        ({"conv.extra": np.ones(2)}, "toy.safetensors: tensor 'conv.extra' is unknown;"),
        (
            {"conv.weight": np.ones((3, 4, 3, 2))},
            r"toy.safetensors: tensor 'conv.weight' has shape \[3, 4, 3, 2\], "
            r"config.json asks for \[4, 3, 3, 2\]",
        ),
        # As many numbers, the wrong way round.
        ({"mlp.0.weight": np.ones((6, 5))}, r"'mlp.0.weight' has shape \[6, 5\], .* \[5, 6\]"),
        ({"mlp.0.weight": np.ones((5, 6, 1, 1))}, r"'mlp.0.weight' has shape \[5, 6, 1, 1\]"),
    ],
)
def test_unknown_missing_and_misshapen_tensors_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        translate.to_params(changed(**changes), SHAPES, "toy.safetensors")


def test_reading_holds_the_parameters_and_one_tensor(tmp_path):
    shapes = {f"{i}": {"kernel": jax.ShapeDtypeStruct((400, 500), np.float32)} for i in range(20)}
    zeros = {f"{i}.weight": np.zeros((500, 400), np.float32) for i in range(20)}
    tensorfile.write(tmp_path / "file", zeros)
    size = zeros["0.weight"].nbytes
    del zeros
    tracemalloc.start()
    stored = tensorfile.read(tmp_path / "file")
    params = translate.to_params(stored, shapes, "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(params) == 20
    assert 20 * size < peak < 23 * size


def test_old_and_new_spellings():
    attention = "encoder.mid_block.attentions.0"
    assert names.vae(f"{attention}.query.weight") == f"{attention}.to_q.weight"
    assert names.vae(f"{attention}.key.bias") == f"{attention}.to_k.bias"
    assert names.vae(f"{attention}.value.bias") == f"{attention}.to_v.bias"
    assert names.vae(f"{attention}.proj_attn.weight") == f"{attention}.to_out.0.weight"
    assert names.vae(f"{attention}.to_q.weight") == f"{attention}.to_q.weight"
    assert names.vae(f"{attention}.group_norm.weight") == f"{attention}.group_norm.weight"
    for prefix in ("", "text_model."):
        assert names.text_encoder(prefix + "a.weight") == "text_model.a.weight"
        assert names.text_encoder(prefix + "embeddings.position_ids") is None
    assert names.is_vae_attention(f"{attention}.to_out.0.weight")
    assert not names.is_vae_attention("down_blocks.0.attentions.0.proj_in.weight")
    assert not names.is_vae_attention(f"{attention}.to_q.bias")
