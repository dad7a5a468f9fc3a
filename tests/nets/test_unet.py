"""UNet against diffusers' torch class: outputs, names, shapes; time in float32; refusals."""

import collections

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import embeddings as torch_embeddings

from slam_jax import errors
from slam_jax.nets import embeddings, unet
from slam_jax.shapes import SDXLText
from slam_jax.weights import templates, translate

TWO_LEVELS = dict(
    block_out_channels=[16, 32],
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    norm_num_groups=4,
    cross_attention_dim=12,
)
SD1 = {**TWO_LEVELS, "attention_head_dim": 4, "time_cond_proj_dim": 10}
SD2 = {
    **TWO_LEVELS,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
FOUR_LEVELS = dict(
    block_out_channels=[8, 16, 16, 24],
    layers_per_block=1,
    norm_num_groups=2,
    norm_eps=1e-4,
    cross_attention_dim=6,
    attention_head_dim=2,
    in_channels=5,
    out_channels=3,
)
LISTS = {
    **TWO_LEVELS,
    "layers_per_block": [1, 2],
    "transformer_layers_per_block": [2, 1],
    "time_cond_proj_dim": 10,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
SDXL = {
    **TWO_LEVELS,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 7,
}
ONE_LEVEL = dict(
    block_out_channels=[8],
    down_block_types=["DownBlock2D"],
    up_block_types=["UpBlock2D"],
    layers_per_block=1,
    norm_num_groups=2,
    cross_attention_dim=6,
    attention_head_dim=2,
)

# unet/config.json of the three checkpoints, less what has diffusers' default value.
SD15 = dict(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
SD21_BASE = dict(
    sample_size=64,
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    use_linear_projection=True,
)
SD21 = {**SD21_BASE, "sample_size": 96, "upcast_attention": True}
# stabilityai/stable-diffusion-xl-base-1.0, whole.
SDXL_BASE = dict(
    _class_name="UNet2DConditionModel", _diffusers_version="0.19.0.dev0", act_fn="silu",
    addition_embed_type="text_time", addition_embed_type_num_heads=64, addition_time_embed_dim=256,
    attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280], center_input_sample=False,
    class_embed_type=None, class_embeddings_concat=False, conv_in_kernel=3, conv_out_kernel=3,
    cross_attention_dim=2048, cross_attention_norm=None,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    downsample_padding=1, dual_cross_attention=False, encoder_hid_dim=None,
    encoder_hid_dim_type=None, flip_sin_to_cos=True, freq_shift=0, in_channels=4,
    layers_per_block=2, mid_block_only_cross_attention=None, mid_block_scale_factor=1,
    mid_block_type="UNetMidBlock2DCrossAttn", norm_eps=1e-05, norm_num_groups=32,
    num_attention_heads=None, num_class_embeds=None, only_cross_attention=False, out_channels=4,
    projection_class_embeddings_input_dim=2816, resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False, resnet_time_scale_shift="default", sample_size=128,
    time_cond_proj_dim=None, time_embedding_act_fn=None, time_embedding_dim=None,
    time_embedding_type="positional", timestep_post_act=None,
    transformer_layers_per_block=[1, 2, 10],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    upcast_attention=None, use_linear_projection=True,
)  # fmt: skip


def torch_model(config: dict) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**config).eval()


def randomise(model: torch.nn.Module, std: float = 0.2) -> dict[str, np.ndarray]:
    """Give every parameter normal values, norm scales around 1; return them by name."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, std).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return {name: t.numpy() for name, t in model.state_dict().items()}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def draw(config: dict, height: int, width: int, batch: int = 2) -> dict[str, jax.Array | SDXLText]:
    text = normal(2, batch, 5, config["cross_attention_dim"])
    if "addition_embed_type" in config:
        width_of_sizes = 6 * config["addition_time_embed_dim"]
        pooled = normal(4, batch, config["projection_class_embeddings_input_dim"] - width_of_sizes)
        time_ids = jnp.asarray([[1023, 768, 0, 5, 1024, 512], [64, 4000, 17, 0, 8, 9]], jnp.int32)
        text = SDXLText(text, pooled, time_ids[:batch])
    return {
        "sample": normal(1, batch, height, width, config.get("in_channels", 4)),
        "timesteps": jnp.asarray([999, 19], jnp.int32)[:batch],
        "encoder_hidden_states": text,
    }


def torch_text(text: jax.Array | SDXLText) -> dict:
    """The arguments that tell diffusers' UNet the same."""
    if not isinstance(text, SDXLText):
        return {"encoder_hidden_states": to_torch(text)}
    added = {"text_embeds": to_torch(text.pooled), "time_ids": to_torch(text.time_ids)}
    return {"encoder_hidden_states": to_torch(text.hidden_states), "added_cond_kwargs": added}


def to_torch(array: jax.Array | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array))


