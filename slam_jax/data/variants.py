"""Pictures of a source, each as several squares, ready to be encoded and kept."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from slam_jax.data import filters, image, pictures, text_inputs
from slam_jax.data.image import Crop
from slam_jax.data.tally import Dropped
from slam_jax.errors import BadSample


class Picture(NamedTuple):
    """One picture that can be used, cut N times."""

    pixels: UInt8[np.ndarray, "N size size 3"]
    time_ids: Int32[np.ndarray, "N 6"]  # shapes.SDXLText
    tokens: dict[str, Int32[np.ndarray, "L"]]  # input_ids, and SDXL's input_ids_2
    num_tokens: int  # of the caption, start and end counted
    cut: bool  # whether the end of the caption did not fit
    caption: str
    shard: str
    key: str


@dataclasses.dataclass(frozen=True)
class Variants:
    """The pictures of a source (sample.py), filtered, cut `num` times, their captions tokenized."""

    source: object
    filters: tuple[filters.Filter, ...]
    crop: Crop
    tokenizers: text_inputs.Tokenizers
    num: int
    seed: int

    def read(self, index: int) -> Picture | Dropped:
        """Picture `index`; its variant v is what pictures.Pictures gives for (seed, index, v)."""
        try:
            sample = self.source[index]
        except BadSample as bad:
            return Dropped(bad.reason, bad.shard, bad.key, bad.filtered)
        try:
            picture = pictures.opened(sample, self.filters)
            squares = [self._square(picture, index, variant) for variant in range(self.num)]
            tokens, cut = self.tokenizers.encode_one(sample.caption, squares[0].time_ids)
        except BadSample as bad:
            return Dropped(bad.reason, sample.shard, sample.key, bad.filtered)
        tokens.pop("time_ids", None)  # of one variant only
        return Picture(
            np.stack([square.pixels for square in squares]),
            np.stack([square.time_ids for square in squares]),
            tokens, _num_tokens(tokens["input_ids"], self.tokenizers.first.eos), cut,
            sample.caption, sample.shard, sample.key,
        )  # fmt: skip

    def _square(self, picture: image.Image.Image, index: int, variant: int) -> image.Square:
        rng = np.random.default_rng((self.seed, index, variant))
        return image.square(picture, self.crop, rng)


def _num_tokens(ids: Int32[np.ndarray, "L"], eos: int) -> int:
    """How many there are up to the first end, which the padding may repeat."""
    return int(np.argmax(ids == eos)) + 1
