"""Frechet distance between two sets of features, in float64.

The sums are made on the host: no TPU computes in float64. Parts of a set, in batches or on several
hosts, are merged without loss, since each part's products are taken about its own mean; raw sums
of squares would lose every digit of a small spread far from zero.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.errors import UserError


class Moments(NamedTuple):
    """What is kept of a set of feature vectors while it grows."""

    count: int
    mean: Float[np.ndarray, "F"]
    scatter: Float[np.ndarray, "F F"]  # the sum of (x - mean)(x - mean)^T


class Gaussian(NamedTuple):
    """Mean and covariance of a set of feature vectors."""

    mean: Float[np.ndarray, "F"]
    covariance: Float[np.ndarray, "F F"]


def moments(features: Float[np.ndarray, "N F"]) -> Moments:
    """Of N >= 0 feature vectors; a batch of hundreds costs less than one by one."""
    features = np.asarray(features, np.float64)
    mean = features.sum(0) / max(1, len(features))
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merged(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub and LeVeque 1979)."""
    count = a.count + b.count
    share, apart = b.count / max(1, count), b.mean - a.mean
    between = np.outer(apart, apart) * (a.count * share)
    return Moments(count, a.mean + share * apart, a.scatter + b.scatter + between)


def gaussian(whole: Moments) -> Gaussian:
    """Unbiased covariance; UserError for fewer than two vectors."""
    if whole.count < 2:
        raise UserError(f"a covariance needs 2 images or more, not {whole.count}; give more")
    return Gaussian(whole.mean, whole.scatter / (whole.count - 1))


def fit(features: Float[np.ndarray, "N F"]) -> Gaussian:
    """The Gaussian of N >= 2 feature vectors; unbiased covariance."""
    return gaussian(moments(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson and Landau 1982).

    By symmetric eigenvalues alone: scipy.linalg.sqrtm of the product A B is not symmetric, can
    turn complex, and has changed its signature.
    """
    root = square_root(a.covariance)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    trace -= 2.0 * trace_of_root(root @ b.covariance @ root)
    return float(((a.mean - b.mean) ** 2).sum() + trace)


def standard_error(features: Float[np.ndarray, "N F"], reference: Gaussian) -> float:
    """Of the distance of N generated images from the reference, for the choice of these images.

    By the derivative of the distance in each image's weight (the infinitesimal jackknife of Jaeckel
    1972): one eigendecomposition, whatever N. Of Gaussians about right from one image per feature
    on, where it is 1.4 times too large. The reference counts as exact.
    """
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centred = features - mean
    projected = centred @ square_root(reference.covariance)
    values, vectors = np.linalg.eigh(projected.T @ projected / (len(features) - 1))
    kept = _positive(values) > 0.0
    whitened = projected @ vectors[:, kept] / values[kept] ** 0.25
    slopes = 2.0 * centred @ (mean - reference.mean) + (centred**2).sum(1) - (whitened**2).sum(1)
    return float(slopes.std(ddof=1) / np.sqrt(len(slopes)))


def square_root(covariance: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "F F"]:
    """The symmetric one."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(_positive(values))) @ vectors.T


def trace_of_root(matrix: Float[np.ndarray, "F F"]) -> float:
    """Of a symmetric, positive semidefinite matrix."""
    return float(np.sqrt(_positive(np.linalg.eigvalsh(matrix))).sum())


def _positive(values: Float[np.ndarray, "F"]) -> Float[np.ndarray, "F"]:
    # What rounding leaves of zeros is 1e-16 of the largest, but 1e-8 as a root, and may be many.
    rounding = values.max() * len(values) * np.finfo(np.float64).eps
    return np.where(values > rounding, values, 0.0)


def small_sample_bias(reference: Gaussian, count: int) -> float:
    """The mean Frechet distance of `count` samples of the reference itself, to order 1 / count.

    Of the mean tr(C) / count; of the covariance by the second derivative of the distance,
    |E_ij|^2 / (2 (c_i + c_j)) summed over the eigenvalues c of C, with the variances
    c_i c_j / (count - 1), twice that for i = j, of a Wishart matrix. Good where count is well above
    the number of eigenvalues that matter; below, too large by some, so it is cut at 2 tr(C).
    """
    values = _positive(np.linalg.eigvalsh(reference.covariance))
    values = values[values > 0.0]
    pairs = np.outer(values, values) / np.add.outer(values, values)
    spread = (pairs.sum() + np.trace(pairs)) / (2.0 * (count - 1))
    return float(values.sum() / count + min(spread, 2.0 * values.sum()))


def small_sample_warning(reference: Gaussian, count: int) -> str | None:
    """What to say of a distance from `count` images, where they do not span the features."""
    size = len(reference.mean)
    if count > size:
        return None
    return (
        f"{count} images for {size} features: their covariance has rank {count - 1} at most and "
        f"the FID is biased upwards, by about {small_sample_bias(reference, count):.3g} for "
        f"perfect images; give more than {size}, or compare only FIDs of {count} images"
    )
