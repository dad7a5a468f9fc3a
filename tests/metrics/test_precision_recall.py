"""Against every distance and ball looked at one by one, and cases known beforehand."""

import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.metrics import precision_recall


def one_by_one(reference, generated, k, k_density):
    def radii(x, nearest):
        return [sorted(np.linalg.norm(x - row, axis=1))[nearest] for row in x]

    def holds(centres, radii, x):
        """[centre, x] whether the ball holds it."""
        pairs = zip(centres, radii, strict=True)
        return np.array([[np.linalg.norm(c - row) <= r for row in x] for c, r in pairs])

    real = holds(reference, radii(reference, k), generated)
    fake = holds(generated, radii(generated, k), reference)
    wide = holds(reference, radii(reference, k_density), generated)
    density = wide.sum() / (k_density * len(generated))
    return real.any(0).mean(), fake.any(0).mean(), density, wide.any(1).mean()


@pytest.mark.parametrize("block", [2**23, 130])
def test_agrees_with_balls_one_by_one_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(precision_recall, "_BLOCK", block)
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(40, 6)) + 100.0
    generated = 1.3 * rng.normal(size=(60, 6)) + 100.5
    found = precision_recall.precision_recall(reference, generated, 2, 4)
    expected = one_by_one(reference, generated, 2, 4)
    assert all(0.0 < each < 1.5 and each != 1.0 for each in expected)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_same_set_twice():
    features = np.random.default_rng(1).normal(size=(50, 3))
    found = precision_recall.precision_recall(features, features)
    # Each ball holds its own centre and its 5 nearest.
    assert found == (1.0, 1.0, 6 / 5, 1.0)


def test_sets_far_apart():
    features = np.random.default_rng(2).normal(size=(50, 3))
    assert precision_recall.precision_recall(features, features + 100.0) == (0.0, 0.0, 0.0, 0.0)


def test_one_of_two_modes_is_half_the_recall():
    rng = np.random.default_rng(3)
    mode, other = rng.normal(size=(2, 50, 2))
    both = np.concatenate([mode, other + 1000.0])
    found = precision_recall.precision_recall(both, mode)
    assert (found.precision, found.recall, found.coverage) == (1.0, 0.5, 0.5)
    back = precision_recall.precision_recall(mode, both)
    assert (back.precision, back.recall, back.coverage) == (0.5, 1.0, 1.0)


def test_an_outlier_of_the_reference_spoils_precision_but_not_density():
    """What density is for (Naeem et al. 2020): one wide ball counts once."""
    rng = np.random.default_rng(4)
    reference = np.concatenate([rng.normal(size=(99, 2)), [[300.0, 0.0]]])
    stray = rng.normal(size=(100, 2)) + [250.0, 0.0]
    found = precision_recall.precision_recall(reference, stray)
    assert found.precision == 1.0 and found.density == pytest.approx(1 / 5)
    assert found.coverage == 0.01


def test_equal_features_are_in_balls_of_no_size():
    collapsed = np.full((20, 64), 1 / 3)
    reference = np.random.default_rng(5).normal(size=(20, 64)) + 1e3
    reference[:6] = collapsed[:6]
    found = precision_recall.precision_recall(reference, collapsed)
    assert found.precision == 1.0 and found.recall == pytest.approx(6 / 20)
    ((_, distances),) = precision_recall._distances(reference, reference)
    assert (np.diag(distances) == 0.0).all() and (distances[:6, :6] == 0.0).all()


def test_too_few_images():
    with pytest.raises(UserError, match="need 6 images of each kind, not 9 and 5"):
        precision_recall.precision_recall(np.zeros((9, 2)), np.zeros((5, 2)))
