"""A CLIP for scoring: a folder in the layout of transformers' CLIPModel, read and checked.

Its weights may be in OpenCLIP's layout too, as fine-tunes of OpenCLIP's models are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slam_jax.errors import UserError
from slam_jax.weights import folder as folders
from slam_jax.weights import (
    hub,
    ldm,
    ldm_names,
    names,
    pretrained,
    templates,
    tensorfile,
    translate,
)

_FILES = [
    "config.json", "preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
]  # fmt: skip
_SAFETENSORS = [
    "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors",
]  # fmt: skip
_MSGPACK = f"{folders.FLAX_STEMS['model']}.msgpack"
# Of OpenCLIP's own layout, as its repositories and its fine-tunes have it.
OPEN_CLIP = "open_clip_model.safetensors"
_WEIGHTS = (*_SAFETENSORS[:2], _MSGPACK, OPEN_CLIP)

# transformers' CLIPModel reads of its config.json these keys alone, and takes these values for
# what is not there.
_COMMON = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = _COMMON | {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip
_IMAGE = _COMMON | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_channels": 3,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
_PROJECTION_DIM = 512

_LAYOUT = (
    "give a folder in the layout of transformers' CLIPModel, such as openai/clip-vit-large-patch14"
)
_CONVERT = (
    'convert it once, where you trust it: python -c "from transformers import CLIPModel as M; '
    "M.from_pretrained('FOLDER', use_safetensors=False).save_pretrained('FOLDER')\""
)
_CONVERT_OPEN_CLIP = (
    "convert it once, where you trust it, into a folder with the config.json, tokenizer and "
    "preprocessor_config.json of the model that it was trained from (and not its weights): python "
    '-c "import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in '
    "torch.load('{name}', map_location='cpu', weights_only=True)['state_dict'].items()}}, "
    "'FOLDER/open_clip_model.safetensors')\""
)


class CLIP(NamedTuple):
    """Both towers, preprocessor_config.json's content, and the tokenizer's folder.

    A tower's config holds all that its network is built from, in the keys of transformers'
    CLIPTextConfig and CLIPVisionConfig; projection_dim is that of both.
    """

    text: pretrained.Component
    image: pretrained.Component
    preprocessor: dict
    tokenizer: Path


def locate(model: str, revision: str = "") -> Path:
    """The folder of `model`: it itself, or where ORG/NAME of the hub was fetched to.

    Of the weights come safetensors, or, where there are none, Flax's msgpack and OpenCLIP's own;
    never a pickle.
    """
    root = hub.locate_files(model, revision, [*_FILES, *_SAFETENSORS])
    if root.is_dir() and not _has_weights(root):
        root = hub.locate_files(model, revision, [*_FILES, _MSGPACK, OPEN_CLIP])
    return root


def read(folder: str | Path) -> CLIP:
    """The CLIP in `folder`, its parameters in float32; all is checked before any is loaded.

    UserError, naming file and tensor, for what is missing, of another kind or misshapen.
    """
    root = Path(folder)
    if root.is_file():
        raise UserError(_not_a_folder(root))
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; {_LAYOUT}")
    text, image = _described(root / "config.json")
    if not _has_weights(root):
        raise UserError(_no_weights(root))
    preprocessor = _preprocessor(root)
    tokenizer = folders.find_tokenizer(root)
    source, tensors = _tensors(root, text, image)
    # In one piece, so that what neither tower has is told of.
    found = translate.find(tensors, {**text.shapes, **image.shapes}, str(source))
    params = translate.load(found, dtype=np.float32)
    towers = (
        pretrained.Component(each.config, {module: params[module] for module in each.shapes})
        for each in (text, image)
    )
    return CLIP(*towers, preprocessor, tokenizer)


def _described(path: Path) -> tuple[pretrained.Described, pretrained.Described]:
    """The text and the image tower of a config.json, the names of whose parameters differ."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no config.json; {_LAYOUT}")
    text, image = tower_configs(path, folders.read_json(path))
    try:
        return (
            pretrained.Described(text, templates.of_text_encoder(text)),
            pretrained.Described(image, templates.of_clip_image(image)),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} describes no network that can be built ({line}); correct it"
        ) from None


