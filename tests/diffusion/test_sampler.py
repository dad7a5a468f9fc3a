"""Samplers against loops over diffusers' schedulers, fed the same noise."""

import fractions

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lcm

from slam_jax import errors
from slam_jax.diffusion import parameterization, sampler, schedule

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PREDICTIONS = ["epsilon", "v_prediction"]
SHAPE = (2, 3, 2, 4)
RANDOM = np.random.default_rng(0)
TEXT, NULL_TEXT = RANDOM.normal(size=(2, 2, 5, 4)).astype(np.float32)
NOISE = RANDOM.normal(size=(8, *SHAPE)).astype(np.float32)


def network(math, x, t, text):
    """A made-up raw network, in jnp and in torch alike; t is a float."""
    return math.tanh(0.8 * x + text.mean(1)[:, None, None, :]) + 4e-4 * t * x


def teacher(x, t, text):
    return network(jnp, x, t.astype(jnp.float32)[:, None, None, None], text)


def student(x, t, text, gamma):
    """Right only at gamma = 1."""
    return teacher(x, t, text) + 100.0 * (gamma - 1.0)


def set_up(prediction_type):
    config = {**CONFIG, "prediction_type": prediction_type}
    prediction = parameterization.prediction_from_config(config)
    return config, schedule.from_config(config), prediction


def relative_error(ours, expected):
    return np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("original_steps", [50, 25, 8])
def test_times_are_those_of_diffusers(original_steps):
    scheduler = diffusers.LCMScheduler(original_inference_steps=original_steps)
    for num_steps in range(1, original_steps + 1):
        scheduler.set_timesteps(num_steps)
        times = sampler.few_step_times(num_steps, original_steps)
        np.testing.assert_array_equal(times, scheduler.timesteps.numpy())


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.58, 0.3, 0.02])
def test_times_at_a_strength_are_those_of_diffusers(strength):
    scheduler = diffusers.LCMScheduler(original_inference_steps=50)
    for num_steps in range(1, int(50 * strength) + 1):
        scheduler.set_timesteps(num_steps, strength=strength)
        times = sampler.few_step_times(num_steps, strength=strength)
        np.testing.assert_array_equal(times, scheduler.timesteps.numpy())


def test_strengths_that_leave_too_few_times_are_refused():
    with pytest.raises(errors.UserError, match="4 sampling steps at strength 0.06: .* 3 times"):
        sampler.few_step_times(4, strength=0.06)
    for strength in (0.0, 1.1):
        with pytest.raises(errors.UserError, match="share of the noise"):
            sampler.few_step_times(4, strength=strength)


def test_times_in_figures():
    assert sampler.few_step_times(1).tolist() == [999]
    assert sampler.few_step_times(2).tolist() == [999, 499]
    assert sampler.few_step_times(4).tolist() == [999, 759, 499, 259]
    assert sampler.ddim_times(4).tolist() == [999, 759, 499, 259]
    assert sampler.ddim_times(50).tolist() == list(range(999, 0, -20))
    for num_steps in (0, 51):
        with pytest.raises(errors.UserError, match=f"{num_steps} sampling steps.* 50 times"):
            sampler.few_step_times(num_steps)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("num_steps", "strength"), [(1, None), (2, None), (4, None), (3, 0.5)])
