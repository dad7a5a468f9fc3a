"""Pictures as the Frechet inception distance's network takes them: 299 x 299, two ways.

How pictures are resized moves the distance by points, so a number is worth nothing without it.
Both ways squeeze whole pictures of 8-bit RGB into the square, and end in the network's own scale,
(x - 128) / 128.
"""

import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image

from slam_jax.errors import UserError

_SIZE = 299
_CENTRE = np.float32(128.0)


def clean(images: Shaped[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B 299 299 3"]:
    """By Pillow's bicubic filter, which averages when it shrinks; not rounded, cut to 0..255.

    What clean-fid calls "clean" (Parmar et al. 2022), number for number. UserError if the images
    are not uint8.
    """
    _check(images)
    resized = np.empty((len(images), _SIZE, _SIZE, 3), np.float32)
    for image, to in zip(images, resized, strict=True):
        for channel in range(3):
            # As floats: of 8-bit pictures Pillow would round the result.
            picture = Image.fromarray(image[..., channel].astype(np.float32))
            to[..., channel] = picture.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
    return _scaled(resized.clip(0.0, 255.0))


def legacy(images: Shaped[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B 299 299 3"]:
    """By the bilinear resize of TensorFlow 1, which the distance was published with.

    Pixel i is at i, not at i + 1/2, and shrinking skips pixels. What torch-fidelity does, number
    for number, and what clean-fid calls "legacy_tensorflow", up to rounding; not pytorch-fid's
    ("legacy_pytorch"), whose pixel i is at i + 1/2 and which scales to [-1, 1]. UserError if the
    images are not uint8.
    """
    _check(images)
    (top, bottom, down), (left, right, across) = map(_neighbours, images.shape[1:3])
    rows = images.astype(np.float32)
    rows = _between(rows[:, :, left], rows[:, :, right], across[:, None])
    return _scaled(_between(rows[:, top], rows[:, bottom], down[:, None, None]))


def _neighbours(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each new pixel the old ones before and after it, and how far it is from the first."""
    # float32 as TensorFlow has it: in float64 some places fall on another pixel.
    place = np.arange(_SIZE, dtype=np.float32) * np.float32(size / _SIZE)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), place - first.astype(np.float32)


def _between(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share


def _scaled(images: np.ndarray) -> np.ndarray:
    return (images - _CENTRE) / _CENTRE


def _check(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"pictures are {images.dtype} {list(images.shape)}; Inception's features are of RGB "
            "with 8 bits, uint8 [B, H, W, 3]"
        )
