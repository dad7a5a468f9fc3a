"""Picture files to squares: against numpy, plain Pillow, and damage of every kind."""

import io
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import image
from slam_jax.errors import BadSample, UserError

ROOT = pathlib.Path(__file__).parents[2]


def noise(height, width, channels=3):
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height, width):
    """Waves that stay clear of black and white, so that no filter overshoots them."""
    y, x, c = np.ogrid[:height, :width, :3]
    return np.uint8(128 + 60 * np.sin(y / 7 + c) * np.cos(x / 11 - c))


def saved(picture, **options):
    out = io.BytesIO()
    picture.save(out, **options)
    return out.getvalue()


def png(pixels, **options):
    return saved(Image.fromarray(pixels), format="PNG", **options)


def squared(content, size, *, random=False, flip=False, seed=0):
    crop = image.Crop(size, random, flip)
    return image.square(image.opened(content), crop, np.random.default_rng(seed))


def middle(content, size=8):
    """The pixels, for comparison as integers."""
    return squared(content, size).pixels.astype(int)


# Where it is cut.


@pytest.mark.parametrize("height, width", [(90, 60), (60, 90), (64, 64), (33, 200), (50, 51)])
@pytest.mark.parametrize("size", [16, 33, 50, 80])
@pytest.mark.parametrize("random", [False, True])
def test_equals_pillows_resize_and_crop(height, width, size, random):
    pixels = smooth(height, width)
    out = squared(png(pixels), size, random=random)
    scale = size / min(height, width)
    scaled = round(width * scale), round(height * scale)
    top, left = out.time_ids[2:4]
    if not random:
        assert (left, top) == ((scaled[0] - size) // 2, (scaled[1] - size) // 2)
    plain = Image.fromarray(pixels).resize(scaled, Image.Resampling.BICUBIC)
    plain = np.asarray(plain.crop((left, top, left + size, top + size)))
    # The two axes may be rounded in the other order; a shift of 0.05 pixels would show.
    np.testing.assert_allclose(out.pixels, plain.astype(int), rtol=0, atol=2)
    assert (out.pixels != plain).mean() < 0.05
    assert out.time_ids.tolist() == [height, width, top, left, size, size]
    assert out.time_ids.dtype == np.int32 and out.pixels.flags.c_contiguous


def test_a_picture_of_that_size_is_cut_untouched():
    pixels = noise(20, 60)
    np.testing.assert_array_equal(middle(png(pixels), 20), pixels[:, 20:40])
    np.testing.assert_array_equal(middle(noise(20, 20), 20), noise(20, 20))


def test_a_small_picture_is_the_mean_of_a_large_one():
    # Without antialiasing a pixel would be one of the noise's, not near their mean.
    assert np.abs(middle(png(noise(256, 256)), 8) - 127.5).max() < 25


@pytest.mark.parametrize("lying", [True, False])
def test_every_place_is_reached_and_none_outside(lying):
    pixels = noise(5, 9)
    pixels = pixels if lying else pixels.swapaxes(0, 1)
    outs = [squared(pixels, 5, random=True, seed=(1, n)) for n in range(60)]
    places = {tuple(out.time_ids[2:4].tolist()) for out in outs}
    assert places == {(0, n) if lying else (n, 0) for n in range(5)}
    for out in outs:
        top, left = out.time_ids[2:4]
        np.testing.assert_array_equal(out.pixels, pixels[top : top + 5, left : left + 5])


def test_half_are_mirrored_and_so_is_their_place():
    pixels = noise(5, 9)
    outs = [squared(pixels, 5, random=True, flip=True, seed=n) for n in range(200)]
    mirrored = 0
    for out in outs:
        left = out.time_ids[3]
        straight = np.array_equal(out.pixels, pixels[:, left : left + 5])
        mirrored += not straight
        if not straight:
            np.testing.assert_array_equal(out.pixels, pixels[:, ::-1][:, left : left + 5])
            assert out.pixels.flags.c_contiguous
    assert 70 < mirrored < 130
    assert {out.time_ids[3] for out in outs} == set(range(5))


def test_is_a_function_of_the_seed():
    draws = [squared(noise(5, 60), 5, random=True, flip=True, seed=seed) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(draws[0].pixels, draws[1].pixels)
    np.testing.assert_array_equal(draws[0].time_ids, draws[1].time_ids)
    assert not np.array_equal(draws[0].pixels, draws[2].pixels)


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (1, 1), (2, 65000)])
def test_narrow_pictures_take_no_gigabytes(shape):
    out = squared(np.full((*shape, 3), 77, np.uint8), 512, random=True)
    assert out.pixels.shape == (512, 512, 3) and (out.pixels == 77).all()
    assert out.time_ids[:2].tolist() == list(shape)


