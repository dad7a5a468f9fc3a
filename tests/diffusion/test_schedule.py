"""Noise schedules against diffusers' schedulers and against closed forms."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax import errors
from slam_jax.diffusion import schedule

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
V_PREDICTION = {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}

KNOWN = {
    "stable diffusion": STABLE_DIFFUSION,
    "linear": {**STABLE_DIFFUSION, "beta_schedule": "linear", "beta_end": 0.02},
    "cosine": {**STABLE_DIFFUSION, "beta_schedule": "squaredcos_cap_v2"},
    "other length": {**STABLE_DIFFUSION, "num_train_timesteps": 500},
    "trained betas": {
        **STABLE_DIFFUSION,
        "trained_betas": list(np.linspace(1e-3, 3e-2, 200)),
        "num_train_timesteps": 200,
    },
    "zero terminal SNR": {**V_PREDICTION, "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("config", KNOWN.values(), ids=KNOWN)
def test_levels_are_those_of_diffusers(config):
    scheduler = diffusers.DDIMScheduler.from_config(config)
    alpha_bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    ours = schedule.from_config(dict(scheduler.config))
    # The room left is for diffusers' float32, where 1 - beta and 1 - alpha_bar cancel.
    np.testing.assert_allclose(ours.alpha, np.sqrt(alpha_bar), rtol=5e-5, atol=1e-6)
    np.testing.assert_allclose(ours.sigma, np.sqrt(1.0 - alpha_bar), rtol=5e-5, atol=3e-6)


@pytest.mark.parametrize("config", KNOWN.values(), ids=KNOWN)
def test_variance_is_preserved_and_signal_falls(config):
    levels = schedule.from_config(config)
    assert levels.alpha.dtype == levels.sigma.dtype == jnp.float32
    np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1.0, atol=2e-7)
    assert (np.diff(levels.alpha) < 0).all()


def test_stable_diffusion_ends():
    levels = schedule.from_config(STABLE_DIFFUSION)
    np.testing.assert_allclose(levels.sigma[0] ** 2, 0.00085, rtol=1e-6)
    np.testing.assert_allclose(levels.alpha[999] ** 2, 0.00466, rtol=1e-3)


def test_cosine_follows_its_closed_form():
    levels = schedule.from_config(KNOWN["cosine"])
    # The cap on beta touches the very last time alone.
    time = np.arange(1, 1000) / 1000
    closed = np.cos((time + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    np.testing.assert_allclose(levels.alpha[:999], closed, rtol=1e-5)


def test_coefficients_are_looked_up_in_the_order_of_t():
    levels = schedule.from_config(STABLE_DIFFUSION)
    alpha, sigma = levels(jnp.array([999, 0, 19]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(alpha.ravel(), np.asarray(levels.alpha)[[999, 0, 19]])
    np.testing.assert_array_equal(sigma.ravel(), np.asarray(levels.sigma)[[999, 0, 19]])


def test_old_files_that_are_silent_mean_epsilon():
    silent = {key: value for key, value in STABLE_DIFFUSION.items() if key != "prediction_type"}
    np.testing.assert_array_equal(
        schedule.from_config(silent).alpha, schedule.from_config(STABLE_DIFFUSION).alpha
    )
    with pytest.raises(errors.UserError, match="epsilon"):
        schedule.from_config({**silent, "rescale_betas_zero_snr": True})


def test_zero_terminal_snr_serves_v_prediction_alone():
    assert schedule.from_config(KNOWN["zero terminal SNR"]).alpha[-1] == 0.0
    for zero in ({"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 0.5, 1.0]}):
        assert schedule.from_config({**V_PREDICTION, **zero}).alpha[-1] == 0.0
        with pytest.raises(errors.UserError, match=r"epsilon.*divides by zero.*v_prediction"):
            schedule.from_config({**STABLE_DIFFUSION, **zero})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta_schedule": "sigmoid"}, r"'sigmoid' is not known; use .*scaled_linear"),
        ({"beta_schedule": None}, "None is not known"),
        ({"beta_end": 1.5}, r"beta must lie in \(0, 1\]"),
        ({"beta_start": 0.0}, r"beta must lie in \(0, 1\]"),
        ({"num_train_timesteps": 1}, "two or more"),
        ({"trained_betas": [0.1, float("nan")]}, "beta must lie"),
    ],
)
def test_what_is_not_known_is_refused(change, message):
    with pytest.raises(errors.UserError, match=message):
        schedule.from_config({**STABLE_DIFFUSION, **change})


def test_a_scheduler_of_another_family_is_named():
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    with pytest.raises(errors.UserError, match=r"FlowMatchEulerDiscreteScheduler.*beta_start"):
        schedule.from_config(flow)