def test_student_sampling_is_that_of_lcm_scheduler(
    prediction_type, num_steps, strength, monkeypatch
):
    config, levels, prediction = set_up(prediction_type)
    fresh = iter(NOISE[1:])
    monkeypatch.setattr(
        scheduling_lcm, "randn_tensor", lambda *args, **kwargs: torch.tensor(next(fresh))
    )
    scheduler = diffusers.LCMScheduler(**config, clip_sample=False)
    scheduler.set_timesteps(num_steps, strength=strength or 1.0)
    x, start = torch.tensor(NOISE[0]), None
    if strength is not None:
        start = RANDOM.normal(size=SHAPE).astype(np.float32)
        x = scheduler.add_noise(torch.tensor(start), x, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        output = network(torch, x, float(t), torch.tensor(TEXT))
        x, denoised = scheduler.step(output, t, x, return_dict=False)
    ours = sampler.consistency_sample(
        student, levels, prediction,
        sampler.few_step_times(num_steps, strength=strength or 1.0),
        jnp.asarray(NOISE[:num_steps]), jnp.asarray(TEXT),
        None if start is None else jnp.asarray(start),
    )  # fmt: skip
    assert relative_error(ours, denoised.numpy()) < 1e-5
    assert len(list(fresh)) == 8 - num_steps


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("w", [0.0, 4.0])
def test_teacher_sampling_is_that_of_ddim_scheduler(prediction_type, num_steps, w):
    config, levels, prediction = set_up(prediction_type)
    scheduler = diffusers.DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=True)
    times = sampler.ddim_times(num_steps)
    x = torch.tensor(NOISE[0])
    for t, t_next in zip(times.tolist(), [*times[1:].tolist(), -1], strict=True):
        # The scheduler goes down by num_train_timesteps // num_inference_steps.
        scheduler.num_inference_steps = fractions.Fraction(1000, t - t_next)
        cond = network(torch, x, float(t), torch.tensor(TEXT))
        uncond = network(torch, x, float(t), torch.tensor(NULL_TEXT))
        output = uncond + (w + 1) * (cond - uncond)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    ours = sampler.ddim_sample(
        teacher, levels, prediction, times,
        jnp.asarray(NOISE[0]), jnp.asarray(TEXT), jnp.asarray(NULL_TEXT), w,
    )  # fmt: skip
    assert relative_error(ours, x.numpy()) < 1e-4


def test_teacher_converges_to_the_gaussian_flow():
    # Data of standard deviation 0.4: the flow multiplies by 0.4 / std(999).
    _, levels, prediction = set_up("epsilon")

    def exact(x, t, text):
        del text
        alpha, sigma = levels(t)
        return sigma * x / ((0.4 * alpha) ** 2 + sigma**2)

    text = jnp.zeros((2, 1, 1))
    start = jnp.asarray(NOISE[0])
    std = np.sqrt((0.4 * levels.alpha[999]) ** 2 + levels.sigma[999] ** 2)
    error = [
        relative_error(
            sampler.ddim_sample(
                exact, levels, prediction, sampler.ddim_times(steps, 1000), start, text, text, 3.0
            ),
            NOISE[0] * 0.4 / std,
        )
        for steps in (50, 200, 1000)
    ]
    assert error[0] > 2.5 * error[1] > 6 * error[2], error
    assert error[2] < 0.01, error


def test_zero_terminal_snr_samples_with_v():
    levels = schedule.from_config(
        {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    )
    prediction = parameterization.V_PREDICTION
    noise, text = jnp.asarray(NOISE[:4]), jnp.asarray(TEXT)
    times = sampler.few_step_times(4)
    assert np.isfinite(
        sampler.consistency_sample(student, levels, prediction, times, noise, text)
    ).all()
    assert np.isfinite(
        sampler.ddim_sample(teacher, levels, prediction, times, noise[0], text, text[:1], 2.0)
    ).all()


def test_network_is_traced_once_and_fed_integer_times():
    _, levels, prediction = set_up("epsilon")
    traced = []

    def watched(x, t, text, gamma):
        traced.append((x.shape, t.dtype, gamma.shape))
        return student(x, t, text, gamma)

    jax.make_jaxpr(
        lambda noise: sampler.consistency_sample(
            watched, levels, prediction, sampler.few_step_times(8), noise, jnp.asarray(TEXT)
        )
    )(jnp.asarray(NOISE))
    assert traced == [(SHAPE, jnp.int32, (2, 1, 1, 1))]
