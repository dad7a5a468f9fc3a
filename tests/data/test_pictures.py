"""Samples of a source to examples, and what is passed over on the way."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import filters, image, pictures, text_inputs
from slam_jax.data.sample import Sample
from slam_jax.errors import BadSample
from slam_jax.weights import pretrained


class Source:
    """Of one sample; that it is asked for others is of no matter."""

    def __init__(self, **changes):
        self.sample = Sample(_jpeg(), "a red cat", "00000.tar", "000000007", {})._replace(**changes)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


def _jpeg(width=40, height=20):
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="session")
def tokenizers(tiny_folder):
    return text_inputs.read(pretrained.read(tiny_folder).tokenizer, None)


def _made(tokenizers, *conditions, random=True, **changes):
    crop = image.Crop(16, random, flip=random)
    return pictures.Pictures(Source(**changes), filters.parse(conditions), crop, tokenizers)


def test_an_example_is_the_cut_picture_and_its_tokens(tokenizers):
    made = _made(tokenizers, random=False)
    assert len(made) == 1
    arrays, cut = made.example(0, (1, 2))
    assert arrays.keys() == {"image", "input_ids"} and cut is False
    whole = Image.open(io.BytesIO(_jpeg())).resize((32, 16), Image.Resampling.BICUBIC)
    plain = np.asarray(whole.crop((8, 0, 24, 16))).astype(int)
    np.testing.assert_allclose(arrays["image"], plain, rtol=0, atol=1)
    np.testing.assert_array_equal(
        arrays["input_ids"], tokenizers.encode(["a red cat"], (16, 16))["input_ids"][0]
    )


def test_says_that_the_caption_was_cut(tokenizers):
    assert _made(tokenizers, caption="x" * 75).example(0, (0,)).cut is False
    assert _made(tokenizers, caption="x" * 76).example(0, (0,)).cut is True


def test_sdxl_is_told_of_sizes_and_the_crop(tiny_sdxl_folder):
    model = pretrained.read(tiny_sdxl_folder)
    tokenizers = text_inputs.read(model.tokenizer, model.tokenizer_2)
    arrays, _ = _made(tokenizers, random=False).example(0, (0,))
    assert arrays.keys() == {"image", "input_ids", "input_ids_2", "time_ids"}
    assert arrays["time_ids"].tolist() == [20, 40, 0, 8, 16, 16]


def test_crop_and_flip_are_drawn_from_the_seed_alone(tokenizers):
    made = _made(tokenizers)
    draws = {seed: made.example(0, seed).arrays["image"] for seed in np.ndindex(3, 4)}
    for seed, pixels in draws.items():
        again = pickle.loads(pickle.dumps(_made(tokenizers))).example(0, seed)
        np.testing.assert_array_equal(again.arrays["image"], pixels)
    assert len({pixels.tobytes() for pixels in draws.values()}) > 6


@pytest.mark.parametrize(
    "changes, conditions, reason, filtered",
    [
        ({"image": b""}, [], "empty picture file", False),
        ({"image": b"GIF"}, [], "no picture in a known format", False),
        ({"image": _jpeg()[:-200]}, [], "damaged picture", False),
        ({"caption": "half a dog \ud83d"}, [], "caption is not UTF-8", False),
        ({"fields": {"punsafe": 0.9}}, ["punsafe <= 0.5"], "punsafe > 0.5", True),
        ({}, ["short_side >= 21"], "short_side < 21", True),
        ({}, ["aspect <= 1.9"], "aspect > 1.9", True),
        # Decoding is dear, so that nothing is decoded that the filters leave out.
        ({"image": _jpeg()[:-200]}, ["aspect <= 1.9"], "aspect > 1.9", True),
        ({"image": b"", "fields": {"x": 1}}, ["x >= 2"], "x < 2", True),
    ],
)  # fmt: skip
def test_a_bad_sample_says_why_and_where(tokenizers, changes, conditions, reason, filtered):
    with pytest.raises(BadSample) as caught:
        _made(tokenizers, *conditions, **changes).example(0, (0,))
    bad = caught.value
    assert (bad.reason, bad.shard, bad.key, bad.filtered) == (
        reason, "00000.tar", "000000007", filtered,
    )  # fmt: skip


def test_what_passes_the_filters_is_an_example(tokenizers):
    conditions = "short_side >= 20", "aspect <= 2", "punsafe <= 0.5"
    assert _made(tokenizers, *conditions, fields={"punsafe": None}).example(0, (0,))
