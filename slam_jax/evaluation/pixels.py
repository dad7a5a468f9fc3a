"""Pictures as they are measured: 8 bits, of one size."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from slam_jax.data import image
from slam_jax.data.image import Crop
from slam_jax.errors import BadSample, UserError
from slam_jax.evaluation.protocol import Images

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Pixels = UInt8[np.ndarray, "B S S 3"]


def resized(drawn: UInt8[np.ndarray, "B H W 3"], wanted: Images) -> Pixels:
    """Every picture in the size that is measured, by Pillow, antialiased."""
    return np.stack([_resized(Image.fromarray(picture), wanted) for picture in drawn])


def _resized(picture: Image.Image, wanted: Images) -> UInt8[np.ndarray, "S S 3"]:
    size = (wanted.resize, wanted.resize)
    if picture.size != size:
        picture = picture.resize(size, _FILTERS[wanted.filter])
    return np.asarray(picture)


def files(folder: Path) -> list[Path]:
    """The pictures below the folder, in the order of their names; UserError if there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise UserError(f"--reference {folder} holds no pictures ({', '.join(_SUFFIXES)})")
    return found


def read(path: Path, crop: str, wanted: Images) -> tuple[UInt8[np.ndarray, "S S 3"], str]:
    """A picture in the size that is measured, and the sha256 of its file.

    crop: "middle", its largest square; or "none", for which it must be a square of images.size.
    UserError names a file that is no whole picture, or of another size.
    """
    try:
        content = path.read_bytes()
        opened = image.opened(content)
        side = min(opened.size)
        if crop == "none" and opened.size != (wanted.size, wanted.size):
            raise BadSample(
                f"{opened.size[0]} x {opened.size[1]} pixels, where reference.crop none asks for "
                f"{wanted.size} x {wanted.size}"
            )
        square = image.square(opened, Crop(side, False, False), np.random.default_rng(0)).pixels
    except (OSError, BadSample) as error:
        raise UserError(f"cannot use {path} ({error}); mend it or take it away") from None
    picture = _resized(Image.fromarray(square), wanted)
    return picture, hashlib.sha256(content).hexdigest()


def batches(numbers: range, size: int) -> Iterator[np.ndarray]:
    """The numbers, `size` at a time, the last batch filled up from its first, as they compile."""
    for first in range(numbers.start, numbers.stop, size):
        chosen = np.arange(first, first + size)
        yield np.where(chosen < numbers.stop, chosen, numbers.start)
