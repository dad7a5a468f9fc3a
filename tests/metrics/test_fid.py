"""Frechet distance against closed forms and scipy's general matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from slam_jax.metrics import fid


def random_gaussian(rng, dim):
    a = rng.normal(size=(dim, dim))
    return fid.Gaussian(rng.normal(size=dim), a @ a.T / dim)


def test_a_set_is_at_distance_zero_from_itself():
    gaussian = fid.fit(np.random.default_rng(0).normal(size=(200, 8)))
    assert fid.frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-12)


def test_one_dimension_closed_form():
    a = fid.Gaussian(np.array([1.0]), np.array([[4.0]]))
    b = fid.Gaussian(np.array([-2.0]), np.array([[0.25]]))
    assert fid.frechet_distance(a, b) == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2)


def test_agrees_with_scipys_square_root_of_the_product():
    rng = np.random.default_rng(1)
    a, b = random_gaussian(rng, 6), random_gaussian(rng, 6)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum()
    expected += np.trace(a.covariance + b.covariance - 2 * root)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_singular_covariance_stays_finite():
    flat = fid.Gaussian(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    assert fid.frechet_distance(flat, fid.Gaussian(np.zeros(3), np.eye(3))) == pytest.approx(2.0)


def test_fit_recovers_the_moments():
    rng = np.random.default_rng(2)
    mixing = np.array([[1.0, 0.0], [0.8, 0.6]])
    gaussian = fid.fit(rng.normal(size=(200_000, 2)) @ mixing.T + [3.0, -1.0])
    np.testing.assert_allclose(gaussian.mean, [3.0, -1.0], atol=0.02)
    np.testing.assert_allclose(gaussian.covariance, mixing @ mixing.T, atol=0.02)