# What is in the file.


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, lambda x: np.rot90(x)),
        (0, lambda x: x),
        (9, lambda x: x),
    ],
)
@pytest.mark.parametrize("kind", [dict(format="PNG"), dict(format="WEBP", lossless=True)])
def test_follows_exif_orientation(orientation, turn, kind):
    pixels, exif = noise(6, 10), Image.Exif()
    exif[0x0112] = orientation
    out = squared(saved(Image.fromarray(pixels), exif=exif, **kind), 6)
    turned = turn(pixels)
    height, width = turned.shape[:2]
    top, left = (height - 6) // 2, (width - 6) // 2
    assert out.time_ids.tolist() == [height, width, top, left, 6, 6]
    np.testing.assert_array_equal(out.pixels, turned[top : top + 6, left : left + 6])


@pytest.mark.filterwarnings("ignore:::PIL.TiffImagePlugin")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0XX\0*\0\0\0\x08", b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01",  # ends within the tag
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02six\0\0\0\0\0",  # text
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_broken_exif_is_taken_as_it_is(exif, kind):
    content = saved(Image.fromarray(smooth(8, 8)), format=kind, quality=100, exif=exif)
    np.testing.assert_allclose(middle(content), smooth(8, 8).astype(int), rtol=0, atol=25)


def test_transparency_is_laid_on_white():
    color, alpha = noise(8, 8), noise(8, 8, 1)
    grey = color[..., :1]
    on_white = lambda c: c * (alpha / 255) + 255 * (1 - alpha / 255)  # noqa: E731
    rgba = png(np.concatenate([color, alpha], -1))
    np.testing.assert_allclose(middle(rgba), on_white(color), rtol=0, atol=1)
    grey_alpha = saved(Image.fromarray(np.concatenate([grey, alpha], -1), "LA"), format="PNG")
    np.testing.assert_allclose(middle(grey_alpha), on_white(grey).repeat(3, -1), rtol=0, atol=1)


def test_palettes():
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    colors = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 8, 7]])
    picture = Image.fromarray(indices, "P")
    picture.putpalette(colors.astype(np.uint8).tobytes())
    for kind in ("PNG", "GIF"):
        np.testing.assert_array_equal(middle(saved(picture, format=kind)), colors[indices])
        clear = saved(picture, format=kind, transparency=2)
        white = np.where((indices == 2)[..., None], 255, colors[indices])
        np.testing.assert_array_equal(middle(clear), white)
    levels = np.array([255, 0, 51, 255])  # a palette of alphas
    half = saved(picture, format="PNG", transparency=levels.astype(np.uint8).tobytes())
    alpha = levels[indices][..., None] / 255
    laid = colors[indices] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(middle(half), laid, rtol=0, atol=1)


def test_greys_of_one_eight_and_sixteen_bits():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    scaled = (grey / 257)[..., None].repeat(3, -1)
    np.testing.assert_allclose(middle(png(grey)), scaled, rtol=0, atol=1)
    eight = noise(8, 8, 1)[..., 0]
    np.testing.assert_array_equal(middle(png(eight)), eight[..., None].repeat(3, -1))
    bits = eight > 127
    one = saved(Image.fromarray(bits), format="PNG")
    np.testing.assert_array_equal(middle(one), 255 * bits[..., None].repeat(3, -1))


