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
PROJECTED = "CLIPTextModelWithProjection"


def torch_model(config: dict) -> transformers.CLIPTextModel:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, **SPECIAL)).eval()


def torch_projected(config: dict) -> transformers.CLIPTextModelWithProjection:
    config = transformers.CLIPTextConfig(**{**SPECIAL, **config})
    return transformers.CLIPTextModelWithProjection(config).eval()


def file_config(model: transformers.PreTrainedModel) -> dict:
    """The config as save_pretrained writes it."""
    return {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}


def torch_names(model: transformers.PreTrainedModel) -> dict:
    """State dict under the hub's names: transformers 5 leaves out `text_model.`."""
    if isinstance(model, transformers.CLIPTextModelWithProjection):
        return model.state_dict()
    return {f"text_model.{name}": tensor for name, tensor in model.state_dict().items()}


def torch_name(path) -> tuple[str, str]:
    *modules, leaf = (key.key for key in path)
    torch_leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return ".".join([*modules, torch_leaf]), leaf


def shapes_of(module: clip.CLIPTextModel, length: int) -> dict:
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def randomised(model: transformers.PreTrainedModel):
    """Torch model with normal weights, norms and biases too, and the same as a Flax tree."""
    torch.manual_seed(1)
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
    model, module, params = randomised(torch_model(config))
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


def sdxl_prompts(vocab_size: int) -> np.ndarray:
    """Start, text, end, then padding as SDXL's two tokenizers do it: the end again, or "!" (0)."""
    rng, end = np.random.default_rng(0), vocab_size - 1
    ids = rng.integers(3, end, (4, 11), dtype=np.int32)
    for row, (length, pad) in zip(ids, ((1, end), (5, end), (1, 0), (7, 0)), strict=True):
        row[length], row[length + 1 :] = end, pad
    return ids


@pytest.mark.parametrize("eos_token_id", [2, SD2["vocab_size"] - 1])
def test_sdxls_states_match_torch(eos_token_id):
    config = {**SD2, "projection_dim": 7, "eos_token_id": eos_token_id}
    model, module, params = randomised(torch_projected(config))
    ids = sdxl_prompts(config["vocab_size"])
    if eos_token_id != 2:
        ids[0, 4] = 2  # nothing special
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    states = jax.jit(lambda p, ids: module.apply({"params": p}, ids, method="states"))(params, ids)
    for ours, reference in (
        (states.pooled, theirs.text_embeds),
        (states.penultimate, theirs.hidden_states[-2]),
        (states.last, theirs.last_hidden_state),
    ):
        assert relative_error(np.asarray(ours), reference.numpy()) <= 1e-5


def test_penultimate_state_of_a_plain_encoder_matches_torch_and_costs_a_layer_less():
    model, module, params = randomised(torch_model(SD1))
    ids = np.random.default_rng(0).integers(0, SD1["vocab_size"], (3, 13), dtype=np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states[-2]

    def compiled(read):
        call = lambda p, ids: read(module.apply({"params": p}, ids, method="states"))  # noqa: E731
        return jax.jit(call).lower(params, ids).compile()

    penultimate, last = compiled(lambda s: s.penultimate), compiled(lambda s: s.last)
    assert relative_error(np.asarray(penultimate(params, ids)), theirs.numpy()) <= 1e-5
    assert penultimate.cost_analysis()["flops"] < 0.55 * last.cost_analysis()["flops"]


OPENCLIP_G = dict(
    vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
    num_attention_heads=20, max_position_embeddings=77, hidden_act="gelu", projection_dim=1280,
)  # fmt: skip


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
        OPENCLIP_G,
    ],
    ids=["vit-l of sd1.5 and sdxl", "openclip-h of sd2", "openclip-g of sdxl"],
)  # fmt: skip
def test_real_sizes_have_the_torch_names_and_shapes(config):
    with torch.device("meta"):
        model = torch_projected(config) if config is OPENCLIP_G else torch_model(config)
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
        ("architectures", ["T5EncoderModel"]),
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


@pytest.mark.parametrize("key, value", [("projection_dim", None), ("eos_token_id", [1, 2])])
def test_a_projection_needs_its_numbers(key, value):
    config = {**SD1, "layer_norm_eps": 1e-5, "projection_dim": 8, "architectures": [PROJECTED]}
    with pytest.raises(errors.UserError) as caught:
        clip.from_config({**config, key: value})
    assert f"{key} {value}" in str(caught.value)


def test_more_tokens_than_positions_are_refused():
    module = clip.from_config({**SD1, "layer_norm_eps": 1e-5})
    with pytest.raises(errors.UserError, match="max_position_embeddings 13"):
        shapes_of(module, 14)
