"""Captioned pictures as examples: filtered, cut to squares, their captions tokenized."""

import dataclasses

import numpy as np

from slam_jax.data import filters, image, text_inputs
from slam_jax.data.image import Crop
from slam_jax.data.sample import Example
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
            _check_caption(sample.caption)
            filters.check_fields(self.filters, sample.fields)
            picture = image.opened(sample.image)
            filters.check_size(self.filters, *picture.size)
            square = image.square(picture, self.crop, np.random.default_rng(seed))
        except BadSample as bad:
            raise BadSample(bad.reason, sample.shard, sample.key, filtered=bad.filtered) from None
        text, cut = self.tokenizers.encode_one(sample.caption, square.time_ids)
        return Example({"image": square.pixels, **text}, cut)


def _check_caption(caption: str) -> None:
    """BadSample for half a character, which json can hold and no tokenizer takes."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise BadSample("caption is not UTF-8") from None
