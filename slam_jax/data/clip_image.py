"""Pictures as CLIP's image tower takes them, prepared on the host by Pillow.

The same as transformers' CLIPImageProcessor in the form that works with Pillow, which is called
CLIPImageProcessorPil since version 5; the fast form, torchvision's, resizes otherwise.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from slam_jax.errors import UserError

# What transformers takes for keys that a preprocessor_config.json lacks.
_DEFAULTS = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_REQUIRED_VALUES = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
    "resample": Image.Resampling.BICUBIC,
}  # fmt: skip


class Preprocessing(NamedTuple):
    """What a preprocessor_config.json sets."""

    short_side: int  # to which a picture is resized, in pixels
    crop: int  # side of the middle square that is kept
    scale: float  # of 8-bit values, before mean and deviation are applied
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def from_config(config: Mapping) -> Preprocessing:
    """What a preprocessor_config.json asks for; UserError for what is not built."""
    config = {**_DEFAULTS, **_REQUIRED_VALUES, **config}
    for key, value in _REQUIRED_VALUES.items():
        if config[key] != value:
            raise UserError(
                f"preprocessor_config.json: {key} {config[key]!r} is not supported; it must be "
                f"{int(value) if key == 'resample' else value}"
            )
    short_side = _pixels("size", config["size"], {"shortest_edge"})
    crop = _pixels("crop_size", config["crop_size"], {"height", "width"})
    if crop > short_side:
        raise UserError(
            f"preprocessor_config.json: a crop_size of {crop} does not fit in pictures whose short "
            f"side is {short_side}; take the file from the model's own folder"
        )
    mean, std = (_numbers(key, config[key], 3) for key in ("image_mean", "image_std"))
    (scale,) = _numbers("rescale_factor", [config["rescale_factor"]], 1)
    return Preprocessing(short_side, crop, scale, mean, std)


def _pixels(key: str, value, keys: set[str]) -> int:
    """A side in pixels: a number, as older files have it, or one under each of the keys."""
    sides = {value} if isinstance(value, int) else set()
    if isinstance(value, Mapping) and value.keys() == keys:
        sides = set(value.values())
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or side < 1:
        raise UserError(
            f"preprocessor_config.json: {key} {value!r} is not supported; it must be one number "
            f"of pixels, or give {' and '.join(sorted(keys))} as the same"
        )
    return side


def _numbers(key: str, value, count: int) -> tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) != count or not all(isinstance(each, int | float) for each in numbers):
        raise UserError(
            f"preprocessor_config.json: {key} is {value!r}, not {count} numbers; "
            "take the file from the model's own folder"
        )
    return tuple(map(float, numbers))


def prepare(
    preprocessing: Preprocessing, pictures: UInt8[np.ndarray, "B H W 3"]
) -> Float32[np.ndarray, "B S S 3"]:
    """RGB pictures of any size, S the crop: short side by Pillow's bicubic, middle, normalized.

    Resized pictures are rounded to 8 bits.
    """
    squares = np.stack([_square(preprocessing, picture) for picture in pictures])
    # One row for each of the 256 values, in transformers' order and precision.
    values = (np.arange(256) * preprocessing.scale).astype(np.float32)
    mean, std = (np.array(each, np.float32) for each in preprocessing[-2:])
    table = (values[:, None] - mean) / std
    return table[squares, np.arange(3)]


def _square(
    preprocessing: Preprocessing, picture: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "S S 3"]:
    whole = Image.fromarray(picture)
    short = min(whole.size)
    # Rounded down, as transformers and torchvision do.
    size = tuple(int(preprocessing.short_side * side / short) for side in whole.size)
    resized = whole.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - preprocessing.crop) // 2 for side in size)
    box = (left, top, left + preprocessing.crop, top + preprocessing.crop)
    return np.asarray(resized.crop(box))
