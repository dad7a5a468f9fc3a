"""Grids and PNG files."""

import io

import numpy as np
from PIL import Image

from slam_jax.runtime import images


def test_grid_places_rows_and_columns_with_a_gap():
    colors = np.linspace(0, 1, 2 * 3 * 3).reshape(2, 3, 1, 1, 3)
    pixels = images.grid(np.broadcast_to(colors, (2, 3, 100, 100, 3)))
    assert pixels.shape == (202, 304, 3) and pixels.dtype == np.uint8
    for row in range(2):
        for column in range(3):
            expected = np.round(colors[row, column, 0, 0] * 255)
            assert (pixels[102 * row + 50, 102 * column + 50] == expected).all()
    assert (pixels[100:102] == 255).all() and (pixels[:, 100:102] == 255).all()


def test_small_images_are_enlarged_without_smoothing():
    pixels = images.grid(np.eye(32)[None, None, :, :, None].repeat(3, axis=-1))
    assert pixels.shape == (96, 96, 3)
    np.testing.assert_array_equal(pixels[::3, ::3, 0], 255 * np.eye(32))


def test_png_round_trip():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(Image.open(io.BytesIO(images.png(pixels))), pixels)
