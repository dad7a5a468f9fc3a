"""KID against pairs counted one by one, a closed form, and its spread over new samples."""

import itertools

import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.metrics import kid


def one_by_one(a, b):
    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def mean(pairs):
        return np.mean([kernel(x, y) for x, y in pairs])

    within = mean(itertools.permutations(a, 2)) + mean(itertools.permutations(b, 2))
    return within - 2 * mean(itertools.product(a, b))


def test_agrees_with_pairs_one_by_one():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5
    assert kid.squared_mmd(a, b) == pytest.approx(one_by_one(a.tolist(), b.tolist()), rel=1e-12)


def test_is_unbiased():
    """For N(0, 1) and N(m, 1), F = 1: E (xy + 1)^3 by the moments of normal variables."""

    def expected_kernel(mean_x, mean_y):
        def moments(m):
            return 1, m, m**2 + 1, m**3 + 3 * m

        pairs = zip((1, 3, 3, 1), moments(mean_x), moments(mean_y), strict=True)
        return sum(binomial * x * y for binomial, x, y in pairs)

    expected = expected_kernel(0, 0) + expected_kernel(0.7, 0.7) - 2 * expected_kernel(0, 0.7)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(4000, 5, 1)), rng.normal(size=(4000, 6, 1)) + 0.7
    values = np.array([kid.squared_mmd(*pair) for pair in zip(x, y, strict=True)])
    assert abs(values.mean() - expected) < 3 * values.std() / np.sqrt(len(values))
    # The biased estimate, which counts each vector with itself, would be far outside.
    assert values.std() / np.sqrt(len(values)) < 0.05 * expected


def test_standard_error_is_the_spread_over_new_samples():
    rng = np.random.default_rng(2)

    def draw(seed):
        return kid.kid(rng.normal(size=(400, 4)), rng.normal(size=(450, 4)) + 0.3, 40, seed)

    means, errors = np.transpose([draw(seed) for seed in range(200)])
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.2)


def test_the_order_does_not_count_and_the_seed_does():
    rng = np.random.default_rng(3)
    rising = np.sort(rng.normal(size=(300, 2)), axis=0)
    falling = np.sort(rng.normal(size=(300, 2)), axis=0)[::-1]
    first = kid.kid(rising, falling, 50, 0)
    assert first == kid.kid(rising, falling, 50, 0) and first != kid.kid(rising, falling, 50, 1)
    in_order = [kid.squared_mmd(rising[i : i + 50], falling[i : i + 50]) for i in range(0, 300, 50)]
    assert np.mean(in_order) > 10
    assert abs(first.mean - kid.squared_mmd(rising, falling)) < 3 * first.standard_error < 3


def test_too_few_images():
    features = np.zeros((150, 2))
    with pytest.raises(UserError, match="needs 200 images of each kind, not 150 and 150"):
        kid.kid(features, features, 100, 0)