def _png_by_hand(width, height, depth, color, rows=b"", *extra):
    """A PNG of kinds that Pillow does not write."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    chunks = b"".join(chunk(*each) for each in extra)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("color, channels", [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_colour(color, channels):
    values = np.random.default_rng(3).integers(0, 65536, (8, 8, channels))
    if channels != 3:
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    seen = values[..., :3] if channels > 2 else values[..., :1].repeat(3, -1)
    np.testing.assert_allclose(middle(_png_by_hand(8, 8, 16, color, rows)), seen / 257, atol=1)


def test_a_transparent_grey_of_sixteen_bits():
    values = np.full((8, 8), 300 * 64, np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = _png_by_hand(8, 8, 16, 0, rows, (b"tRNS", struct.pack(">H", 5)))
    np.testing.assert_allclose(middle(content), 300 * 64 / 257, atol=1)


def test_cmyk():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1:3] = 255  # magenta and yellow are red
    content = saved(Image.fromarray(ink, "CMYK"), format="JPEG", quality=95)
    np.testing.assert_allclose(middle(content), np.array([255, 0, 0]) + np.zeros((8, 8, 3)), atol=4)


@pytest.mark.parametrize(
    "kind", [dict(format="GIF"), dict(format="WEBP", lossless=True), dict(format="PNG")]
)
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    content = saved(frames[0], save_all=True, append_images=frames[1:], **kind)
    np.testing.assert_array_equal(middle(content), np.array([255, 0, 0]) + np.zeros((8, 8, 3)))


# Damage.

KINDS = {
    "jpg": dict(format="JPEG"),
    "progressive": dict(format="JPEG", progressive=True),
    "png": dict(format="PNG"),
    "webp": dict(format="WEBP"),
    "lossless": dict(format="WEBP", lossless=True),
    "gif": dict(format="GIF"),
    "bmp": dict(format="BMP"),
}


def _reason(content):
    with pytest.raises(BadSample) as caught:
        squared(content, 8)
    assert not caught.value.filtered
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_damaged(kind):
    content = saved(Image.fromarray(noise(64, 64)), **KINDS[kind])
    assert _reason(content[: len(content) // 2]) == "damaged picture"
    assert _reason(content[:3]) == "no picture in a known format"


def test_what_is_no_picture():
    assert _reason(b"") == "empty picture file"
    assert _reason(np.zeros((0, 5, 3), np.uint8)) == "empty picture file"
    assert _reason(np.zeros((5, 0, 3), np.uint8)) == "picture without pixels"
    for content in (
        b"<html>404 Not Found</html>",
        b"\0" * 5000,
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"II*\0",
    ):
        assert _reason(content) == "no picture in a known format"
    assert _reason(_png_by_hand(8, 8, 8, 2, b"\0")) == "damaged picture"
    # Formats beyond the web's are not worth the trust that their readers ask for.
    assert _reason(saved(Image.new("RGB", (8, 8)), format="TIFF")) == "no picture in a known format"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [1001, 2001])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(pixels, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert image.opened(_png_by_hand(1000, 1, 8, 2)).size == (1000, 1)
    content = _png_by_hand(pixels, 1, 8, 2)
    with pytest.raises(BadSample, match="picture of more than 1000 pixels"):
        image.opened(content)


def test_a_picture_too_narrow_to_say_where_it_is_cut(monkeypatch):
    monkeypatch.setattr(np, "iinfo", lambda _: np.finfo(np.float16))  # at most 65504
    assert _reason(np.zeros((1, 9000, 3), np.uint8)) == "picture too narrow"


FUZZ = """
import io, sys, threading
import numpy as np
from PIL import Image
from slam_jax.data import image
from slam_jax.errors import BadSample

rng = np.random.default_rng(int(sys.argv[1]))
crop = image.Crop(8, True, True)
exif = Image.Exif()
exif[0x0112], exif[0x0131], exif[0x8769] = 6, "x" * 40, {0x9003: "2020"}
pixels = rng.integers(0, 256, (24, 16, 4), np.uint8)
picture, counts = Image.fromarray(pixels).resize((40, 60)), {}
grey = Image.fromarray(pixels[..., 0]).convert("P")
contents = []
for kind, options, source in (
    ("JPEG", {"exif": exif}, picture.convert("RGB")), ("PNG", {"exif": exif}, picture),
    ("JPEG", {"progressive": True}, picture.convert("CMYK")), ("PNG", {"transparency": 3}, grey),
    ("WEBP", {"exif": exif}, picture), ("WEBP", {"lossless": True}, picture),
    ("GIF", {"save_all": True, "append_images": [grey.rotate(90)]}, grey), ("BMP", {}, grey),
    ("PNG", {}, Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)),
):
    out = io.BytesIO()
    source.save(out, kind, **options)
    contents.append(out.getvalue())

def damaged(content, number):
    content = bytearray(content)
    # Headers are where readers trip.
    reach = len(content) if number % 2 else min(120, len(content))
    for place in rng.integers(0, reach, rng.integers(1, 9)):
        content[place] = rng.integers(256)
    return bytes(content[: rng.integers(len(content))] if number % 5 == 0 else content)

def read(share):
    for content in share:
        try:
            out = image.square(image.opened(content), crop, np.random.default_rng(0))
            assert out.pixels.shape == (8, 8, 3) and out.pixels.dtype == np.uint8
            reason = "good"
        except BadSample as bad:
            reason = bad.reason
        counts[reason] = counts.get(reason, 0) + 1

def excepthook(args):
    failed.append(args)
    threading.__excepthook__(args)

failed = []
threading.excepthook = excepthook
every = [damaged(content, number) for number in range(int(sys.argv[2])) for content in contents]
threads = [threading.Thread(target=read, args=(every[n::2],)) for n in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(counts)
sys.exit(bool(failed))
"""


def test_of_random_damage_comes_nothing_but_bad_samples():
    """And nothing is printed, in a process where every warning would be."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", FUZZ, "11", "300"],
        cwd=ROOT, text=True, capture_output=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for reason in ("good", "damaged picture", "no picture in a known format"):
        assert reason in done.stdout


def test_names_a_file_that_cannot_be_read(tmp_path):
    for name, content in {
        "a.png": b"",
        "b.png": b"no picture",
        "c.png": png(noise(64, 64))[:90],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} .*; give a JPEG"):
            image.read(tmp_path / name, 8)
    with pytest.raises(UserError, match=r"absent.png .*No such file"):
        image.read(tmp_path / "absent.png", 8)
    (tmp_path / "d.png").write_bytes(png(noise(20, 60)))
    np.testing.assert_array_equal(image.read(tmp_path / "d.png", 20), noise(20, 60)[:, 20:40])
