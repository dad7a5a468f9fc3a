"""CLIP text encoder against transformers' torch class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from slam_jax import errors
from slam_jax.nets import clip

SD1 = dict(
    vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=13, hidden_act="quick_gelu",
)  # fmt: skip
SD2 = dict(
    vocab_size=53, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=3, max_position_embeddings=11, hidden_act="gelu", layer_norm_eps=1e-4,
)  # fmt: skip
SPECIAL = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)


def torch_model(config: dict) -> transformers.CLIPTextModel:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, **SPECIAL)).eval()


def file_config(model: transformers.CLIPTextModel) -> dict:
    """The config as save_pretrained writes it."""
    return {**model.config.to_diff_dict(), "architectures": ["CLIPTextModel"]}


def torch_names(model: transformers.CLIPTextModel) -> dict:
    """State dict under the hub's names: transformers 5 leaves out `text_model.`."""
    return {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in model.state_dict().items()
    }


def torch_name(path) -> tuple[str, str]:
    *modules, leaf = (key.key for key in path)
    torch_leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return ".".join([*modules, torch_leaf]), leaf


def shapes_of(module: clip.CLIPTextModel, length: int) -> dict:
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def randomised(config: dict, seed: int):
    """Torch model with normal weights, norms and biases too, and the same as a Flax tree."""
    torch.manual_seed(seed)
    model = torch_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    tensors = {name: t.numpy() for name, t in torch_names(model).items()}
    module = clip.from_config(file_config(model))

    def pick(path, shape):
        name, leaf = torch_name(path)
        return jnp.asarray(tensors[name].T if leaf == "kernel" else tensors[name])

    return model, module, jax.tree_util.tree_map_with_path(pick, shapes_of(module, 4))


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_matches_torch(config):
    model, module, params = randomised(config, seed=1)
    length = config["max_position_embeddings"]
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (3, length), dtype=np.int32)
    with torch.no_grad():
        reference = model(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    apply = jax.jit(module.apply)
    out = apply({"params": params}, jnp.asarray(ids))
    assert relative_error(np.asarray(out), reference) <= 1e-5

    # causal: a later token cannot move an earlier state, the last token must move its own
    changed = ids.copy()
    changed[:, -1] = (changed[:, -1] + 1) % config["vocab_size"]
    moved = np.asarray(apply({"params": params}, jnp.asarray(changed))) - np.asarray(out)
    assert np.all(moved[:, :-1] == 0) and np.all(np.abs(moved[:, -1]).max(axis=-1) > 1e-3)


@pytest.mark.parametrize(
    "config",
    [
        dict(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
        ),
        dict(
            vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
            num_attention_heads=16, max_position_embeddings=77, hidden_act="gelu",
        ),
    ],
    ids=["vit-l of sd1.5", "openclip-h of sd2"],
)  # fmt: skip
def test_real_sizes_have_the_torch_names_and_shapes(config):
    with torch.device("meta"):
        model = torch_model(config)
    expected = {name: tuple(t.shape) for name, t in torch_names(model).items()}
    ours = {}
    leaves = jax.tree_util.tree_leaves_with_path(
        shapes_of(clip.from_config(file_config(model)), 77)
    )
    for path, leaf in leaves:
        name, kind = torch_name(path)
        ours[name] = leaf.shape[::-1] if kind == "kernel" else leaf.shape
        assert leaf.dtype == jnp.float32
    assert len(ours) == len(leaves) and ours == expected


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    module = clip.from_config({**SD1, "layer_norm_eps": 1e-5}, dtype=jnp.bfloat16)
    ids = jnp.zeros((1, 5), jnp.int32)
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), ids)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "relu"),
        ("architectures", ["CLIPTextModelWithProjection"]),
        ("model_type", "t5"),
        ("relative_attention", True),
        ("num_attention_heads", 5),
    ],
)
def test_a_config_that_is_not_built_is_refused(key, value):
    with pytest.raises(errors.UserError) as caught:
        clip.from_config({**SD1, "layer_norm_eps": 1e-5, key: value})
    assert key in str(caught.value) and str(value) in str(caught.value)


def test_a_config_without_a_needed_key_is_refused():
    config = {k: v for k, v in SD1.items() if k != "hidden_size"}
    with pytest.raises(errors.UserError, match="lacks hidden_size"):
        clip.from_config({**config, "layer_norm_eps": 1e-5})


def test_more_tokens_than_positions_are_refused():
    module = clip.from_config({**SD1, "layer_norm_eps": 1e-5})
    with pytest.raises(errors.UserError, match="max_position_embeddings 13"):
        shapes_of(module, 14)
