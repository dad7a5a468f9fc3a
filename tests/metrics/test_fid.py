"""Frechet distance against closed forms, scipy's square root, torch's eigenvalues, Monte Carlo."""

import functools

import numpy as np
import pytest
import scipy.linalg
import torch

from slam_jax.errors import UserError
from slam_jax.metrics import fid


def random_gaussian(rng, dim):
    a = rng.normal(size=(dim, dim))
    return fid.Gaussian(rng.normal(size=dim), a @ a.T / dim)


def pooled(rng, count, dim):
    """Like a network's pooled features: non-negative, of spreads that decay, correlated."""
    hidden = rng.normal(size=(count, 64)) @ rng.normal(size=(64, dim)) / 8
    return np.maximum(hidden + 0.5 * rng.normal(size=(count, dim)) + 0.3 * rng.normal(size=dim), 0)


def by_square_root(a, b):
    # Since scipy 1.18 it takes no `disp`, before it gives the root alone too.
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)


def by_general_eigenvalues(a, b):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other, for longer than they compute
    product = torch.tensor(a.covariance) @ torch.tensor(b.covariance)
    root = torch.linalg.eigvals(product).sqrt().real.sum().item()
    torch.set_num_threads(threads)
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * root


def test_a_set_is_at_distance_zero_from_itself():
    gaussian = fid.fit(np.random.default_rng(0).normal(size=(200, 8)))
    assert fid.frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-12)


def test_one_dimension_closed_form():
    a = fid.Gaussian(np.array([1.0]), np.array([[4.0]]))
    b = fid.Gaussian(np.array([-2.0]), np.array([[0.25]]))
    assert fid.frechet_distance(a, b) == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2)


def test_turned_alike_closed_form():
    rng = np.random.default_rng(7)
    turn, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    spreads_a, spreads_b = rng.uniform(0, 3, size=(2, 50))
    mean_a, mean_b = rng.normal(size=(2, 50))
    a = fid.Gaussian(mean_a, turn @ np.diag(spreads_a**2) @ turn.T)
    b = fid.Gaussian(mean_b, turn @ np.diag(spreads_b**2) @ turn.T)
    expected = ((mean_a - mean_b) ** 2).sum() + ((spreads_a - spreads_b) ** 2).sum()
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_agrees_with_scipys_square_root_of_the_product():
    rng = np.random.default_rng(1)
    a, b = random_gaussian(rng, 6), random_gaussian(rng, 6)
    assert fid.frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(by_square_root(a, b), rel=1e-9)


def test_of_features_agrees_with_scipys_square_root():
    rng = np.random.default_rng(3)
    a, b = fid.fit(pooled(rng, 400, 256)), fid.fit(pooled(rng, 500, 256))
    assert fid.frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-9)


def test_of_2048_features_agrees_with_torchs_general_eigenvalues():
    rng = np.random.default_rng(4)
    a, b = fid.fit(pooled(rng, 2300, 2048)), fid.fit(pooled(rng, 2500, 2048))
    assert fid.frechet_distance(a, b) == pytest.approx(by_general_eigenvalues(a, b), rel=1e-6)


@pytest.mark.slow
def test_of_2048_features_agrees_with_scipys_square_root():
    rng = np.random.default_rng(4)
    a, b = fid.fit(pooled(rng, 2300, 2048)), fid.fit(pooled(rng, 2500, 2048))
    assert fid.frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-6)


