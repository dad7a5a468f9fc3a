"""The standard error is the spread of the mean."""

import numpy as np
import pytest

from slam_jax.metrics import estimate


def test_of_two_values():
    assert estimate.of(np.array([1.0, 4.0])) == pytest.approx((2.5, 1.5))


def test_the_standard_error_is_the_spread_of_the_mean():
    values = 3.0 * np.random.default_rng(0).normal(size=(4000, 10))
    estimates = [estimate.of(row) for row in values]
    spread = np.std([each.mean for each in estimates])
    errors = np.array([each.standard_error for each in estimates])
    assert np.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.05)
