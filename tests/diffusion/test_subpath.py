"""Points on the sub-path and their noise levels, each under the coupling it belongs to."""

import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.diffusion import schedule, subpath

LEVELS = schedule.from_config(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
)
# (t, s): 20 and 100 long, at both ends of training and in the middle.
ENDS = [(999, 979), (999, 899), (519, 419), (19, 0)]
EVERY_SIGMA = [subpath.sigma_markov, subpath.sigma_ddim, subpath.sigma_fixed]


def levels(t: int, s: int):
    """alpha_t, sigma_t, alpha_s, sigma_s as the loss passes them."""
    return *LEVELS(jnp.array([t])), *LEVELS(jnp.array([s]))


def coefficient(value: float):
    return jnp.full((1, 1, 1, 1), value)


@pytest.mark.parametrize("t, s", ENDS)
@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_sigma_markov_is_the_spread_after_a_forward_step(t, s, gamma):
    count = 1_000_000
    alpha_t, sigma_t, alpha_s, sigma_s = (np.float64(level.item()) for level in levels(t, s))
    random = np.random.default_rng(t)
    x_0, noise, fresh = random.normal(size=(3, count))
    x_s = alpha_s * x_0 + sigma_s * noise
    ratio = alpha_t / alpha_s
    x_t = ratio * x_s + np.sqrt(1 - ratio**2) * fresh
    x_gamma = subpath.interpolate(
        jnp.asarray(x_s, jnp.float32).reshape(1, 1, count, 1),
        jnp.asarray(x_t, jnp.float32).reshape(1, 1, count, 1),
        coefficient(alpha_s), coefficient(alpha_t), coefficient(gamma),
    )  # fmt: skip
    rest = np.float64(x_gamma.ravel()) - alpha_t * x_0
    assert abs(np.mean(rest)) < 5 / np.sqrt(count)
    # The standard error of a standard deviation is 1/sqrt(2 count): five of them.
    sigma = subpath.sigma_markov(*levels(t, s), coefficient(gamma)).item()
    np.testing.assert_allclose(sigma, rest.std(), rtol=5 / np.sqrt(2 * count))


@pytest.mark.parametrize("t, s", ENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_sigma_ddim_is_the_noise_after_one_ddim_step(t, s, gamma):
    alpha_t, sigma_t, alpha_s, sigma_s = levels(t, s)
    random = np.random.default_rng(s)
    x_0hat, eps = jnp.asarray(random.normal(size=(2, 1, 3, 2, 4)), jnp.float32)
    x_t = alpha_t * x_0hat + sigma_t * eps
    x_s = alpha_s * x_0hat + sigma_s * eps
    x_gamma = subpath.interpolate(x_s, x_t, alpha_s, alpha_t, coefficient(gamma))
    sigma = subpath.sigma_ddim(alpha_t, sigma_t, alpha_s, sigma_s, coefficient(gamma))
    np.testing.assert_allclose(x_gamma, alpha_t * x_0hat + sigma * eps, atol=1e-6)


@pytest.mark.parametrize("t, s", ENDS)
def test_ends_of_the_subpath(t, s):
    alpha_t, sigma_t, alpha_s, sigma_s = levels(t, s)
    random = np.random.default_rng(0)
    x_s, x_t = jnp.asarray(random.normal(size=(2, 1, 3, 2, 4)), jnp.float32)
    zero, one = coefficient(0.0), coefficient(1.0)
    np.testing.assert_array_equal(subpath.interpolate(x_s, x_t, alpha_s, alpha_t, one), x_t)
    drifted = subpath.interpolate(x_s, x_t, alpha_s, alpha_t, zero)
    np.testing.assert_allclose(drifted, alpha_t / alpha_s * x_s, rtol=1e-6)
    for sigma in EVERY_SIGMA:
        at_one = sigma(alpha_t, sigma_t, alpha_s, sigma_s, one)
        np.testing.assert_allclose(at_one, sigma_t, rtol=1e-5)
    for sigma in EVERY_SIGMA[:2]:
        at_zero = sigma(alpha_t, sigma_t, alpha_s, sigma_s, zero)
        np.testing.assert_allclose(at_zero, alpha_t / alpha_s * sigma_s, rtol=1e-5)


def test_sigma_fixed_does_not_know_gamma():
    gamma = jnp.linspace(0.0, 1.0, 5)[:, None, None, None]
    times = jnp.full((5,), 999), jnp.full((5,), 899)
    arguments = *LEVELS(times[0]), *LEVELS(times[1])
    np.testing.assert_array_equal(subpath.sigma_fixed(*arguments, gamma), arguments[1])


@pytest.mark.parametrize("t, s", ENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_a_matched_point_is_the_ddim_point_of_its_time(t, s, gamma):
    alpha_t, sigma_t, alpha_s, sigma_s = levels(t, s)
    random = np.random.default_rng(s)
    x_0hat, eps = jnp.asarray(random.normal(size=(2, 1, 3, 2, 4)), jnp.float32)
    x_t, x_s = alpha_t * x_0hat + sigma_t * eps, alpha_s * x_0hat + sigma_s * eps
    times = jnp.array([s]), jnp.array([t])
    point = subpath.matched(LEVELS, x_s, times[0], x_t, times[1], coefficient(gamma))
    tau = point.t.item()
    alpha, sigma = np.float64(LEVELS.alpha), np.float64(LEVELS.sigma)
    np.testing.assert_allclose(point.x, alpha[tau] * x_0hat + sigma[tau] * eps, atol=2e-5)
    np.testing.assert_array_equal(point.alpha.item(), LEVELS.alpha[tau])
    np.testing.assert_array_equal(point.sigma.item(), LEVELS.sigma[tau])
    assert point.gamma.item() == 1.0
    # The whole time whose noise-to-signal ratio is the nearest.
    ratio = sigma / alpha
    wanted = gamma * ratio[t] + (1 - gamma) * ratio[s]
    assert tau == np.abs(ratio - wanted).argmin()
    assert tau == {0.0: s, 1.0: t}.get(gamma, tau)


def test_a_matched_point_at_the_noisy_end_is_x_t_itself():
    x_s, x_t = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4)), jnp.float32)
    s, t = jnp.array([979, 0, 419]), jnp.array([999, 19, 519])
    point = subpath.matched(LEVELS, x_s, s, x_t, t, jnp.ones((3, 1, 1, 1)))
    np.testing.assert_array_equal(point.x, x_t)
    np.testing.assert_array_equal(point.t, t)
