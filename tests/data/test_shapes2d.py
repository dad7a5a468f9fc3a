"""The drawings: what the captions promise, and nothing but (seed, index) decides them."""

import numpy as np
import pytest

from slam_jax.data import shapes2d
from slam_jax.errors import UserError


def test_captions_are_many_distinct_and_parse_back():
    scenes = shapes2d.all_scenes()
    captions = {scene.caption() for scene in scenes}
    assert len(captions) == len(scenes) >= 5000
    assert all(shapes2d.parse(scene.caption()) == scene for scene in scenes)


def test_captions_read_as_english():
    scene = shapes2d.Scene(("red", "circle"), "above", ("orange", "square"), "white")
    assert scene.caption() == "a red circle above an orange square on a white background"


@pytest.mark.parametrize("text", ["a red circle", "a pink circle above a blue square", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="no caption of shapes2d"):
        shapes2d.parse(text)


def test_above_and_below_are_one_picture():
    above = shapes2d.parse("a red circle above a blue square").labels()
    below = shapes2d.parse("a blue square below a red circle").labels()
    beside = shapes2d.parse("a red circle left of a blue square").labels()
    np.testing.assert_array_equal(above, below)
    assert (above != beside).tolist() == [True, False, False, False, False]


def test_an_element_depends_on_seed_and_index_alone():
    source, again = shapes2d.Shapes2D(32, 100, seed=3), shapes2d.Shapes2D(32, 50, seed=3)
    np.testing.assert_array_equal(source[41].image, again[41].image)
    assert source[41].caption == again[41].caption
    other = shapes2d.Shapes2D(32, 100, seed=4)
    assert any(source[i].caption != other[i].caption for i in range(10))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("relation", shapes2d.RELATIONS)
def test_colors_lie_where_the_caption_says(size, relation):
    scene = shapes2d.Scene(("red", "circle"), relation, ("blue", "square"), "black")
    image = shapes2d.draw(scene, np.random.default_rng(0), size).astype(int)
    assert image.shape == (size, size, 3)
    # Centres of mass of the two colours, (row, column).
    red, blue = (
        np.argwhere(image[..., channel] - image[..., 1] > 80).mean(0) for channel in (0, 2)
    )
    down, right = blue - red
    expected = {"above": down > 8, "below": down < -8, "left of": right > 8, "right of": right < -8}
    assert expected[relation], (red, blue)


def test_background_is_the_named_one():
    scene = shapes2d.Scene(("red", "circle"), "above", ("blue", "square"), "gray")
    image = shapes2d.draw(scene, np.random.default_rng(0), 32)
    assert image[0, 0].tolist() == [128, 128, 128]


def test_other_sizes_are_refused():
    with pytest.raises(UserError, match="32 or 64"):
        shapes2d.Shapes2D(48, 10, 0)
