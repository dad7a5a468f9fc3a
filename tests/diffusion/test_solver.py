"""DDIM against the exact probability flow of Gaussian data; grids of start times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax import errors
from slam_jax.diffusion import schedule, solver

LEVELS = schedule.from_config(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
)


@jax.jit
def gaussian_step(x, t, s, spread):
    """One step with the exact noise prediction for data of standard deviation `spread`."""
    alpha_t, sigma_t = LEVELS(t)
    variance = (alpha_t * spread) ** 2 + sigma_t**2
    x_0hat, eps = alpha_t * spread**2 * x / variance, sigma_t * x / variance
    return solver.ddim_step(x_0hat, eps, *LEVELS(s))


def test_ddim_converges_to_the_gaussian_flow_with_order_one():
    spread, start, end = 0.5, 960, 0
    alpha, sigma = np.float64(LEVELS.alpha), np.float64(LEVELS.sigma)
    std = np.sqrt((alpha * spread) ** 2 + sigma**2)
    lengths = np.array([40, 20, 10, 5])
    errors = []
    for length in lengths:
        x = jnp.ones((1, 1, 1, 1))
        for t in range(start, end, -length):
            x = gaussian_step(x, jnp.array([t]), jnp.array([t - length]), spread)
        errors.append(abs(x.item() - std[end] / std[start]))
    order = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert abs(order - 1) < 0.1, (order, errors)


def test_one_datum_is_reached_in_a_single_step():
    # All data at zero: the noise prediction x / sigma is exact, and so is every step.
    x = gaussian_step(jnp.full((1, 1, 1, 1), 3.0), jnp.array([999]), jnp.array([19]), 0.0)
    np.testing.assert_allclose(x.item(), 3.0 * LEVELS.sigma[19] / LEVELS.sigma[999], rtol=1e-6)


def test_start_grid_ends_with_the_last_training_time():
    np.testing.assert_array_equal(solver.start_grid(50, 1000), np.arange(19, 1000, 20))
    np.testing.assert_array_equal(solver.start_grid(4, 1000), [249, 499, 749, 999])
    assert solver.start_grid(50, 1000).dtype == jnp.int32
    for num_subpaths in (0, 1001):
        with pytest.raises(errors.UserError, match=f"num_subpaths {num_subpaths} .* 1000"):
            solver.start_grid(num_subpaths, 1000)


def test_all_times_are_all_times():
    np.testing.assert_array_equal(solver.all_times(1000), np.arange(1000))