def test_singular_covariance_stays_finite():
    flat = fid.Gaussian(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    assert fid.frechet_distance(flat, fid.Gaussian(np.zeros(3), np.eye(3))) == pytest.approx(2.0)


def test_what_rounding_leaves_of_zeros_does_not_count():
    rng = np.random.default_rng(5)
    few, many = pooled(rng, 40, 400), pooled(rng, 1000, 400)
    a, b = fid.fit(few), fid.fit(many)
    # tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of X B^1/2 / sqrt(N - 1).
    cholesky = np.linalg.cholesky(b.covariance)
    singular = scipy.linalg.svdvals((few - few.mean(0)) @ cholesky) / np.sqrt(39)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance)
    expected -= 2 * singular.sum()
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_fit_recovers_the_moments():
    rng = np.random.default_rng(2)
    mixing = np.array([[1.0, 0.0], [0.8, 0.6]])
    gaussian = fid.fit(rng.normal(size=(200_000, 2)) @ mixing.T + [3.0, -1.0])
    np.testing.assert_allclose(gaussian.mean, [3.0, -1.0], atol=0.02)
    np.testing.assert_allclose(gaussian.covariance, mixing @ mixing.T, atol=0.02)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_parts_of_any_size_merge_to_the_whole(shift):
    # As raw sums of squares, a shift of 1e6 would leave 4 digits.
    features = np.random.default_rng(6).normal(size=(1000, 5)) + shift
    parts = np.split(features, [0, 1, 7, 500, 500, 900])
    merged = functools.reduce(fid.merged, map(fid.moments, parts))
    assert merged.count == 1000 and merged.scatter.dtype == np.float64
    gaussian = fid.gaussian(merged)
    np.testing.assert_allclose(gaussian.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    expected = np.cov(features - shift, rowvar=False)
    np.testing.assert_allclose(gaussian.covariance, expected, rtol=1e-8, atol=1e-9)


def test_float32_features_are_summed_in_float64():
    features = np.random.default_rng(8).normal(size=(3000, 3)).astype(np.float32) + np.float32(1e3)
    gaussian = fid.fit(features)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(gaussian.covariance, expected, rtol=1e-9, atol=1e-10)


def test_parts_of_nothing_merge_to_nothing():
    nothing = fid.moments(np.zeros((0, 3), np.float32))
    assert fid.merged(nothing, nothing).count == 0
    with pytest.raises(UserError, match="not 0"):
        fid.gaussian(nothing)


def perfect_distances(gaussian, count, rounds, rng):
    def draw():
        samples = rng.multivariate_normal(gaussian.mean, gaussian.covariance, size=count)
        return fid.frechet_distance(fid.fit(samples), gaussian)

    return [draw() for _ in range(rounds)]


def test_small_sample_bias_is_that_of_perfect_samples():
    rng = np.random.default_rng(9)
    gaussian = random_gaussian(rng, 12)
    measured = np.mean(perfect_distances(gaussian, 240, 300, rng))
    assert fid.small_sample_bias(gaussian, 240) == pytest.approx(measured, rel=0.06)


def test_small_sample_bias_of_fewer_images_than_features():
    rng = np.random.default_rng(10)
    decaying = fid.Gaussian(np.zeros(60), np.diag(np.arange(1, 61.0) ** -2))
    measured = np.mean(perfect_distances(decaying, 30, 100, rng))
    assert fid.small_sample_bias(decaying, 30) == pytest.approx(measured, rel=0.2)
    # Of a single direction at most, and no image: twice all there is to be wrong about.
    assert fid.small_sample_bias(fid.Gaussian(np.zeros(60), np.eye(60)), 2) == 60 / 2 + 120


def test_too_few_images_are_told_with_the_bias():
    gaussian = fid.Gaussian(np.zeros(4), np.eye(4))
    assert fid.small_sample_warning(gaussian, 5) is None
    warning = fid.small_sample_warning(gaussian, 4)
    # tr / N + F (F + 1) / (4 (N - 1))
    assert warning.startswith("4 images for 4 features") and "rank 3" in warning
    assert f"about {4 / 4 + 4 * 5 / (4 * 3):.3g} for" in warning


@pytest.mark.parametrize(("count", "off"), [(60, 0.3), (600, 0.15)])
def test_standard_error_is_the_spread_over_new_images(count, off):
    rng = np.random.default_rng(11)
    spreads = np.arange(1, 41.0) ** -0.75
    reference = fid.Gaussian(np.zeros(40), np.diag(spreads**2))

    def draw():
        features = 0.1 + 1.2 * spreads * rng.normal(size=(count, 40))
        distance = fid.frechet_distance(fid.fit(features), reference)
        return distance, fid.standard_error(features, reference)

    distances, errors = np.transpose([draw() for _ in range(200)])
    assert errors.mean() == pytest.approx(distances.std(ddof=1), rel=off)
