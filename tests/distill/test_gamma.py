"""Laws of gamma: their distributions, and how they move with training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax import errors
from slam_jax.distill import gamma

COUNT = 40_000


def draw(law, progress=0.0, seed=0):
    values = jax.jit(law, static_argnums=1)(jax.random.key(seed), COUNT, jnp.float32(progress))
    assert values.shape == (COUNT, 1, 1, 1)
    assert values.dtype == jnp.float32
    return np.asarray(values).ravel()


def assert_uniform(values):
    """Ten equal bins, each within five standard errors."""
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    expected = values.size / 10
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all(), counts


def test_uniform_is_uniform():
    assert_uniform(draw(gamma.uniform))


def test_uniform_never_reaches_zero(monkeypatch):
    # One in 2^23 of JAX's uniform numbers is 0.
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
    assert (gamma.uniform(jax.random.key(0), 2, 0.0) == 1.0).all()


def test_ones_are_the_lcm_law():
    assert (draw(gamma.ones) == 1.0).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_mixture_has_a_share_at_one_and_is_else_uniform(p):
    values = draw(gamma.mixture(p), progress=0.7)
    at_end = values == 1.0
    assert abs(at_end.mean() - p) <= 5 * np.sqrt(p * (1 - p) / COUNT)
    if p < 1:
        assert_uniform(values[~at_end])


@pytest.mark.parametrize(
    "progress, p", [(0.0, 0.2), (0.25, 0.55), (0.5, 0.9), (0.75, 0.9), (1.0, 0.9)]
)
def test_annealed_share_rises_with_training_and_stays(progress, p):
    values = draw(gamma.annealed(0.2, 0.9, 0.5), progress)
    at_end = values == 1.0
    assert abs(at_end.mean() - p) <= 5 * np.sqrt(p * (1 - p) / COUNT)
    assert_uniform(values[~at_end])


def test_annealed_to_one_ends_as_lcm():
    assert (draw(gamma.annealed(0.0, 1.0, 0.5), progress=0.5) == 1.0).all()


def test_what_is_no_probability_is_refused():
    with pytest.raises(errors.UserError, match="p_1 1.5 is a probability"):
        gamma.annealed(0.0, 1.5, 1.0)
    with pytest.raises(errors.UserError, match="p_0 -0.1 is a probability"):
        gamma.mixture(-0.1)
    with pytest.raises(errors.UserError, match="until 0.0 is a share"):
        gamma.annealed(0.0, 1.0, 0.0)
