"""LoRA files of UNet and text encoders: written in two spellings, read in all that are about.

`additions` are a LoRA tree (nets/lora.py) of scale 1, that is, of alpha = rank. The spellings are
diffusers' and PEFT's (`unet.mid_block....to_q.lora_A.weight`) and kohya's, which ComfyUI and A1111
read (`lora_unet_mid_block_..._to_q.lora_down.weight`).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from slam_jax.errors import UserError
from slam_jax.nets import lora, unet
from slam_jax.weights import ldm_names, lora_names, pretrained, tensorfile, translate, whole

# What diffusers' load_lora_weights looks for in a folder; beside it the one for ComfyUI and A1111.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "comfyui_lora.safetensors"
_NAMES_SHOWN = 3


class _Place(NamedTuple):
    """A module of the model that a file may add to."""

    part: str  # "unet", "text_encoder", "text_encoder_2"
    path: tuple[str, ...]
    shape: tuple[int, ...]  # of its weight, as torch has it


def baked(trained: Mapping, scale: float) -> dict:
    """The additions in what a LoRA run trains: `scale` in the ups, the gamma layer left out."""
    factors = {lora.DOWN: np.float32(1.0), lora.UP: np.float32(scale)}
    leaves = traverse_util.flatten_dict(trained)
    return traverse_util.unflatten_dict(
        {path: leaf * factors[path[-2]] for path, leaf in leaves.items() if path[-2] in factors}
    )


def merged(
    component: pretrained.Component, additions: Mapping, scale: float = 1.0
) -> pretrained.Component:
    """The network with `scale` times the additions in its kernels, on the host."""
    return component._replace(params=lora.merge(component.params, additions, scale))


def write(folder: Path, additions: Mapping, *, dtype: DTypeLike | None = None) -> None:
    """Write a UNet's additions into `folder`, which is new or a LoRA's, in both spellings."""
    tensors = translate.to_tensors(additions)
    with whole.folder(folder, "LoRA's folder", _is_lora) as root:
        tensorfile.write(root / DIFFUSERS_FILE, lora_names.to_diffusers(tensors), dtype)
        tensorfile.write(root / KOHYA_FILE, lora_names.to_kohya(tensors), dtype)


def _is_lora(root: Path) -> bool:
    return {path.name for path in root.iterdir()} <= {DIFFUSERS_FILE, KOHYA_FILE}


def apply(model: pretrained.Pretrained, path: Path, scale: float) -> pretrained.Pretrained:
    """`model` with `scale` times the file's LoRA in its UNet and text encoders.

    UserError, before anything is added, if something in the file has no place in the model.
    """
    parts = model._asdict()
    return model._replace(
        **{
            part: merged(parts[part], additions, scale)
            for part, additions in read(path, model).items()
        }
    )


def read(path: Path, model: pretrained.Pretrained) -> dict[str, dict]:
    """Additions in the file by the part of `model` they are for: "unet", "text_encoder", ..."""
    found, places = _modules(path), _places(model)
    unknown = [spelt for spelt in found if lora_names.modern(spelt) not in places]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(found)} modules are not in the model, such as "
            f"{', '.join(unknown[:_NAMES_SHOWN])}; give a LoRA that was made for this family"
        )
    adapter = _adapter_config(path)
    parts: dict[str, dict] = {}
    for spelt, halves in found.items():
        place = places[lora_names.modern(spelt)]
        down, up = _fitted(halves, place, f"{path}: {spelt}")
        leaves = parts.setdefault(place.part, {})
        leaves[*place.path, lora.DOWN, "kernel"] = _kernel(down)
        leaves[*place.path, lora.UP, "kernel"] = _kernel(up * _scale(halves, place, adapter))
    return {part: traverse_util.unflatten_dict(leaves) for part, leaves in parts.items()}


def _modules(path: Path) -> dict[str, dict[str, tensorfile.Stored]]:
    """Modules as the file spells them -> their tensors: DOWN, UP and perhaps ALPHA."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; no other LoRA file is opened")
    found: dict[str, dict[str, tensorfile.Stored]] = {}
    for key, tensor in tensorfile.read(path).items():
        parsed = lora_names.parse(key)
        if parsed is None:
            raise UserError(
                f"{path}: tensor {key!r} is of no plain LoRA; DoRA, LoHa, LoKr, trained biases and "
                "whole models are not read"
            )
        module, half = parsed
        found.setdefault(module, {})[half] = tensor
    if not found:
        raise UserError(f"{path} holds no tensors; copy or download it again")
    for module, halves in found.items():
        for half in (lora.DOWN, lora.UP):
            if half not in halves:
                raise UserError(f"{path}: {module} lacks {half}; copy or download it again")
    return found


def _places(model: pretrained.Pretrained) -> dict[str, _Place]:
    """All spellings of the modules that have a kernel."""
    places = {}
    modules = _ldm_modules(model.unet)
    parts = model._asdict()
    for part in lora_names.PARTS:
        if parts.get(part) is None:
            continue
        for path, leaf in traverse_util.flatten_dict(parts[part].params).items():
            if path[-1] == "kernel":
                module = ".".join(path[:-1])
                place = _Place(part, path[:-1], translate.torch_shape(path, leaf.shape))
                ldm_module = ldm_names.rename(module, modules)
                places |= dict.fromkeys(lora_names.spellings(part, module, ldm_module), place)
    return places


def _ldm_modules(component: pretrained.Component) -> dict[str, str]:
    """The UNet's modules -> LDM's."""
    net = unet.from_config(component.config)
    layers = unet.per_level(net.layers_per_block, len(net.block_out_channels))
    return ldm_names.unet(layers, tuple(unet.UP_BLOCKS[kind] for kind in net.up_block_types))


def _fitted(halves: Mapping, place: _Place, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The halves as torch has them for a weight of that shape; a 1x1 window may come or go."""
    down, up = (np.asarray(halves[half], np.float32) for half in (lora.DOWN, lora.UP))
    fan_out, *fan_in = place.shape
    found = (up.shape[0], *down.shape[1:])
    if math.prod(down.shape[1:]) != math.prod(fan_in) or up.size != fan_out * down.shape[0]:
        raise UserError(
            f"{what} is for a weight of shape {list(found)}, the model's has {list(place.shape)}; "
            "give a LoRA that was made for this family"
        )
    rank = down.shape[0]
    return down.reshape(rank, *fan_in), up.reshape(fan_out, rank, *(1 for _ in fan_in[1:]))


def _kernel(tensor: np.ndarray) -> np.ndarray:
    """torch's [out, in, ...] as Linen's [..., in, out]."""
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def _scale(halves: Mapping, place: _Place, adapter: Mapping) -> np.float32:
    """alpha / rank; alpha from the file's tensor or its metadata, or else the rank."""
    rank = halves[lora.DOWN].shape[0]
    if lora_names.ALPHA in halves:
        return np.float32(halves[lora_names.ALPHA].number() / rank)
    config = {
        key.removeprefix(f"{place.part}."): value
        for key, value in adapter.items()
        if key.startswith(f"{place.part}.")
    }
    alpha = config.get("lora_alpha", rank)
    for pattern, value in config.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", ".".join(place.path)):
            alpha = value
            break
    return np.float32(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _adapter_config(path: Path) -> dict:
    """PEFT's LoraConfig of each part, as diffusers >= 0.34 puts it into the file's metadata."""
    text = tensorfile.metadata(path).get("lora_adapter_metadata", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{path}: lora_adapter_metadata is not JSON; save it again") from None
