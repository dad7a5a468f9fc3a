"""Frechet distance between two sets of features, in float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Gaussian(NamedTuple):
    """Mean and covariance of a set of feature vectors."""

    mean: Float[np.ndarray, "F"]
    covariance: Float[np.ndarray, "F F"]


def fit(features: Float[np.ndarray, "N F"]) -> Gaussian:
    """The Gaussian of N >= 2 feature vectors; unbiased covariance."""
    features = np.asarray(features, np.float64)
    return Gaussian(features.mean(0), np.cov(features, rowvar=False))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson and Landau 1982).

    By symmetric eigenvalues alone: scipy.linalg.sqrtm of the product A B is not symmetric, can
    turn complex, and has changed its signature.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    overlap = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    trace -= 2.0 * np.sqrt(np.maximum(overlap, 0.0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + trace)
