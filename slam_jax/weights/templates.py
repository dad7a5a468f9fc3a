"""The parameters' names, shapes and order for a config, without any being made."""

import functools
import json
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from slam_jax import kept
from slam_jax.nets import classifier, clip, clip_image, inception, unet, vae
from slam_jax.shapes import SDXLText


def of_unet(config: Mapping) -> dict:
    """Tree of ShapeDtypeStruct of the UNet that unet/config.json describes."""
    net = unet.from_config(config)
    size = 2 ** len(net.block_out_channels)
    text = _floats(1, 2, net.cross_attention_dim)
    if net.addition_embed_type is not None:
        text = SDXLText(text, _floats(1, net.pooled_width()), _integers(1, unet.NUM_TIME_IDS))
    gamma = net.time_cond_proj_dim and _floats(1, net.time_cond_proj_dim)
    return _shapes(net, _floats(1, size, size, net.in_channels), _integers(1), text, gamma)


def of_vae(config: Mapping) -> dict:
    """Tree of ShapeDtypeStruct of the AutoencoderKL that vae/config.json describes."""
    net = vae.from_config(config)
    size = 2 ** len(net.block_out_channels)
    return _shapes(net, _floats(1, size, size, 3))


def of_text_encoder(config: Mapping) -> dict:
    """Tree of ShapeDtypeStruct of the CLIPTextModel (WithProjection) that config.json describes."""
    return _shapes(clip.from_config(config), _integers(1, 1))


def of_clip_image(config: Mapping) -> dict:
    """Tree of ShapeDtypeStruct of the image tower that a CLIPVisionConfig describes."""
    net = clip_image.from_config(config)
    return _shapes(net, _floats(1, net.image_size, net.image_size, 3))


def of_classifier(label_sizes: tuple[int, ...], size: int) -> dict:
    """Tree of ShapeDtypeStruct of the ShapesClassifier for square images of `size` pixels."""
    return _shapes(classifier.ShapesClassifier(label_sizes), _floats(1, size, size, 3))


def of_inception() -> dict:
    """Tree of ShapeDtypeStruct of the InceptionV3 behind the Frechet inception distance."""
    return _shapes(inception.Inception(), _floats(1, inception.SIZE, inception.SIZE, 3))


# Tracing takes seconds, and one process reads several folders of one shape.
@functools.cache
def _shapes(net: nn.Module, *inputs: jax.ShapeDtypeStruct | SDXLText | None) -> dict:
    key = kept.key("shapes", str(net), str(inputs), str(jax.config.jax_enable_x64))
    content = kept.read("shapes", key)
    if content is not None:
        return traverse_util.unflatten_dict({
            tuple(path): jax.ShapeDtypeStruct(shape, dtype)
            for path, shape, dtype in json.loads(content)
        })  # fmt: skip
    shapes = jax.eval_shape(lambda *inputs: net.init(jax.random.key(0), *inputs), *inputs)["params"]
    leaves = traverse_util.flatten_dict(shapes)
    listed = [(path, leaf.shape, leaf.dtype.name) for path, leaf in leaves.items()]
    kept.write("shapes", key, json.dumps(listed).encode())
    return shapes


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
