"""A Stable Diffusion folder of diffusers' layout, read into numpy parameters and written back."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from slam_jax.errors import UserError
from slam_jax.weights import folder as folders
from slam_jax.weights import names, templates, tensorfile, translate


class Component(NamedTuple):
    """One network: its config.json and its parameters (numpy, float32 unless asked otherwise)."""

    config: dict
    params: dict
    # Text encoder only: its file's names lack names.TEXT_PREFIX, as transformers 5 writes them.
    bare_names: bool = False


class Pretrained(NamedTuple):
    """A whole folder: networks, scheduler_config.json, and the tokenizer's folder."""

    unet: Component
    vae: Component
    text_encoder: Component
    scheduler: dict
    tokenizer: Path


class Part(NamedTuple):
    """How one network is kept in a folder."""

    name: str
    stem: str
    our_name: Callable[[str], str | None]
    template: Callable[[Mapping], dict]


UNET = Part("unet", "diffusion_pytorch_model", names.unet, templates.of_unet)
VAE = Part("vae", "diffusion_pytorch_model", names.vae, templates.of_vae)
TEXT_ENCODER = Part("text_encoder", "model", names.text_encoder, templates.of_text_encoder)


class _Found(NamedTuple):
    """A network that was found and checked, nothing of it loaded yet."""

    config: dict
    tensors: dict[str, tensorfile.Stored]
    shapes: dict
    source: str
    bare_names: bool


def read(
    folder: str | Path, *, variant: str | None = None, dtype: DTypeLike | None = np.float32
) -> Pretrained:
    """The model in `folder`; everything is checked before anything is loaded.

    variant: as in diffusers, "fp16" reads the files *.fp16.safetensors. dtype: of the
    parameters; None keeps the files' own. Raises UserError naming file and tensor.
    """
    root = Path(folder)
    folders.read_index(root)
    scheduler, tokenizer = folders.read_scheduler(root), folders.find_tokenizer(root)
    found = [_find(root / part.name, part, variant) for part in (UNET, VAE, TEXT_ENCODER)]
    return Pretrained(*(_load(each, dtype) for each in found), scheduler, tokenizer)


def read_component(
    folder: str | Path,
    part: Part,
    *,
    variant: str | None = None,
    dtype: DTypeLike | None = np.float32,
) -> Component:
    """One network from its own folder (config.json and weights), whatever that is called."""
    return _load(_find(Path(folder), part, variant), dtype)


def write(
    folder: str | Path,
    pretrained: Pretrained,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
) -> None:
    """Write what `read` reads and diffusers' StableDiffusionPipeline.from_pretrained loads.

    dtype: of the weights in the files; None writes them as they are. An existing model folder
    is replaced, at once and only when the new one is complete; any other folder is refused.
    """
    root = Path(folder).absolute()
    partial, replaced = (root.with_name(f".{root.name}.{word}") for word in ("partial", "replaced"))
    try:
        if root.exists() and not (root / "model_index.json").is_file() and any(root.iterdir()):
            raise UserError(f"{root} exists and is not a model folder; choose another, or empty it")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_all(partial, pretrained, dtype, variant)
        shutil.rmtree(replaced, ignore_errors=True)
        if root.exists():
            root.rename(replaced)
        partial.rename(root)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {root}: {error.strerror or error}; choose a folder that can be written"
        ) from None


def _write_all(
    root: Path, pretrained: Pretrained, dtype: DTypeLike | None, variant: str | None
) -> None:
    write_component(root / "unet", UNET, pretrained.unet, dtype=dtype, variant=variant)
    write_component(root / "vae", VAE, pretrained.vae, dtype=dtype, variant=variant)
    write_component(
        root / "text_encoder", TEXT_ENCODER, pretrained.text_encoder, dtype=dtype, variant=variant
    )
    (root / "scheduler").mkdir()
    folders.write_json(root / "scheduler" / "scheduler_config.json", pretrained.scheduler)
    (root / "tokenizer").mkdir()
    for path in pretrained.tokenizer.iterdir():
        if path.is_file():
            shutil.copyfile(path, root / "tokenizer" / path.name)
    folders.write_json(root / "model_index.json", folders.model_index(pretrained.scheduler))


def write_component(
    folder: str | Path,
    part: Part,
    component: Component,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
) -> None:
    """Write one network's config.json and weights into `folder`, in place."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = translate.to_tensors(component.params)
    if component.bare_names:
        tensors = {name.removeprefix(names.TEXT_PREFIX): tensors[name] for name in tensors}
    written_as = dtype or next(iter(tensors.values())).dtype
    config = _config_to_write(part, component.config, np.dtype(written_as).name)
    folders.write_json(path / "config.json", config)
    tensorfile.write(path / folders.weights_name(part.stem, variant), tensors, dtype)


def _config_to_write(part: Part, config: Mapping, dtype_name: str) -> dict:
    if part is not TEXT_ENCODER:
        return {"_class_name": folders.PARTS[part.name], **config}
    # transformers loads a model as what its config says of the dtype.
    dtypes = {key: dtype_name for key in ("dtype", "torch_dtype") if key in config}
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **config, **dtypes}


def _find(path: Path, part: Part, variant: str | None) -> _Found:
    """Check one network's folder against the network that its config.json describes."""
    config_path = path / "config.json"
    config = folders.read_json(config_path)
    class_name = config.get("_class_name", folders.PARTS[part.name])
    if class_name != folders.PARTS[part.name]:
        raise UserError(f"{config_path} is of a {class_name}, not a {folders.PARTS[part.name]}")
    try:
        shapes = part.template(config)
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from None
    except (TypeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{config_path} describes no network that can be built ({line}); correct it"
        ) from None
    source, stored = folders.find_tensors(path, part.stem, variant)
    tensors = _under_our_names(stored, part)
    translate.check(tensors, shapes, str(source))
    prefix = names.TEXT_PREFIX
    bare_names = any(name == prefix + stored.name for name, stored in tensors.items())
    return _Found(config, tensors, shapes, str(source), bare_names)


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


def _load(found: _Found, dtype: DTypeLike | None) -> Component:
    params = translate.to_params(found.tensors, found.shapes, found.source, dtype=dtype)
    return Component(found.config, params, found.bare_names)
