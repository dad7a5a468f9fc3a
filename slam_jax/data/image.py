"""Image files -> square uint8 arrays."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from slam_jax.errors import BadSample, UserError

# What Pillow's readers raise on damaged files.
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip

# A picture of more than Image.MAX_IMAGE_PIXELS is refused, not only warned of.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class Crop(NamedTuple):
    """How a picture becomes a square, its short side resized to `size` pixels first."""

    size: int
    random: bool  # where along the long side: anywhere, or in the middle
    flip: bool  # mirror half of the pictures, chosen at random


class Square(NamedTuple):
    """A picture as a network takes it."""

    pixels: UInt8[np.ndarray, "size size 3"]
    time_ids: Int32[np.ndarray, "6"]  # what SDXL is told of it (shapes.SDXLText)


def opened(content: bytes | UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """The picture, of which no more than the header may have been read. BadSample if it is none."""
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    if not content:
        raise BadSample("empty picture file")
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise BadSample("no picture that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample(f"picture of more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except _DAMAGE:
        raise BadSample("damaged picture") from None


def square(picture: Image.Image, crop: Crop, rng: np.random.Generator) -> Square:
    """The picture as a person sees it, resized by antialiased bicubic and cut.

    Orientation tags are followed, transparency is laid on white. BadSample if it cannot be decoded.
    """
    try:
        upright = _rgb(ImageOps.exif_transpose(picture))
        width, height = upright.size
        scale = crop.size / min(width, height)
        scaled = tuple(max(crop.size, round(side * scale)) for side in (width, height))
        if scaled != upright.size:
            upright = upright.resize(scaled, Image.Resampling.BICUBIC)
    except _DAMAGE:
        raise BadSample("damaged picture") from None
    room = np.subtract(scaled, crop.size)
    left, top = rng.integers(room + 1) if crop.random else room // 2
    pixels = np.asarray(upright.crop((left, top, left + crop.size, top + crop.size)))
    if crop.flip and rng.random() < 0.5:
        pixels, left = pixels[:, ::-1], room[0] - left
    time_ids = np.array([height, width, top, left, crop.size, crop.size], np.int32)
    return Square(np.ascontiguousarray(pixels), time_ids)


def read(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square of a picture file; UserError, naming it, if it is no whole picture."""
    try:
        content = path.read_bytes()
        middle = Crop(size, random=False, flip=False)
        return square(opened(content), middle, np.random.default_rng(0)).pixels
    except (OSError, BadSample) as error:
        raise UserError(f"cannot read {path} ({error}); give another picture") from None


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits, whatever the mode."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion clips them.
        grey = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    return picture.convert("RGB")
