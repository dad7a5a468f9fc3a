"""Guided samplers against loops over diffusers' schedulers, and against a flow known in full."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slam_jax import errors
from slam_jax.diffusion import ode_sampler, parameterization, sampler, schedule, spacing

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCHEDULERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}
SPACINGS = {
    "linspace": {},  # what a config that names none means
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
}
PREDICTIONS = ["epsilon", "v_prediction"]
SHAPE = (2, 3, 2, 4)
RANDOM = np.random.default_rng(0)
TEXT, NULL_TEXT = RANDOM.normal(size=(2, 2, 5, 4)).astype(np.float32)
NOISE = RANDOM.normal(size=SHAPE).astype(np.float32)
W = 4.0


def network(math, x, t, text):
    """A made-up raw network, in jnp and in torch alike; t is a float."""
    return math.tanh(0.8 * x + text.mean(1)[:, None, None, :]) + 4e-4 * t * x


def teacher(x, t, text):
    return network(jnp, x, t.astype(jnp.float32)[:, None, None, None], text)


@functools.cache
def compiled(name, prediction_type):
    """(path, noise) -> x_0, one program for every path of as many calls."""
    prediction = parameterization.prediction_from_config({"prediction_type": prediction_type})
    return jax.jit(
        lambda path, noise: ode_sampler.sample(
            teacher, prediction, path, sampler.GUIDED[name].correct, noise,
            jnp.asarray(TEXT), jnp.asarray(NULL_TEXT), W,
        )
    )  # fmt: skip


def drawn(name, num_steps, config):
    levels = schedule.from_config(config)
    path = sampler.GUIDED[name].path(num_steps, levels, config)
    return compiled(name, config["prediction_type"])(path, jnp.asarray(NOISE))


def drawn_by_diffusers(name, num_steps, config):
    scheduler = SCHEDULERS[name](**config)
    scheduler.set_timesteps(num_steps)
    x = torch.tensor(NOISE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        cond = network(torch, scaled, float(t), torch.tensor(TEXT))
        uncond = network(torch, scaled, float(t), torch.tensor(NULL_TEXT))
        output = uncond + (W + 1) * (cond - uncond)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x.numpy()


def relative_error(ours, expected):
    return np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_draws_what_its_scheduler_does(name, prediction_type, kind):
    config = {**CONFIG, "prediction_type": prediction_type, **SPACINGS[kind]}
    error = relative_error(drawn(name, 7, config), drawn_by_diffusers(name, 7, config))
    assert error < 1e-5, error


@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_from_one_step_to_many(name, num_steps):
    # DPM-Solver's rules change at 15 steps.
    config = {**CONFIG, "prediction_type": "epsilon", **SPACINGS["trailing"]}
    error = relative_error(
        drawn(name, num_steps, config), drawn_by_diffusers(name, num_steps, config)
    )
    assert error < 1e-5, error


@pytest.mark.parametrize("name", ["euler", "dpm++2m"])
def test_zero_terminal_snr_is_sampled_as_by_diffusers(name):
    config = {
        **CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        **SPACINGS["trailing"],
    }  # fmt: skip
    assert schedule.from_config(config).alpha[999] == 0
    error = relative_error(drawn(name, 7, config), drawn_by_diffusers(name, 7, config))
    assert error < 1e-4, error


def test_heun_too_takes_zero_terminal_snr():
    # diffusers' does not know rescale_betas_zero_snr.
    config = {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert np.isfinite(drawn("heun", 7, config)).all()


@pytest.mark.parametrize("kind", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_times_and_network_calls_are_those_of_diffusers(name, kind):
    scheduler = SCHEDULERS[name](**CONFIG, **SPACINGS[kind])
    levels = schedule.from_config(CONFIG)
    for num_steps in (*range(1, 11), 25, 48, 50, 100, 333):
        scheduler.set_timesteps(num_steps)
        expected = scheduler.timesteps.numpy()
        path = sampler.GUIDED[name].path(num_steps, levels, {**CONFIG, **SPACINGS[kind]})
        np.testing.assert_array_equal(path.times, expected)
        assert sampler.GUIDED[name].network_calls(num_steps) == 2 * expected.size


def test_times_are_integers_where_they_can_be():
    levels = schedule.from_config(CONFIG)
    dtypes = [ode_sampler.EULER.path(7, levels, config).times.dtype for config in SPACINGS.values()]
    assert dtypes == [jnp.float32, jnp.int32, jnp.int32]


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++2m", 2)]
)
def test_error_falls_with_the_order_of_the_solver(name, order):
    """Of Gaussian data the flow keeps x / std(x), so that its end is known.

    Data of standard deviation 5: then what is done wrong is done at the noisy end, where training
    times are even steps of log(alpha / sigma), and not in the last, always long, step.
    """
    levels, spread = schedule.from_config(CONFIG), 5.0
    config = {**CONFIG, **SPACINGS["trailing"], "original_inference_steps": 1000}

    def exact(x, t, text):
        del text
        alpha, sigma = levels(t)
        return sigma * x / ((spread * alpha) ** 2 + sigma**2)

    text, error = jnp.zeros((2, 1, 1)), []
    for num_steps in (25, 50, 100):
        path = sampler.GUIDED[name].path(num_steps, levels, config)
        ours = ode_sampler.sample(
            exact, parameterization.EPSILON, path, sampler.GUIDED[name].correct,
            jnp.asarray(NOISE), text, text, 3.0,
        )  # fmt: skip
        std = np.sqrt((spread * np.asarray(path.alpha, np.float64)) ** 2 + path.sigma**2)
        # A sampler ends with the mean of x_0 given the last x.
        end = path.start * NOISE * (std[-1] / std[0]) * spread**2 * path.alpha[-1] / std[-1] ** 2
        error.append(relative_error(ours, end))
    observed = np.log2(np.array(error[:-1]) / error[1:])
    assert observed.min() > order - 0.1 and observed.max() < order + 0.6, (error, observed)


@pytest.mark.parametrize(
    ("change", "num_steps", "message"),
    [
        ({"timestep_spacing": "uniform"}, 7, "'uniform'.*leading, linspace, trailing"),
        ({"use_karras_sigmas": True}, 7, "use_karras_sigmas True is not supported.*False"),
        ({"final_sigmas_type": "sigma_min"}, 7, "final_sigmas_type 'sigma_min'.*'zero'"),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 1000, "steps_offset .* time 1000"),
        ({}, 0, "0 sampling steps: choose from 1"),
        ({}, 1001, "1001 sampling steps"),
    ],
)
def test_what_cannot_be_sampled_is_told(change, num_steps, message):
    with pytest.raises(errors.UserError, match=message):
        ode_sampler.EULER.path(num_steps, schedule.from_config(CONFIG), {**CONFIG, **change})


def test_a_null_in_a_config_is_its_default():
    config = {**CONFIG, "use_karras_sigmas": None, "timestep_spacing": "leading"}
    assert spacing.from_config(config) == spacing.Spacing("leading", 0)


def test_an_unknown_sampler_is_named_with_those_that_are_known():
    with pytest.raises(errors.UserError, match="'ddpm'.*ddim, euler, heun, dpm"):
        sampler.guided("ddpm")
