"""Captioned pictures as examples: filtered, cut to squares, their captions tokenized."""

import dataclasses

import numpy as np

from slam_jax.data import captions, filters, image, text_inputs
from slam_jax.data.image import Crop
from slam_jax.data.sample import Example, Sample
from slam_jax.errors import BadSample


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of a source (sample.py)."""

    source: object
    filters: tuple[filters.Filter, ...]
    crop: Crop
    tokenizers: text_inputs.Tokenizers

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, seed: tuple[int, ...]) -> Example:
        """image uint8 [size, size, 3], input_ids int32 [L]; for SDXL more (text_inputs.py).

        seed: of the crop and the flip. BadSample for one that is broken or filtered out.
        """
        sample = self.source[index]
        try:
            picture = opened(sample, self.filters)
            square = image.square(picture, self.crop, np.random.default_rng(seed))
        except BadSample as bad:
            raise BadSample(bad.reason, sample.shard, sample.key, filtered=bad.filtered) from None
        text, cut = self.tokenizers.encode_one(sample.caption, square.time_ids)
        return Example({"image": square.pixels, **text}, cut)


def opened(sample: Sample, wanted: tuple[filters.Filter, ...]) -> image.Image.Image:
    """The sample's picture, not decoded yet; BadSample if it cannot be used or is not wanted."""
    captions.check(sample.caption)
    filters.check_fields(wanted, sample.fields)
    picture = image.opened(sample.image)
    filters.check_size(wanted, *picture.size)
    return picture
