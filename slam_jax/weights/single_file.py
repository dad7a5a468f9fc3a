"""A single-file checkpoint in LDM's layout, as A1111 and ComfyUI load it: read and written.

It holds weights only; configs, scheduler and tokenizer are those of a diffusers folder.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from slam_jax.errors import UserError
from slam_jax.weights import ldm, ldm_names, pretrained, tensorfile, translate


def find(file: str | Path, config: str | Path | None) -> pretrained.Pretrained:
    """The model whose weights are in `file`, checked, and nothing read: for pretrained.load.

    config: diffusers folder of a model of the same architecture and prediction (epsilon or v: the
    file does not tell), whose weights are not read and need not be there. Of a file with averaged
    weights too (model_ema) those that were trained are read, as diffusers does. Raises UserError
    naming file and tensor.
    """
    path = Path(file)
    stored = {ldm_names.full_key(key): tensor for key, tensor in tensorfile.read(path).items()}
    family = _family(path, stored)
    if config is None:
        raise UserError(
            f"{path} holds the weights of a {family.name} model, but no configs and no tokenizer; "
            f"{_give_folder(family)}"
        )
    root = Path(config)
    networks, others = pretrained.describe(root)
    configs = {name: network.config for name, network in networks.items()}
    if (other := ldm.family_of_configs(configs)) is not family:
        raise UserError(
            f"{path} is a {family.name} model and {root} a {other.name} one; {_give_folder(family)}"
        )
    shapes = {name: translate.torch_shapes(network.shapes) for name, network in networks.items()}
    layouts = ldm.layouts(family, configs)
    _check(path, stored, shapes, layouts, root)
    components = {}
    for name, network in networks.items():
        tensors = ldm.from_ldm(stored, shapes[name], layouts[name])
        params = translate.find(tensors, network.shapes, str(path))
        components[name] = pretrained.Component(network.config, params)
    return pretrained.Pretrained(**components, **others)


def write(
    file: str | Path, model: pretrained.Pretrained, *, dtype: DTypeLike | None = None,
    told: tensorfile.Told = tensorfile.untold,
) -> None:  # fmt: skip
    """Write the weights of `model` as one file that A1111, ComfyUI and diffusers load.

    Its UNet takes no gamma: see students.fold_gamma. dtype: in the file; None writes the weights
    as they are. A file of that name is replaced, at once and only when the new one is complete.
    told: as tensorfile.write has it.
    """
    path = Path(file).absolute()
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors, or no program knows what it is")
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    if model.text_encoder_2 is not None:
        parts["text_encoder_2"] = model.text_encoder_2
    configs = {name: component.config for name, component in parts.items()}
    assert configs["unet"].get("time_cond_proj_dim") is None, "fold gamma into the UNet first"
    layouts = ldm.layouts(ldm.family_of_configs(configs), configs)
    tensors = {}
    for name, component in parts.items():
        tensors |= ldm.to_ldm(translate.to_tensors(component.params), layouts[name])
    partial = path.with_name(f".{path.name}.partial")
    try:
        tensorfile.write(partial, tensors, dtype, told)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a place that can be written"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _family(path: Path, stored: Mapping[str, tensorfile.Stored]) -> ldm.Family:
    """The family of the file; UserError if it is no whole model in LDM's layout."""
    family = ldm.family_of_keys(stored)
    if family is not None:
        return family
    if any("lora" in key for key in stored):
        raise UserError(f"{path} is a LoRA, not a model; give the model that it was made for")
    first = min(stored, default=None)
    raise UserError(
        f"{path} holds no model that A1111 could load (its first tensor is {first!r}); supported "
        f"are whole {', '.join(family.name for family in ldm.FAMILIES)} models"
    )


def _give_folder(family: ldm.Family) -> str:
    return (
        f"give as config the diffusers folder of a {family.name} model that it is a variant of, as "
        f'got by `hf download {family.repo} --include "*.json" "*/merges.txt" '
        "--local-dir FOLDER`"
    )


def _check(
    path: Path,
    stored: Mapping[str, tensorfile.Stored],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    layouts: Mapping[str, ldm.Layout],
    root: Path,
) -> None:
    """UserError unless the file has what the configs describe, and nothing else that matters."""
    wanted = {}
    for name, layout in layouts.items():
        empty = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes[name].items()}
        wanted |= {key: tensor.shape for key, tensor in ldm.to_ldm(empty, layout).items()}

    def is_used(key: str) -> bool:
        unused = any(ldm.is_unused(key, layout) for layout in layouts.values())
        return not unused and not ldm_names.is_ignored(key)

    translate.compare(
        {key: tensor for key, tensor in stored.items() if is_used(key)},
        {key: shape for key, shape in wanted.items() if is_used(key)},
        str(path),
        f"the file must be of the architecture that {root} describes",
    )
