"""A mean and how far it may be off."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """The mean of independent values and its standard error."""

    mean: float
    standard_error: float


def of(values: Float[np.ndarray, "N"]) -> Estimate:
    """Of N >= 2 values, such as differences of two methods at the same seeds, paired."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return Estimate(float(np.mean(values)), float(error))
