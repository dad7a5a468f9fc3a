"""The benchmarks' mixtures: their noise, their flow, and the distance between samples."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.spatial import distance

from benchmarks import gaussian_mixture, mixtures
from slam_jax import errors
from slam_jax.diffusion import parameterization, schedule, solver, subpath
from slam_jax.distill import gamma, loss

LEVELS = schedule.from_config(gaussian_mixture.SCHEDULER)
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("dim", [2, 5])
def test_noise_is_the_gradient_of_the_density(dim):
    data = mixtures.make(dim)
    t = jnp.array([0, 300, 999])
    x = RANDOM.normal(size=(3, 1, 1, dim)).astype(np.float32)
    ours = mixtures.exact_noise(data, LEVELS, jnp.asarray(x), t, None)
    for row, time in enumerate(t.tolist()):
        alpha, sigma = (float(level[time]) for level in LEVELS)
        means = torch.tensor(np.asarray(data.means, np.float64))
        std = torch.tensor(np.hypot(alpha * data.spread, sigma))
        density = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(8)),
            torch.distributions.Independent(
                torch.distributions.Normal(alpha * means, std.expand(8, dim)), 1
            ),
        )
        at = torch.tensor(x[row, 0, 0].astype(np.float64), requires_grad=True)
        density.log_prob(at).backward()
        np.testing.assert_allclose(
            ours[row, 0, 0], -sigma * at.grad.numpy(), rtol=1e-4, atol=1e-5 / sigma
        )


def test_samples_are_the_mixtures():
    data = mixtures.make(2)
    x = np.asarray(mixtures.draw(data, jax.random.key(0), 8000))[:, 0, 0]
    away = np.linalg.norm(x[:, None] - np.asarray(data.means), axis=-1)
    shares = np.bincount(away.argmin(1), minlength=8) / len(x)
    assert np.abs(shares - 1 / 8).max() < 5 * np.sqrt(1 / 8 / len(x))
    assert np.sqrt((away.min(1) ** 2).mean() / 2) == pytest.approx(data.spread, rel=0.02)


def test_the_flow_of_a_single_gaussian_ends_where_it_must():
    data = mixtures.Mixture(jnp.array([[1.0, -0.5]]), 0.15)
    method = loss.Method(
        LEVELS, parameterization.EPSILON, solver.start_grid(50, 1000), 20, 20, 0.0,
        subpath.matched, loss.squared, gamma.ones,
    )  # fmt: skip
    x = RANDOM.normal(size=(4, 1, 1, 2)).astype(np.float32)
    first, last = (
        (float(LEVELS.alpha[t]), np.hypot(data.spread * LEVELS.alpha[t], LEVELS.sigma[t]))
        for t in (999, 0)
    )
    mean = np.array([1.0, -0.5])
    expected = last[0] * mean + (x[:, 0, 0] - first[0] * mean) * (last[1] / first[1])
    error = [
        np.abs(gaussian_mixture.follow(data, method, jnp.asarray(x), stride=stride) - expected)
        for stride in (1, 20)
    ]
    assert error[0].max() < 0.005 and error[1].mean() > 5 * error[0].mean(), error


def test_energy_distance_is_that_of_all_pairs():
    x, y = RANDOM.normal(size=(40, 3)), 0.5 + RANDOM.normal(size=(70, 3))
    expected = 2 * distance.cdist(x, y).mean() - distance.pdist(x).mean() - distance.pdist(y).mean()
    ours = mixtures.energy_distance(
        jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), mixtures.within(jnp.asarray(y))
    )
    assert ours == pytest.approx(expected, rel=1e-4)


def test_differences_are_paired_by_seed():
    found, first = {"err1": np.array([0.4, 0.6])}, {"err1": np.array([0.3, 0.4])}
    row = gaussian_mixture.summary(found, first)
    assert row["err1"] == [0.5, 0.1] and row["minus_first"]["err1"] == [0.15, 0.05]
    alone = gaussian_mixture.summary({"err1": np.array([0.4])}, {"err1": np.array([0.3])})
    assert alone == {"err1": [0.4, None], "minus_first": {"err1": [0.1, None]}}


def test_every_form_is_a_method_and_a_bad_length_is_told():
    options = argparse.Namespace(length=100, stride=20)
    for form in gaussian_mixture.FORMS:
        assert gaussian_mixture.method(form, options).length == 100
    with pytest.raises(errors.UserError, match="length 30 must be a positive multiple"):
        gaussian_mixture.method("lcm", argparse.Namespace(length=30, stride=20))
