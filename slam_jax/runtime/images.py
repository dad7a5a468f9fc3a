"""Pictures for people: a grid of images, and its PNG."""

import io
import textwrap

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

_GAP = 2
_BACKGROUND = 255
_FONT_SIZE = 12  # pixels
_LEGIBLE = 96  # pixels; smaller images are enlarged without smoothing


def quantize(images: Float[np.ndarray, "*S"]) -> UInt8[np.ndarray, "*S"]:
    """[0, 1], clipped, to the nearest of 256 levels."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def grid(images: Float[np.ndarray, "R C H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Images in [0, 1], R rows of C, a white gap between; small ones are enlarged."""
    rows, columns, height, width, _ = images.shape
    pixels = quantize(images)
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


def png(pixels: UInt8[np.ndarray, "h w 3"], **notes: str) -> bytes:
    """The bytes of a PNG file; notes go into its text chunks."""
    buffer, text = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, note in notes.items():
        text.add_itxt(key, note)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def labelled_grid(
    images: Float[np.ndarray, "R C H W 3"], row_names: list[str], column_names: list[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """The grid with a name left of every row and one, wrapped, above every column."""
    pixels = Image.fromarray(grid(images))
    rows, columns = images.shape[:2]
    row_height, column_width = (pixels.height + _GAP) // rows, (pixels.width + _GAP) // columns
    font = ImageFont.load_default(_FONT_SIZE)
    wrapped = [textwrap.fill(name, column_width * 3 // (2 * _FONT_SIZE)) for name in column_names]
    left = max(int(font.getlength(name)) for name in row_names) + 4 * _GAP
    top = (max(text.count("\n") for text in wrapped) + 1) * (_FONT_SIZE + 4) + 2 * _GAP
    canvas = Image.new("RGB", (left + pixels.width, top + pixels.height), (_BACKGROUND,) * 3)
    canvas.paste(pixels, (left, top))
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(row_names):
        middle = top + row * row_height + row_height // 2
        draw.text((_GAP, middle), name, "black", font, anchor="lm")
    for column, text in enumerate(wrapped):
        draw.multiline_text((left + column * column_width, 0), text, "black", font)
    return np.asarray(canvas)