def relative_error(out, reference) -> float:
    return float(np.linalg.norm(np.asarray(out) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(
    "config, height, width, with_cond",
    [
        pytest.param(SD1, 8, 6, True, id="sd1 with gamma embedding"),
        pytest.param(SD2, 7, 8, False, id="sd2, odd height"),
        pytest.param(FOUR_LEVELS, 13, 11, False, id="four levels, odd sizes"),
        pytest.param(LISTS, 4, 6, False, id="lists, gamma embedding not given"),
        pytest.param(SDXL, 4, 6, False, id="sdxl"),
        pytest.param(
            {**SDXL, "time_cond_proj_dim": 10, "flip_sin_to_cos": False, "freq_shift": 1},
            4,
            4,
            True,
            id="sdxl with gamma embedding, sines first",
        ),
    ],
)
def test_matches_torch(config, height, width, with_cond):
    cond = normal(3, 2, 10) if with_cond else None
    assert error_beside_torch(config, draw(config, height, width), cond) <= 1e-5


# Thirteen gigabytes and a minute: python -m pytest -m slow.
@pytest.mark.slow
def test_matches_torch_at_the_size_of_sd15():
    config = {**SD15, "time_cond_proj_dim": 256}
    inputs = draw(config, 64, 64, batch=1)
    error = error_beside_torch(config, inputs, normal(3, 1, 256), std=0.02)
    print(f"relative error {error:.2e}")
    assert error <= 1e-5


def error_beside_torch(config, inputs, cond, std=0.2) -> float:
    """Relative error of our output to that of diffusers' UNet with the same random weights."""
    model = torch_model(config)
    tensors = randomise(model, std)
    with torch.no_grad():
        reference = model(
            to_torch(inputs["sample"]).permute(0, 3, 1, 2),
            to_torch(inputs["timesteps"]),
            **torch_text(inputs["encoder_hidden_states"]),
            timestep_cond=to_torch(cond),
        ).sample.permute(0, 2, 3, 1)

    params = translate.to_params(tensors, templates.of_unet(model.config), "torch")
    module = unet.from_config(model.config)
    out = jax.jit(module.apply)({"params": params}, **inputs, timestep_cond=cond)
    return relative_error(out, reference.numpy())


@pytest.mark.parametrize("cond_dim", [None, 10])
@pytest.mark.parametrize("flip_sin_to_cos, freq_shift", [(True, 0), (False, 1)])
def test_time_embedding_matches_torch(cond_dim, flip_sin_to_cos, freq_shift):
    torch_embedding = torch_embeddings.TimestepEmbedding(32, 48, cond_proj_dim=cond_dim)
    tensors = randomise(torch_embedding)
    module = embeddings.TimestepEmbedding(32, 48, flip_sin_to_cos, freq_shift, cond_dim)
    timesteps = jnp.asarray([0, 1, 259, 500, 999], jnp.int32)
    cond = cond_dim and normal(3, 5, cond_dim)

    sinusoid = torch_embeddings.Timesteps(32, flip_sin_to_cos, freq_shift)(to_torch(timesteps))
    with torch.no_grad():
        reference = torch_embedding(sinusoid, to_torch(cond))
    shapes = jax.eval_shape(module.init, jax.random.key(0), timesteps, cond)["params"]
    params = translate.to_params(tensors, shapes, "torch")
    out = module.apply({"params": params}, timesteps, cond)
    assert relative_error(out, reference.numpy()) <= 1e-5


@pytest.mark.parametrize(
    "config",
    [SD15, {**SD15, "time_cond_proj_dim": 256}, SD21_BASE, SD21, SDXL_BASE],
    ids=["sd1.5", "sd1.5 with gamma embedding", "sd2.1-base", "sd2.1", "sdxl-base"],
)
def test_real_sizes_have_the_torch_names_and_shapes(config):
    with torch.device("meta"):
        model = torch_model(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}

    module = unet.from_config(config)
    inputs = draw(config, 8, 8, batch=1)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    ours = {}
    for path, leaf in leaves:
        path = tuple(key.key for key in path)
        ours[translate.names.torch_name(path)] = translate.torch_shape(path, leaf.shape)
        assert leaf.dtype == jnp.float32
    assert len(ours) == len(leaves) and ours == expected


def test_bfloat16_leaves_the_time_embedding_in_float32():
    config = {**ONE_LEVEL, "time_cond_proj_dim": 10}
    inputs = draw(config, 4, 4) | {"timesteps": jnp.asarray([999, 1000], jnp.int32)}
    cond = jnp.full((2, 10), 0.123456789, jnp.float32)
    tensors = randomise(torch_model(config))
    params = translate.to_params(tensors, templates.of_unet(config), "torch")

    def run(dtype):
        out, state = unet.from_config(config, dtype=dtype).apply(
            {"params": params}, **inputs, timestep_cond=cond, mutable=["intermediates"],
            capture_intermediates=lambda net, _: isinstance(net, embeddings.TimestepEmbedding),
        )  # fmt: skip
        return state["intermediates"]["time_embedding"]["__call__"][0], out

    embedding = jax.jit(lambda: run(jnp.float32)[0])()
    embedding_bf16, out = jax.jit(lambda: run(jnp.bfloat16))()
    assert embedding_bf16.dtype == out.dtype == jnp.float32
    np.testing.assert_allclose(embedding_bf16, embedding, rtol=1e-6, atol=1e-6)
    assert np.abs(embedding[0] - embedding[1]).max() > 1e-2
    assert np.all(np.isfinite(out))


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_bfloat16_multiplies_in_bfloat16_and_takes_the_softmax_in_float32():
    module = unet.from_config(ONE_LEVEL, dtype=jnp.bfloat16)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), **draw(ONE_LEVEL, 4, 4)))
    jaxpr = jax.make_jaxpr(module.apply)(variables, *draw(ONE_LEVEL, 4, 4).values())
    found = {"conv_general_dilated": set(), "dot_general": set(), "exp": set()}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in found:
            found[equation.primitive.name].add(str(equation.invars[0].aval.dtype))
    assert found["conv_general_dilated"] == {"bfloat16"}
    # float32 products: those of the time embedding alone
    assert found["dot_general"] == {"bfloat16", "float32"}
    assert found["exp"] == {"float32"}


