"""Both resizes against torch-fidelity's and clean-fid's way, written with their own libraries."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slam_jax.errors import UserError
from slam_jax.metrics import inception_input

sys.path.append(str(Path(__file__).parents[1]))
fidelity = importlib.import_module("fidelity")

WAYS = [inception_input.clean, inception_input.legacy]
SIZES = [(512, 512), (299, 299), (40, 71), (640, 301), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_legacy_is_the_resize_of_tensorflow_1(height, width):
    pictures = fidelity.pictures(3, height, width)
    resize = fidelity.module(
        "interpolate_compat_tensorflow"
    ).interpolate_bilinear_2d_like_tensorflow1x
    theirs = resize(fidelity.to_torch(pictures).float(), (299, 299), align_corners=False)
    theirs = ((theirs - 128) / 128).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inception_input.legacy(pictures), theirs, atol=1e-6, rtol=0)


def pillow(picture: np.ndarray) -> np.ndarray:
    """clean-fid's way: each channel an image of mode F, cut to 0..255."""
    channels = [
        Image.frombytes("L", picture.shape[1::-1], picture[:, :, channel].tobytes())
        .convert("F").resize((299, 299), Image.BICUBIC)
        for channel in range(3)
    ]  # fmt: skip
    values = [np.frombuffer(channel.tobytes(), "<f4").reshape(299, 299) for channel in channels]
    return np.clip(np.stack(values, axis=2), 0, 255)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clean_is_pillows_bicubic_channel_by_channel(height, width):
    pictures = fidelity.pictures(3, height, width)
    theirs = np.stack([(pillow(picture) - 128) / 128 for picture in pictures])
    np.testing.assert_allclose(inception_input.clean(pictures), theirs, atol=1e-6, rtol=0)


def test_clean_averages_as_torchs_antialiased_bicubic():
    """Inside, where no pixel is cut to 0..255; torch weighs in float32, Pillow in float64."""
    pictures = fidelity.pictures(2, 450, 640) // 2 + 64
    shrunk = torch.nn.functional.interpolate(
        fidelity.to_torch(pictures).float(), (299, 299), mode="bicubic", antialias=True
    )
    theirs = ((shrunk - 128) / 128).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inception_input.clean(pictures), theirs, atol=1e-4, rtol=0)


def test_clean_is_cut_to_what_pixels_can_be():
    """Bicubic filters overshoot at edges."""
    edge = np.zeros((1, 20, 20, 3), np.uint8)
    edge[:, 10:] = 255
    resized = inception_input.clean(edge)
    assert resized.min() == -1.0 and resized.max() == 127 / 128
    assert 0.0 < np.mean(resized == -1.0) < 0.5


@pytest.mark.parametrize("way", WAYS)
def test_pictures_are_float32_and_there_may_be_none(way):
    assert way(fidelity.pictures(2, 30, 20)).dtype == np.float32
    assert way(np.empty((0, 30, 20, 3), np.uint8)).shape == (0, 299, 299, 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int64])
def test_pictures_that_are_not_8_bit_are_refused(way, dtype):
    with pytest.raises(UserError, match=rf"are {np.dtype(dtype)} \[2, 30, 20, 3\].*8 bits"):
        way(fidelity.pictures(2, 30, 20).astype(dtype))
