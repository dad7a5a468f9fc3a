"""InceptionV3 of the FID against torch-fidelity's, part by part.

The whole of it, on pictures, is compared in tests/evaluation/test_inception.py.
"""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slam_jax.nets import inception
from slam_jax.weights import templates, translate

sys.path.append(str(Path(__file__).parents[1]))
fidelity = importlib.import_module("fidelity")

PIXELS = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
BLOCKS = {
    "Mixed_5b": (inception.InceptionA(32), 192),
    "Mixed_6a": (inception.InceptionB(), 288),
    "Mixed_6c": (inception.InceptionC(160), 768),
    "Mixed_7a": (inception.InceptionD(), 768),
    "Mixed_7b": (inception.InceptionE(pools_maximum=False), 1280),
    "Mixed_7c": (inception.InceptionE(pools_maximum=True), 2048),
}


@pytest.fixture(scope="module")
def net():
    return fidelity.untrained()


def test_names_and_shapes_are_those_of_the_published_state_dict(net):
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in net.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    assert translate.torch_shapes(templates.of_inception()) == theirs


@pytest.mark.parametrize("name", BLOCKS)
def test_block_matches_torch(net, name):
    """On 7 x 9, of which every pixel is at an edge or next to one; most below zero, as a wrong
    padding of a maximum would show."""
    module, channels = BLOCKS[name]
    x = np.random.default_rng(0).normal(-1.0, 1.0, (2, 7, 9, channels)).astype(np.float32)
    block = net.get_submodule(name)
    tensors = {n: t for n, t in block.state_dict().items() if not n.endswith("tracked")}
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = translate.to_params(tensors, shapes, name)
    with torch.no_grad():
        theirs = block(fidelity.to_torch(x)).numpy().transpose(0, 2, 3, 1)
    ours = jax.device_get(jax.jit(module.apply)({"params": params}, x))
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) <= 1e-5


def test_every_convolution_is_in_full_float32():
    """JAX's own default is TF32 on GPUs from Ampere on, and bfloat16 on TPUs."""
    params = templates.of_inception()
    with jax.default_matmul_precision("default"):
        text = str(jax.make_jaxpr(inception.Inception().apply)({"params": params}, PIXELS))
    convolutions = text.count("conv_general_dilated[")
    assert convolutions == 94 and "dot_general" not in text
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == convolutions
