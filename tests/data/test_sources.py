"""Folders of captioned pictures, and what becomes of a picture's file."""

import json

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import image, sources
from slam_jax.errors import UserError


def _picture(path, size=(40, 20), color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name, color in (("b/2.png", (0, 0, 255)), ("a.JPG", (255, 0, 0))):
        path = _picture(tmp_path / name, color=color)
        path.with_suffix(".txt").write_text(f"the caption of {name}\n")
    return tmp_path


def test_finds_pictures_and_the_captions_beside_them(folder):
    source = sources.ImageFolder(folder, 8, 100)
    assert len(source) == 2
    captions = [source[i]["caption"] for i in range(2)]
    assert captions == ["the caption of a.JPG", "the caption of b/2.png"]
    assert source[0]["image"].shape == (8, 8, 3)
    assert source[0]["image"].dtype == np.uint8
    np.testing.assert_array_equal(source[1]["image"][4, 4], [0, 0, 255])


def test_takes_the_first_num_images(folder):
    assert len(sources.ImageFolder(folder, 8, 1)) == 1


def test_reads_metadata_jsonl(folder):
    lines = [{"file_name": "b/2.png", "text": "blue", "more": 1}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = sources.ImageFolder(folder, 8, 100)
    assert [source[i]["caption"] for i in range(len(source))] == ["blue"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "b/2.png"}', r"metadata.jsonl line 1 .*text"),
        ("[1]", "line 1"),
        ("{", "line 1"),
        ('{"file_name": "missing.png", "text": "x"}', "line 1 names .*missing.png"),
    ],
)
def test_refuses_a_broken_metadata_line(folder, line, message):
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        sources.ImageFolder(folder, 8, 100)


def test_refuses_a_folder_without_pictures(tmp_path):
    with pytest.raises(UserError, match="holds no .jpg"):
        sources.ImageFolder(tmp_path, 8, 100)
    with pytest.raises(UserError, match="is no folder"):
        sources.ImageFolder(tmp_path / "absent", 8, 100)


def test_refuses_a_picture_without_caption(folder):
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match="a.JPG has no readable caption"):
        sources.ImageFolder(folder, 8, 100)


def test_a_picture_is_cut_to_its_middle_square(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(image.read(tmp_path / "x.png", 20), 255)


def test_a_small_picture_is_the_mean_of_a_large_one(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    # Without antialiasing a pixel would be one of the noise's, not near their mean.
    assert np.abs(image.read(tmp_path / "x.png", 8).astype(float) - 127.5).max() < 25


def test_transparency_is_white_and_orientation_followed(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(image.read(tmp_path / "clear.png", 8), 255)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # stands on its head
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(image.read(tmp_path / "turned.png", 8)[-1], 255)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_names_a_file_that_is_no_picture(tmp_path, content):
    path = _picture(tmp_path / "x.png", (64, 64))
    path.write_bytes(path.read_bytes()[:90] if content is None else content)
    with pytest.raises(UserError, match="x.png"):
        image.read(path, 8)
