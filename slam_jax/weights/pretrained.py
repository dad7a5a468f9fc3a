"""A Stable Diffusion folder of diffusers' layout, read into numpy parameters and written back."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from slam_jax.errors import UserError
from slam_jax.weights import fit, names, templates, tensorfile, translate, whole
from slam_jax.weights import folder as folders


class Component(NamedTuple):
    """One network: its config.json and its parameters (numpy, float32 unless asked otherwise)."""

    config: dict
    params: dict
    # Text encoder only: its file's names lack names.TEXT_PREFIX, as transformers 5 writes them.
    bare_names: bool = False


class Pretrained(NamedTuple):
    """A whole folder: networks, scheduler_config.json, and the tokenizers' folders."""

    unet: Component
    vae: Component
    text_encoder: Component
    scheduler: dict
    tokenizer: Path
    # SDXL only, None in the others.
    text_encoder_2: Component | None = None
    tokenizer_2: Path | None = None
    # SDXL only: what is guided away from is zeros, not the empty prompt's text.
    force_zeros_for_empty_prompt: bool = True


def without_params(model: Pretrained) -> Pretrained:
    """What a program depends on: configs."""
    bare = {
        name: part._replace(params={})
        for name, part in model._asdict().items()
        if isinstance(part, Component)
    }
    return model._replace(**bare, tokenizer=Path(), tokenizer_2=None)


class Part(NamedTuple):
    """How one network is kept in a folder."""

    name: str
    stem: str
    our_name: Callable[[str], str | None]
    template: Callable[[Mapping], dict]


UNET = Part("unet", "diffusion_pytorch_model", names.unet, templates.of_unet)
VAE = Part("vae", "diffusion_pytorch_model", names.vae, templates.of_vae)
TEXT_ENCODER = Part("text_encoder", "model", names.text_encoder, templates.of_text_encoder)
TEXT_ENCODER_2 = TEXT_ENCODER._replace(name="text_encoder_2")
PARTS = (UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2)


class Described(NamedTuple):
    """A network's config.json, and the shapes of the parameters that it asks for."""

    config: dict
    shapes: dict


def read(
    folder: str | Path,
    *,
    variant: str | None = None,
    dtype: DTypeLike | None = np.float32,
    config: str | Path | None = None,
) -> Pretrained:
    """The model in `folder`; everything is checked before anything is loaded.

    variant: as in diffusers, "fp16" reads the files *.fp16.safetensors. dtype: of the
    parameters; None keeps the files' own. `folder` may be a single .safetensors file in LDM's
    layout; then `config` is a folder with all that it lacks. Raises UserError naming file and
    tensor.
    """
    return load(find(folder, variant=variant, config=config), dtype=dtype)


def find(
    folder: str | Path, *, variant: str | None = None, config: str | Path | None = None
) -> Pretrained:
    """The model in `folder`, checked as by `read`, its parameters translate.Unread: for `load`."""
    root = Path(folder)
    if root.suffix == ".safetensors" and not root.is_dir():
        # Here, since it returns what this module defines.
        from slam_jax.weights import single_file

        if variant is not None:
            raise UserError(f"{root} is one file, without variants; leave out variant {variant!r}")
        return single_file.find(root, config)
    networks, others = describe(root)
    if config is not None:
        raise UserError(f"{root} is no single file and has its own configs; give no config folder")
    found = {
        part.name: _find(root / part.name, part, networks[part.name], variant)
        for part in PARTS
        if part.name in networks
    }
    return Pretrained(**found, **others)


def load(
    found: Pretrained,
    *,
    dtype: DTypeLike | None = np.float32,
    place: translate.Place | None = None,
) -> Pretrained:
    """What `find` found, with its parameters read; the host holds them and one tensor more.

    place: takes each parameter as it is read, with its path ("unet", "conv_in", "kernel"), and
    returns it on its devices; then the host holds no more than one.
    """
    networks = {key: part for key, part in found._asdict().items() if isinstance(part, Component)}
    params = translate.load(
        {key: network.params for key, network in networks.items()}, dtype=dtype, place=place
    )
    return found._replace(
        **{key: network._replace(params=params[key]) for key, network in networks.items()}
    )


def describe(root: Path) -> tuple[dict[str, Described], dict]:
    """What a folder holds beside weights: its networks by part, and Pretrained's other fields.

    Raises UserError for what is missing, not supported or does not fit together.
    """
    index = folders.read_index(root)
    others = {
        "scheduler": folders.read_scheduler(root),
        "tokenizer": folders.find_tokenizer(root / "tokenizer"),
    }
    if index["_class_name"] == folders.SDXL:
        others["tokenizer_2"] = folders.find_tokenizer(root / "tokenizer_2")
        key = "force_zeros_for_empty_prompt"
        others[key] = index.get(key, True)
    names_of_parts = folders.PIPELINES[index["_class_name"]]
    networks = {
        part.name: _describe(root / part.name, part)
        for part in PARTS
        if part.name in names_of_parts
    }
    fit.check(str(root), *(each.config for each in networks.values()))
    return networks, others


