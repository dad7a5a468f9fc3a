"""What is where in a model folder of diffusers' layout, found and checked before any is loaded.

Only JSON, safetensors and Flax's msgpack are opened: pickles (.bin, .ckpt, .pt) can run code
when read.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from slam_jax.errors import UserError
from slam_jax.weights import flaxfile, tensorfile

# The networks of a folder and their classes, and which of them a pipeline is made of.
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
SDXL = "StableDiffusionXLPipeline"
PIPELINES = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "LatentConsistencyModelPipeline": ("unet", "vae", "text_encoder"),
    SDXL: ("unet", "vae", "text_encoder", "text_encoder_2"),
}
_SUPPORTED = (
    "supported are Stable Diffusion 1.x, 2.x and XL and their LCM students, as diffusers folders"
)

# Keys of Flax configs that change no result, and that torch's classes do not know.
_FLAX_ONLY = ("use_memory_efficient_attention", "split_head_dim")
# What Flax calls the file of weights that torch calls so.
FLAX_STEMS = {"diffusion_pytorch_model": "diffusion_flax_model", "model": "flax_model"}

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CONVERT = (
    'convert it once, where you trust it: python -c "from diffusers import '
    "StableDiffusionPipeline as P; {load}.save_pretrained('CONVERTED')\""
)


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give a folder in diffusers' layout"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_config(path: Path) -> dict:
    """A JSON file that says of which class a thing is; a Flax class becomes its torch twin."""
    config = {key: value for key, value in read_json(path).items() if key not in _FLAX_ONLY}
    if "_class_name" in config:
        config["_class_name"] = _torch_class(config["_class_name"])
    return config


def _torch_class(name):
    """diffusers' old Flax classes had torch's names with Flax before them."""
    return name.removeprefix("Flax") if isinstance(name, str) else name


def read_index(root: Path) -> dict:
    """model_index.json, if the folder is of a supported family; else UserError."""
    if root.suffix in PICKLES and root.is_file():
        convert = _CONVERT.format(load="P.from_single_file('FILE')")
        raise UserError(f"{root} is a pickle, which is never opened; {convert}")
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; give one in diffusers' layout, or a model of the "
            "Hugging Face hub as ORG/NAME"
        )
    if not (root / "model_index.json").is_file():
        raise UserError(f"{root} holds no model_index.json, so it is no pipeline; {_SUPPORTED}")
    index = read_config(root / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise UserError(f"{root} is a {index.get('_class_name')}; {_SUPPORTED}")
    for part in PIPELINES[index["_class_name"]]:
        found = index.get(part)
        if not isinstance(found, list) or _torch_class(found[-1]) != PARTS[part]:
            raise UserError(
                f"{root}/model_index.json: {part} is {found}, not a {PARTS[part]}; {_SUPPORTED}"
            )
    return index


def read_scheduler(root: Path) -> dict:
    """scheduler/scheduler_config.json, which must name its class."""
    path = root / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    if not isinstance(config.get("_class_name"), str):
        raise UserError(f"{path} lacks _class_name; set it, for example to DDIMScheduler")
    return config


def find_tokenizer(path: Path) -> Path:
    """The folder itself, if it holds a tokenizer: vocab.json and merges.txt, or tokenizer.json."""
    pair = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
    if not pair and not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has neither vocab.json with merges.txt nor tokenizer.json; "
            "copy a CLIP tokenizer's files there"
        )
    return path


def find_tensors(
    part: Path, stem: str, variant: str | None
) -> tuple[Path, dict[str, tensorfile.Stored]]:
    """The file of a part's weights, or the index of its shards; and its tensors by torch name.

    stem: file name without variant and suffix. As in diffusers an index goes before a file;
    Flax's msgpack comes last, and has no variants.
    """
    index, single = f"{stem}.safetensors.index.json", weights_name(stem, variant)
    if variant is not None:
        index = f"{stem}.safetensors.index.{variant}.json"
    if (part / index).is_file():
        return part / index, _read_shards(part / index)
    if (part / single).is_file():
        return part / single, tensorfile.read(part / single)
    msgpack = f"{FLAX_STEMS[stem]}.msgpack"
    if variant is None and (part / msgpack).is_file():
        return part / msgpack, flaxfile.read(part / msgpack)
    raise UserError(_no_weights(part, single))


def weights_name(stem: str, variant: str | None) -> str:
    """File name of weights in one piece: stem.safetensors or stem.VARIANT.safetensors."""
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def _read_shards(path: Path) -> dict[str, tensorfile.Stored]:
    """The tensors that an index lists; UserError unless its files hold exactly those."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(_is_plain(name) for name in shard_of.values()):
        raise UserError(
            f"{path}: weight_map must give the name of a file beside it for every tensor; "
            "copy or download it again"
        )
    tensors: dict[str, tensorfile.Stored] = {}
    for shard in sorted(set(shard_of.values())):
        found = tensorfile.read(path.parent / shard)
        listed = {name for name in shard_of if shard_of[name] == shard}
        for name in sorted(listed ^ found.keys()):
            raise UserError(
                f"{path} and {shard} disagree about tensor {name!r}; they belong to different "
                "models, so copy or download all of them again"
            )
        tensors |= found
    return tensors


def _is_plain(name) -> bool:
    """Whether `name` is a file name and nothing that leads elsewhere."""
    return isinstance(name, str) and name != "" and Path(name).name == name


def _no_weights(part: Path, wanted: str) -> str:
    """Why `part` has no file `wanted`, and what to do about it."""
    if not part.is_dir():
        return f"there is no folder {part}; give a whole folder in diffusers' layout"
    files = sorted(path.name for path in part.iterdir())
    suffixes = (".safetensors", ".safetensors.index.json", ".msgpack")
    safe = [name for name in files if name.endswith(suffixes)]
    safe += [name for name in files if ".safetensors.index." in name and name not in safe]
    pickles = [name for name in files if name.endswith(PICKLES)]
    if safe:
        return (
            f"{part} has no {wanted}, but {', '.join(safe[:3])}; set the variant to the word "
            "between the dots of that name, or to none"
        )
    if pickles:
        convert = _CONVERT.format(load="P.from_pretrained('FOLDER', use_safetensors=False)")
        return f"{part} has only {pickles[0]}, a pickle, which is never opened; {convert}"
    return f"{part} has no {wanted}; copy or download the folder again"


def model_index(scheduler: Mapping) -> dict:
    """A StableDiffusionPipeline's model_index.json, without safety checker."""
    return {
        **_index("StableDiffusionPipeline", scheduler),
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }


def sdxl_model_index(scheduler: Mapping, force_zeros_for_empty_prompt: bool) -> dict:
    """A StableDiffusionXLPipeline's model_index.json."""
    return {
        **_index(SDXL, scheduler),
        "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
        "text_encoder_2": ["transformers", PARTS["text_encoder_2"]],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def _index(class_name: str, scheduler: Mapping) -> dict:
    """What all pipelines have."""
    return {
        "_class_name": class_name,
        # The first version that samples an LCM student at the right times (METHOD.md §4).
        "_diffusers_version": "0.24.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", PARTS["text_encoder"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", PARTS["unet"]],
        "vae": ["diffusers", PARTS["vae"]],
    }


def write_json(path: Path, value: Mapping) -> None:
    """JSON as diffusers writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