def test_remat_recomputes_what_it_says_and_keeps_the_names():
    inputs = draw(ONE_LEVEL, 4, 4)
    modules = {name: unet.from_config(ONE_LEVEL, remat=name) for name in unet.REMAT}
    shapes = [
        jax.eval_shape(lambda module=module: module.init(jax.random.key(0), **inputs))
        for module in modules.values()
    ]
    assert all(each == shapes[0] for each in shapes)

    def count(module):
        """Of the gradient: recomputed blocks, convolutions, products without and with a batch."""
        gradient = jax.grad(lambda variables: jnp.sum(module.apply(variables, **inputs)))
        found = collections.Counter()
        for each in equations(jax.make_jaxpr(gradient)(shapes[0]).jaxpr):
            name = each.primitive.name
            if name == "dot_general":
                name = "batched" if each.params["dimension_numbers"][1][0] else "dot"
            found["block" if "remat" in name or "checkpoint" in name else name] += 1
        return [found[name] for name in ("block", "conv_general_dilated", "dot", "batched")]

    none, products, convs, everything = (count(module) for module in modules.values())
    # five residual blocks and the middle's transformer
    assert none[0] == 0 and products[0] == convs[0] == everything[0] == 5 + 1
    assert none[1] == products[1] == convs[1] < everything[1]
    assert none[2] == products[2] < convs[2] == everything[2]
    assert none[3] < products[3] == convs[3] == everything[3]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"addition_embed_type": "text_image"}, ["addition_embed_type", "'text_image'"]),
        ({"addition_embed_type": "text_time"}, ["addition_time_embed_dim None", "text_time"]),
        ({**SDXL, "projection_class_embeddings_input_dim": 48}, ["input_dim is 48", "embed_dim 8"]),
        ({"only_cross_attention": True}, ["only_cross_attention", "True"]),
        ({"only_cross_attention": [True, False]}, ["only_cross_attention", "(True, False)"]),
        ({"mid_block_type": None}, ["mid_block_type", "None", "UNetMidBlock2DCrossAttn"]),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, ["AttnDownBlock2D"]),
        ({"attention_head_dim": [2, 4, 4]}, ["attention_head_dim", "3", "2"]),
        ({"attention_head_dim": 5}, ["attention_head_dim", "16", "5"]),
        ({"norm_num_groups": 12}, ["norm_num_groups", "16", "12"]),
        ({"norm_num_groups": None}, ["norm_num_groups", "None"]),
        ({"num_attention_heads": 8}, ["num_attention_heads", "8"]),
        ({"cross_attention_dim": [8, 12]}, ["cross_attention_dim", "(8, 12)"]),
        ({"transformer_layers_per_block": [1, [1, 2]]}, ["transformer_layers_per_block"]),
        ({"layer_per_block": 3}, ["layer_per_block", "3"]),
    ],
)
def test_config_that_is_not_implemented_is_refused(change, words):
    with pytest.raises(errors.UserError) as raised:
        unet.from_config({**TWO_LEVELS, **change})
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_config_keys_without_effect_are_accepted():
    plain = unet.from_config(TWO_LEVELS)
    inert = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "upcast_attention": True}
    assert unet.from_config({**TWO_LEVELS, **inert, "cross_attention_dim": [12, 12]}) == plain


def test_bfloat16_leaves_sdxls_sizes_in_float32():
    time_ids = jnp.asarray([[1023, 0, 0, 0, 0, 0], [1024, 0, 0, 0, 0, 0]], jnp.int32)
    text = SDXLText(normal(2, 2, 5, 12), jnp.ones((2, 7), jnp.bfloat16), time_ids)
    module = embeddings.TextTimeEmbedding(8, 64, flip_sin_to_cos=True, freq_shift=0)
    embedding, _ = module.init_with_output(jax.random.key(0), text)
    assert embedding.dtype == jnp.float32
    assert np.abs(embedding[0] - embedding[1]).max() > 1e-2
