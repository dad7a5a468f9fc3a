"""Precision, recall, density and coverage of generated features, by nearest neighbours.

A set's manifold is the union of balls around its vectors, each as large as reaches its k-th nearest
neighbour among the others. Costs 2 F (N^2 + N M + M^2) operations, and memory for a block alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.errors import UserError

_BLOCK = 2**23  # distances held at a time, 64 MiB


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1], but for density, which may exceed 1."""

    precision: float  # of the generated, in the manifold of the reference
    recall: float  # of the reference, in the manifold of the generated
    density: float  # how many balls of the reference hold a generated vector, as a share of k
    coverage: float  # of the reference, whose ball holds a generated vector


def precision_recall(
    reference: Float[np.ndarray, "N F"],
    generated: Float[np.ndarray, "M F"],
    k: int = 3,
    k_density: int = 5,
) -> PrecisionRecall:
    """Precision and recall of Kynkaanniemi et al. 2019, density and coverage of Naeem et al. 2020.

    k and k_density, of the latter two, are those papers'. A vector on a ball's edge is in it.
    UserError if a set has not more vectors than neighbours are asked for.
    """
    most = max(k, k_density)
    if min(len(reference), len(generated)) <= most:
        raise UserError(
            f"{most} nearest neighbours need {most + 1} images of each kind, not {len(reference)} "
            f"and {len(generated)}; give more images"
        )
    # Near zero, or distances between vectors far from it drown in rounding.
    centre = np.mean(reference, axis=0, dtype=np.float64)
    reference, generated = reference - centre, generated - centre
    balls, wide_balls = _radii(reference, k), _radii(reference, k_density)
    generated_balls = _radii(generated, k)

    precise = np.zeros(len(generated), bool)
    recalled, covered, dense = 0, 0, 0
    for rows, distances in _distances(reference, generated):
        within = distances <= np.expand_dims(wide_balls[rows], 1)
        precise |= (distances <= np.expand_dims(balls[rows], 1)).any(0)
        recalled += (distances <= generated_balls).any(1).sum()
        covered += within.any(1).sum()
        dense += within.sum()
    return PrecisionRecall(
        float(precise.mean()),
        float(recalled / len(reference)),
        float(dense / (k_density * len(generated))),
        float(covered / len(reference)),
    )


def _radii(x: Float[np.ndarray, "N F"], k: int) -> Float[np.ndarray, "N"]:
    """The squared distance of each vector to its k-th nearest other."""
    # The nearest of all is itself.
    found = [np.partition(distances, k, axis=1)[:, k] for _, distances in _distances(x, x)]
    return np.concatenate(found)


def _distances(
    x: Float[np.ndarray, "N F"], y: Float[np.ndarray, "M F"]
) -> Iterator[tuple[slice, Float[np.ndarray, "B M"]]]:
    """(rows of x, their squared distances to all of y), block by block."""
    size = max(1, _BLOCK // len(y))
    lengths_x, lengths_y = (x**2).sum(1), (y**2).sum(1)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        lengths = np.add.outer(lengths_x[rows], lengths_y)
        squared = lengths - 2.0 * (x[rows] @ y.T)
        # Equal vectors are at distance zero, whatever rounding says.
        yield rows, np.where(squared > 1e-13 * lengths, squared, 0.0)
