"""CLIP's image tower against transformers' torch class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from slam_jax import errors
from slam_jax.nets import clip_image
from slam_jax.weights import clip, templates, translate

TINY = dict(
    hidden_size=24, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3,
    image_size=20, patch_size=4, num_channels=3, layer_norm_eps=1e-4, projection_dim=10,
    hidden_act="gelu",
)  # fmt: skip


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_matches_torch(hidden_act):
    config = {**TINY, "hidden_act": hidden_act}
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = translate.to_params(tensors, templates.of_clip_image(config), "torch")
    pixels = np.random.default_rng(0).normal(size=(3, 20, 20, 3)).astype(np.float32)
    with torch.no_grad():
        reference = model.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds.numpy()
    out = jax.jit(clip_image.from_config(config).apply)({"params": params}, pixels)
    error = np.linalg.norm(out - reference) / np.linalg.norm(reference)
    assert out.shape == (3, 10) and error <= 1e-5


# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads of text and image tower.
REAL = {
    "vit-b/32": ((512, 2048, 12, 8), (768, 3072, 12, 12), 32, 512, "quick_gelu"),
    "vit-l/14": ((768, 3072, 12, 12), (1024, 4096, 24, 16), 14, 768, "quick_gelu"),
    "openclip vit-h/14": ((1024, 4096, 24, 16), (1280, 5120, 32, 16), 14, 1024, "gelu"),
    "openclip vit-g/14": ((1024, 4096, 24, 16), (1408, 6144, 40, 16), 14, 1024, "gelu"),
}
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_have_the_torch_names_and_shapes(name):
    *towers, patch_size, projection_dim, hidden_act = REAL[name]
    text, image = (
        {**dict(zip(KEYS, sizes, strict=True)), "hidden_act": hidden_act} for sizes in towers
    )
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**image, "patch_size": patch_size},
        projection_dim=projection_dim,
    )
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert expected.pop("logit_scale") == ()
    described = clip.tower_configs("config.json", config.to_dict())
    shapes = {
        **templates.of_text_encoder(described[0]),
        **templates.of_clip_image(described[1]),
    }
    assert translate.torch_shapes(shapes) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "relu"),
        ("num_channels", 1),
        ("num_attention_heads", 5),
        ("patch_size", 3),
        ("image_size", [20, 24]),
    ],
)
def test_a_config_that_is_not_built_is_refused(key, value):
    with pytest.raises(errors.UserError) as caught:
        clip_image.from_config({**TINY, key: value})
    assert key in str(caught.value) and str(value) in str(caught.value)


def test_pictures_of_another_size_are_refused():
    net = clip_image.from_config(TINY)
    with pytest.raises(errors.UserError, match="24 x 20 pixels, but the image tower takes 20 x 20"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 24, 20, 3)))


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    net = clip_image.from_config(TINY, dtype=jnp.bfloat16)
    pixels = jnp.zeros((1, 20, 20, 3))
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), pixels)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
