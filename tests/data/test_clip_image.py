"""Pictures for CLIP against transformers' image processor, the one that works with Pillow."""

import json

import numpy as np
import pytest
import transformers

from slam_jax.data import clip_image
from slam_jax.errors import UserError

# As OpenAI's repositories have it.
OLD = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
OTHER = {
    "size": {"shortest_edge": 37}, "crop_size": {"height": 30, "width": 30},
    "rescale_factor": 1 / 200, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.5],
}  # fmt: skip


def theirs(config: dict, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{}, OLD, OTHER], ids=["default", "old", "other"])
@pytest.mark.parametrize(
    "size", [(512, 512), (224, 224), (37, 37), (301, 457), (500, 333), (231, 230), (40, 63), (1, 5)]
)
def test_matches_transformers(config, size, tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    out = clip_image.prepare(clip_image.from_config(config), pictures)
    # Without the format, a picture one pixel high would be taken for another layout.
    reference = theirs(config, tmp_path)(
        list(pictures), return_tensors="np", input_data_format="channels_last"
    )
    np.testing.assert_allclose(
        out, np.moveaxis(reference["pixel_values"], 1, -1), rtol=0, atol=1e-6
    )
    assert out.dtype == np.float32


def test_real_values_are_normalized():
    """White and black as the published constants have them."""
    pictures = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 255)])
    black, white = clip_image.prepare(clip_image.from_config({}), pictures)
    np.testing.assert_allclose(black[0, 0], [-1.7922625, -1.7520971, -1.4802198], rtol=1e-6)
    np.testing.assert_allclose(white[9, 9], [1.9303361, 2.0748837, 2.1458969], rtol=1e-6)


@pytest.mark.parametrize(
    "key, value",
    [
        ("do_resize", False),
        ("do_center_crop", False),
        ("do_normalize", False),
        ("do_rescale", False),
        ("resample", 2),
        ("size", {"height": 224, "width": 224}),
        ("size", "224"),
        ("crop_size", {"height": 224, "width": 200}),
        ("crop_size", 0),
        ("crop_size", 256),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, None, 0.5]),
        ("rescale_factor", None),
    ],
)
def test_what_is_not_built_is_refused(key, value):
    with pytest.raises(UserError) as caught:
        clip_image.from_config({**OLD, key: value})
    assert key in str(caught.value) and str(value) in str(caught.value)
