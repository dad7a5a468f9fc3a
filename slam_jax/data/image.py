"""Image files -> square uint8 arrays."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from slam_jax.errors import UserError


def read(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square of the picture, `size` pixels wide, as a person sees it.

    Orientation tags are followed, transparency is laid on white, the short side is resized by
    antialiased bicubic. UserError, naming the file, if it is no whole picture.
    """
    try:
        with Image.open(path) as file:
            picture = _on_white(ImageOps.exif_transpose(file))
            return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture that can be read; remove it") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path} ({error}); copy it again or remove it") from None


def normalize(pixels: UInt8[np.ndarray, "*S"]) -> Float32[np.ndarray, "*S"]:
    """0 … 255 -> [-1, 1], as the VAE takes them."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, whatever the mode."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