def read_component(
    folder: str | Path,
    part: Part,
    *,
    variant: str | None = None,
    dtype: DTypeLike | None = np.float32,
) -> Component:
    """One network from its own folder (config.json and weights), whatever that is called."""
    path = Path(folder)
    found = _find(path, part, _describe(path, part), variant)
    return found._replace(params=translate.load(found.params, dtype=dtype))


def write(
    folder: str | Path,
    pretrained: Pretrained,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    readme: str | None = None,
    told: tensorfile.Told = tensorfile.untold,
) -> None:
    """Write what `read` reads and diffusers' StableDiffusion(XL)Pipeline.from_pretrained loads.

    Parameters may be unread still. dtype: of the weights in the files; None writes them as they
    are. readme: the model card. told: as tensorfile.write has it. An existing model folder is
    replaced, at once and only when the new one is complete; any other folder is refused. A write
    that fails leaves nothing behind.
    """
    with whole.folder(Path(folder), "model folder", _is_model) as root:
        _write_all(root, pretrained, dtype, variant, told)
        if readme is not None:
            (root / "README.md").write_text(readme, encoding="utf-8")


def _is_model(root: Path) -> bool:
    return (root / "model_index.json").is_file()


def _write_all(
    root: Path, pretrained: Pretrained, dtype: DTypeLike | None, variant: str | None,
    told: tensorfile.Told,
) -> None:  # fmt: skip
    scheduler = pretrained.scheduler
    networks = [(UNET, pretrained.unet), (VAE, pretrained.vae)]
    networks.append((TEXT_ENCODER, pretrained.text_encoder))
    tokenizers = {"tokenizer": pretrained.tokenizer}
    index = folders.model_index(scheduler)
    if pretrained.text_encoder_2 is not None:
        networks.append((TEXT_ENCODER_2, pretrained.text_encoder_2))
        tokenizers["tokenizer_2"] = pretrained.tokenizer_2
        index = folders.sdxl_model_index(scheduler, pretrained.force_zeros_for_empty_prompt)
    for part, network in networks:
        where = root / part.name
        write_component(where, part, network, dtype=dtype, variant=variant, told=told)
    (root / "scheduler").mkdir()
    folders.write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    for name, folder in tokenizers.items():
        (root / name).mkdir()
        for path in folder.iterdir():
            if path.is_file():
                shutil.copyfile(path, root / name / path.name)
    folders.write_json(root / "model_index.json", index)


def write_component(
    folder: str | Path,
    part: Part,
    component: Component,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    told: tensorfile.Told = tensorfile.untold,
) -> None:
    """Write one network's config.json and weights into `folder`, in place."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = translate.to_tensors(translate.load(component.params))
    if component.bare_names:
        tensors = {name.removeprefix(names.TEXT_PREFIX): tensors[name] for name in tensors}
    written_as = dtype or next(iter(tensors.values())).dtype
    config = _config_to_write(part, component.config, np.dtype(written_as).name)
    folders.write_json(path / "config.json", config)
    tensorfile.write(path / folders.weights_name(part.stem, variant), tensors, dtype, told)


def _config_to_write(part: Part, config: Mapping, dtype_name: str) -> dict:
    if part in (UNET, VAE):
        return {"_class_name": folders.PARTS[part.name], **config}
    # transformers loads a model as what its config says of the dtype.
    dtypes = {key: dtype_name for key in ("dtype", "torch_dtype") if key in config}
    architectures = [folders.PARTS[part.name]]
    return {"architectures": architectures, "model_type": "clip_text_model", **config, **dtypes}


def _describe(path: Path, part: Part) -> Described:
    """One network's config.json; UserError unless it is of that part's class and can be built."""
    config_path = path / "config.json"
    config = folders.read_config(config_path)
    wanted = folders.PARTS[part.name]
    # diffusers' key, then transformers'.
    class_name = config.get("_class_name") or (config.get("architectures") or [wanted])[0]
    if class_name != wanted:
        raise UserError(f"{config_path} is of a {class_name}, not a {wanted}")
    if part is TEXT_ENCODER_2:
        config = {"architectures": [wanted], **config}
    try:
        return Described(config, part.template(config))
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from None
    except (TypeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{config_path} describes no network that can be built ({line}); correct it"
        ) from None


def _find(path: Path, part: Part, described: Described, variant: str | None) -> Component:
    """Check one network's weights against the network that its config.json describes."""
    source, stored = folders.find_tensors(path, part.stem, variant)
    tensors = _under_our_names(stored, part)
    prefix = names.TEXT_PREFIX
    bare_names = any(name == prefix + stored.name for name, stored in tensors.items())
    params = translate.find(tensors, described.shapes, str(source))
    return Component(described.config, params, bare_names)


def _under_our_names(
    stored: Mapping[str, tensorfile.Stored], part: Part
) -> dict[str, tensorfile.Stored]:
    """The tensors that parameters are read from; UserError if one is there under two names."""
    tensors: dict[str, tensorfile.Stored] = {}
    for name, tensor in stored.items():
        our_name = part.our_name(name)
        if our_name in tensors:
            raise UserError(
                f"{tensor.path} holds {name!r} and {tensors[our_name].name!r}, which are the "
                "same tensor; remove one"
            )
        if our_name is not None:
            tensors[our_name] = tensor
    return tensors