def tower_configs(path: str | Path, config: Mapping) -> tuple[dict, dict]:
    """The text tower's and the image tower's, as transformers understands a CLIPModel's config.

    path: of the config.json, for messages.
    """
    if config.get("model_type") != "clip":
        kind = config.get("model_type")
        raise UserError(f"{path} is of model_type {kind!r}, not 'clip'; {_LAYOUT}")
    architectures = config.get("architectures") or ["CLIPModel"]
    if architectures != ["CLIPModel"]:
        raise UserError(f"{path} is of {architectures}, not ['CLIPModel']; {_LAYOUT}")
    projection_dim = config.get("projection_dim", _PROJECTION_DIM)
    text, image = (
        {**_resolved(path, config, name, defaults), "projection_dim": projection_dim}
        for name, defaults in (("text_config", _TEXT), ("vision_config", _IMAGE))
    )
    return {"architectures": ["CLIPTextModelWithProjection"], **text}, image


def _resolved(path: str | Path, config: Mapping, name: str, defaults: Mapping) -> dict:
    """A tower's config with exactly the keys of `defaults`.

    Older files hold it twice, and in them text_config_dict is what counts.
    """
    key = name if config.get(f"{name}_dict") is None else f"{name}_dict"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: {key} is {given!r}, not a JSON object; {_LAYOUT}")
    return {key: given.get(key, value) for key, value in defaults.items()}


def _has_weights(root: Path) -> bool:
    return any((root / name).is_file() for name in _WEIGHTS)


def _preprocessor(root: Path) -> dict:
    """preprocessor_config.json, or what processor_config.json of transformers 5 says in it."""
    newer = root / "processor_config.json"
    if newer.is_file() and isinstance(
        config := folders.read_json(newer).get("image_processor"), dict
    ):
        return config
    path = root / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(
            f"{root} holds neither preprocessor_config.json nor processor_config.json, which say "
            "how pictures are prepared; copy the model's own"
        )
    return folders.read_json(path)


def _tensors(
    root: Path, text: pretrained.Described, image: pretrained.Described
) -> tuple[Path, dict[str, tensorfile.Stored]]:
    """The file of weights, and its tensors by our names."""
    if not any((root / name).is_file() for name in _WEIGHTS if name != OPEN_CLIP):
        return root / OPEN_CLIP, _from_open_clip(root / OPEN_CLIP, text, image)
    source, stored = folders.find_tensors(root, "model", None)
    named = {names.clip(name): tensor for name, tensor in stored.items()}
    return source, {name: tensor for name, tensor in named.items() if name is not None}


def _from_open_clip(
    path: Path, text: pretrained.Described, image: pretrained.Described
) -> dict[str, tensorfile.Stored]:
    """OpenCLIP's tensors by our names; UserError unless they are the towers'."""
    modules = {
        **ldm_names.open_clip(text.config["num_hidden_layers"]),
        **ldm_names.open_clip_image(image.config["num_hidden_layers"]),
    }
    layout = ldm.Layout("", modules)
    shapes = translate.torch_shapes({**text.shapes, **image.shapes})
    stored = {
        key: tensor
        for key, tensor in tensorfile.read(path).items()
        if key not in ("logit_scale", "attn_mask")
    }
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    wanted = {key: tensor.shape for key, tensor in ldm.to_ldm(empty, layout).items()}
    remedy = "weights and config.json must be of one model"
    translate.compare(stored, wanted, str(path), remedy)
    return ldm.from_ldm(stored, shapes, layout)


def _not_a_folder(path: Path) -> str:
    if path.suffix in folders.PICKLES:
        convert = _CONVERT_OPEN_CLIP.format(name=path.name)
        return f"{path} is a pickle, which is never opened; {convert}"
    return f"{path} is no folder; {_LAYOUT}"


def _no_weights(root: Path) -> str:
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in folders.PICKLES)
    if pickles:
        return f"{root} has only {pickles[0]}, a pickle, which is never opened; {_CONVERT}"
    return f"{root} has no model.safetensors; copy or download the folder again"
