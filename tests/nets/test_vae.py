"""AutoencoderKL against diffusers' torch class."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slam_jax import errors
from slam_jax.nets import vae

# Two levels with attention in the middle; three levels without it, with wide latents. 3 x 5
# latent pixels: not square, so a swap of height and width shows.
SMALL = [
    dict(
        block_out_channels=(16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    ),
    dict(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=8, latent_channels=3,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    ),
]  # fmt: skip
STABLE_DIFFUSION = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
    latent_channels=4, sample_size=512, scaling_factor=0.18215,
)  # fmt: skip
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def torch_model(config: dict) -> diffusers.AutoencoderKL:
    levels = len(config["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    ).eval()


def flax_module(model: diffusers.AutoencoderKL, **kwargs) -> vae.AutoencoderKL:
    """Built from the config as json has it: lists, not tuples."""
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items()}
    return vae.from_config(config, **kwargs)


def shapes_of(module: vae.AutoencoderKL) -> dict:
    scale = 2 ** (len(module.block_out_channels) - 1)
    images = jax.ShapeDtypeStruct((1, scale, scale, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


def torch_name(path) -> str:
    *modules, leaf = (key.key for key in path)
    return ".".join([*modules, LEAVES[leaf]])


def torch_axes(ndim: int) -> tuple[int, ...]:
    """Axes of a Flax kernel or vector in torch's order."""
    return {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def randomised(config: dict):
    """Torch model with normal weights, and the same numbers as a Flax tree."""
    torch.manual_seed(0)
    model = torch_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 25
            p.normal_(0, fan_in**-0.5).add_(1.0 if "norm" in name and "weight" in name else 0.0)
    tensors = {name: t.numpy() for name, t in model.state_dict().items()}
    module = flax_module(model)

    def pick(path, shape):
        tensor = tensors[torch_name(path)]
        return jnp.asarray(tensor.transpose(np.argsort(torch_axes(tensor.ndim))))

    return model, module, jax.tree_util.tree_map_with_path(pick, shapes_of(module))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def relative_error(ours: jax.Array, reference: torch.Tensor) -> float:
    reference = reference.numpy().transpose(0, 2, 3, 1)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("config", SMALL, ids=["attention", "no attention, no quant_conv"])
def test_matches_torch(config):
    model, module, params = randomised(config)
    rng = np.random.default_rng(0)
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    images = rng.uniform(-1, 1, (2, 3 * scale, 5 * scale, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 3, 5, config["latent_channels"])).astype(np.float32)
    with torch.no_grad():
        reference = model.encode(to_torch(images)).latent_dist
        decoded = model.decode(to_torch(latents)).sample

    variables = {"params": params}
    encode = jax.jit(lambda v, x: module.apply(v, x, method="encode"))
    decode = jax.jit(lambda v, x: module.apply(v, x, method="decode"))
    posterior = encode(variables, jnp.asarray(images))
    assert relative_error(posterior.mean, reference.mean) <= 1e-5
    assert relative_error(posterior.logvar, reference.logvar) <= 1e-5
    assert relative_error(decode(variables, jnp.asarray(latents)), decoded) <= 1e-5

    # far outside [-1, 1] the log-variance leaves its range and is clipped as torch clips it
    bias = "quant_conv" if module.use_quant_conv else "encoder"
    wild = jax.tree_util.tree_map_with_path(
        lambda path, p: 300 * p if path[0].key == bias and p.ndim == 1 else p, params
    )
    logvar = np.asarray(encode({"params": wild}, jnp.asarray(images)).logvar)
    assert logvar.min() == -30 and logvar.max() == 20


def test_real_size_has_the_torch_names_and_shapes():
    with torch.device("meta"):
        model = torch_model(STABLE_DIFFUSION)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(flax_module(model)))
    ours = {
        torch_name(path): tuple(leaf.shape[a] for a in torch_axes(leaf.ndim))
        for path, leaf in leaves
    }
    assert len(ours) == len(leaves) and ours == expected
    assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "key, value",
    [
        ("act_fn", "relu"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("latents_mean", [0.1, 0.2]),
        ("shift_factor", 0.1),
        ("temporal_layers", 2),
    ],
)
def test_a_config_that_is_not_built_is_refused(key, value):
    with pytest.raises(errors.UserError) as caught:
        vae.from_config({"block_out_channels": [8, 8], "norm_num_groups": 4, key: value})
    assert key in str(caught.value) and str(value) in str(caught.value)
