"""Kernel Inception distance (Binkowski et al. 2018), in float64."""

import numpy as np
from jaxtyping import Float

from slam_jax.errors import UserError
from slam_jax.metrics import estimate


def kid(
    reference: Float[np.ndarray, "N F"],
    generated: Float[np.ndarray, "M F"],
    subset_size: int,
    seed: int,
) -> estimate.Estimate:
    """The squared distance, over subsets of both sets that have nothing in common.

    Subsets that overlap, the usual way, have the same mean, but their spread tells nothing of how
    far that mean is off. The error covers the choice of the references as well as of the generated.
    Both sets are shuffled first. UserError if there are not two subsets.
    """
    count = min(len(reference), len(generated)) // subset_size
    if count < 2:
        raise UserError(
            f"KID with subsets of {subset_size} needs {2 * subset_size} images of each kind, not "
            f"{len(reference)} and {len(generated)}; give more images, or smaller subsets"
        )
    rng = np.random.default_rng(seed)
    pairs = zip(
        _subsets(reference, count, subset_size, rng),
        _subsets(generated, count, subset_size, rng),
        strict=True,
    )
    return estimate.of(np.array([squared_mmd(a, b) for a, b in pairs]))


def _subsets(features, count: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    order = rng.permutation(len(features))[: count * size]
    return [features[chosen] for chosen in np.split(order, count)]


def squared_mmd(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "M F"]) -> float:
    """The unbiased estimate, which may be negative, with the kernel (x.y / F + 1)^3."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(_mean_of_pairs(a) + _mean_of_pairs(b) - 2.0 * _kernel(a, b).mean())


def _mean_of_pairs(x: Float[np.ndarray, "N F"]) -> float:
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def _kernel(x: Float[np.ndarray, "N F"], y: Float[np.ndarray, "M F"]) -> Float[np.ndarray, "N M"]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
