"""Pictures for people: a grid of images, and its PNG."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

_GAP = 2
_BACKGROUND = 255
_LEGIBLE = 96  # pixels; smaller images are enlarged without smoothing


def grid(images: Float[np.ndarray, "R C H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Images in [0, 1], R rows of C, a white gap between; small ones are enlarged."""
    rows, columns, height, width, _ = images.shape
    pixels = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    times = max(1, -(-_LEGIBLE // width))
    pixels = pixels.repeat(times, axis=2).repeat(times, axis=3)
    height, width = height * times, width * times
    canvas = np.full(
        (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _BACKGROUND, np.uint8
    )
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + _GAP), column * (width + _GAP)
            canvas[top : top + height, left : left + width] = pixels[row, column]
    return canvas


def png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
