"""What travels from files to batches.

A source is anything with __len__ and __getitem__(index) -> Sample. It opens its files when they
are first asked for, can be pickled (worker processes get a copy), may be read by several threads
at once, and raises BadSample where a sample cannot be read.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8


class Sample(NamedTuple):
    """A captioned picture as it lies in its file."""

    image: bytes | UInt8[np.ndarray, "H W 3"]  # a whole picture file, or pixels
    caption: str
    shard: str  # the file or folder that it lies in
    key: str  # which sample of the shard
    fields: Mapping[str, Any]  # what else is told of it, such as LAION's json


class Example(NamedTuple):
    """A sample as one row of a batch."""

    arrays: dict[str, np.ndarray]
    cut: bool  # whether the end of its caption did not fit the tokenizer
