"""What turns pictures into features, whatever network that is."""

from collections.abc import Callable
from typing import NamedTuple


class Extractor(NamedTuple):
    """A network and all that decides its numbers.

    prepare: uint8 [B, H, W, 3] -> what apply takes, numpy to numpy, on the host.
    apply: that -> {name: [B, ...] float32}, jitted.
    """

    name: str  # such as "inception, clean"; printed beside its numbers
    fingerprint: str  # of its weights and its preparation; part of a protocol's hash
    prepare: Callable
    apply: Callable
