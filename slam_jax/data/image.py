"""Image files -> square uint8 arrays."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from slam_jax.errors import BadSample, UserError

# The web's; of the others, some make Pillow start programs or libraries that print.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# What Pillow's readers raise on damaged files; warnings too, where someone makes them errors.
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError,
    MemoryError, AssertionError, AttributeError, RuntimeError, struct.error, zlib.error, Warning,
)  # fmt: skip

# What brings an EXIF orientation upright; 1 and any other number say that it is.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of odd metadata, of which among millions of pictures there is always some. It has
# to be said once and for all: threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    """The picture, of which no more than the header may have been read.

    BadSample if it is none, or of more pixels than Pillow takes for harmless.
    """
    if len(content) == 0:
        raise BadSample("empty picture file")
    with _bad_if_damaged():
        if isinstance(content, np.ndarray):
            picture = Image.fromarray(content)
        else:
            picture = Image.open(io.BytesIO(content), formats=_FORMATS)
        width, height = picture.size
        # Up to twice as many are but a warning of Pillow's.
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
    if width * height == 0:
        raise BadSample("picture without pixels")
    return picture


def square(picture: Image.Image, crop: Crop, rng: np.random.Generator) -> Square:
    """The picture as a person sees it, resized by Pillow's antialiased bicubic and cut.

    Orientation tags are followed, transparency is laid on white; of an animation, the first frame.
    BadSample if it cannot be decoded.
    """
    with _bad_if_damaged():
        upright = _rgb(_upright(picture))
    width, height = upright.size
    scale = crop.size / min(width, height)
    scaled = np.array([max(crop.size, round(side * scale)) for side in (width, height)])
    if scaled.max() > np.iinfo(np.int32).max:
        raise BadSample("picture too narrow")
    room = scaled - crop.size
    left, top = (rng.integers(room + 1) if crop.random else room // 2).tolist()
    cut = _resized(upright, scaled, left, top, crop.size)
    if crop.flip and rng.random() < 0.5:
        # Several times faster than to reverse and copy a numpy array.
        cut, left = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT), room[0] - left
    time_ids = np.array([height, width, top, left, crop.size, crop.size], np.int32)
    return Square(np.asarray(cut), time_ids)


def read(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square of a picture file; UserError, naming it, if it is no whole picture."""
    try:
        content = path.read_bytes()
        middle = Crop(size, random=False, flip=False)
        return square(opened(content), middle, np.random.default_rng(0)).pixels
    except (OSError, BadSample) as error:
        raise UserError(
            f"cannot read {path} ({error}); give a JPEG, PNG, WebP, GIF or BMP picture"
        ) from None


@contextlib.contextmanager
def _bad_if_damaged() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise BadSample("no picture in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample(f"picture of more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except _DAMAGE:
        raise BadSample("damaged picture") from None


def _upright(picture: Image.Image) -> Image.Image:
    """The decoded picture turned as its EXIF orientation says, as it is if the EXIF is damaged."""
    picture.load()
    try:
        turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation))
    except _DAMAGE:
        return picture
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits, whatever the mode."""
    if picture.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion clips them.
        grey = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _resized(
    picture: Image.Image, scaled: Int[np.ndarray, "2"], left: int, top: int, size: int
) -> Image.Image:
    """The square at (left, top) of the picture resized to `scaled`.

    The rest, of a narrow picture gigabytes, is never computed. Pillow may take the two axes in
    the other order than for the whole, which shows where bicubic overshoots white or black.
    """
    corners = np.array([left, top, left + size, top + size])
    if picture.size == tuple(scaled):
        return picture.crop(tuple(corners))
    box = corners * np.tile(picture.size / scaled, 2)
    return picture.resize((size, size), Image.Resampling.BICUBIC, tuple(box))
