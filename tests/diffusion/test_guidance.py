"""Guidance in the LCM convention: w = 0 is the conditional prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.diffusion import guidance, parameterization, schedule
from slam_jax.shapes import SDXLText

LEVELS = schedule.from_config(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
)
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(2, 3, 2, 4)), jnp.float32)
TEXT, NULL_TEXT = jnp.asarray(RANDOM.normal(size=(2, 2, 7, 4)), jnp.float32)
T = jnp.array([999, 259])


def epsilon_teacher(x, t, text):
    """Depends on everything, differently for each text."""
    shift = jnp.mean(text, axis=1)[:, None, None, :]
    return jnp.tanh(x * (1.0 + shift)) + 1e-3 * t.astype(jnp.float32)[:, None, None, None]


def v_teacher(x, t, text):
    """The same teacher, speaking v."""
    alpha, sigma = LEVELS(t)
    eps = epsilon_teacher(x, t, text)
    return alpha * eps - sigma * (x - sigma * eps) / alpha


def guided(teacher, null_text=NULL_TEXT, w=3.0, prediction=parameterization.EPSILON):
    return guidance.guided(teacher, X, T, TEXT, null_text, w, LEVELS, prediction)


def test_no_weight_is_conditional_only():
    np.testing.assert_array_equal(guidance.cfg(X, 2 * X + 1, 0.0), X)
    alpha, sigma = LEVELS(T)
    eps = epsilon_teacher(X, T, TEXT)
    x_0hat, guided_eps = guided(epsilon_teacher, w=0.0)
    np.testing.assert_allclose(guided_eps, eps, rtol=1e-6)
    np.testing.assert_allclose(x_0hat, (X - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)


def test_weight_is_irrelevant_when_the_prompt_is():
    np.testing.assert_array_equal(guidance.cfg(X, X, 8.0), X)
    for ours, plain in zip(
        guided(epsilon_teacher, TEXT, 8.0), guided(epsilon_teacher, TEXT, 0.0), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)


def test_weight_is_one_less_than_the_pipelines_guidance_scale():
    cond, uncond, scale = 3.0 * X, X**2, 7.5
    expected = uncond + scale * (cond - uncond)
    np.testing.assert_allclose(guidance.cfg(cond, uncond, scale - 1.0), expected, rtol=1e-5)


def test_guided_x0_and_noise_belong_to_the_same_x():
    alpha, sigma = LEVELS(T)
    x_0hat, eps = guided(epsilon_teacher)
    np.testing.assert_allclose(alpha * x_0hat + sigma * eps, X, atol=1e-5)
    cond, uncond = epsilon_teacher(X, T, TEXT), epsilon_teacher(X, T, NULL_TEXT)
    np.testing.assert_allclose(eps, 4.0 * cond - 3.0 * uncond, atol=1e-5)


def test_v_and_epsilon_teachers_agree():
    of_v = guided(v_teacher, prediction=parameterization.V_PREDICTION)
    for ours, expected in zip(of_v, guided(epsilon_teacher), strict=True):
        assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-5


def test_both_predictions_come_from_one_call():
    calls = []

    def teacher(x, t, text):
        calls.append((x, t, text))
        return epsilon_teacher(x, t, text)

    guided(teacher)
    ((x, t, text),) = calls
    np.testing.assert_array_equal(x, np.repeat(X, 2, axis=0))
    np.testing.assert_array_equal(t, [999, 999, 259, 259])
    np.testing.assert_array_equal(text, [TEXT[0], NULL_TEXT[0], TEXT[1], NULL_TEXT[1]])


@pytest.mark.parametrize("w", [0.0, 5.0])
def test_one_empty_prompt_serves_the_whole_batch(w):
    one = NULL_TEXT[:1]
    repeated = jnp.concatenate([one, one])
    ours = jax.jit(lambda null_text: guided(epsilon_teacher, null_text, w))(one)
    for value, expected in zip(ours, guided(epsilon_teacher, repeated, w), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_sdxls_sizes_are_those_of_the_example_with_and_without_its_caption():
    calls = []

    def teacher(x, t, text):
        calls.append(text)
        return epsilon_teacher(x, t, text.hidden_states)

    sizes = jnp.asarray([[32, 24, 0, 4, 16, 16], [8, 8, 1, 0, 8, 8]], jnp.int32)
    text = SDXLText(TEXT, TEXT[:, 0], sizes)
    one = SDXLText(NULL_TEXT[:1], NULL_TEXT[:1, 1], jnp.zeros((1, 6), jnp.int32))
    guidance.guided(teacher, X, T, text, one, 2.0, LEVELS, parameterization.EPSILON)
    (both,) = calls
    null = NULL_TEXT[0]
    np.testing.assert_array_equal(both.hidden_states, [TEXT[0], null, TEXT[1], null])
    np.testing.assert_array_equal(both.pooled, [TEXT[0, 0], null[1], TEXT[1, 0], null[1]])
    np.testing.assert_array_equal(both.time_ids, np.repeat(sizes, 2, axis=0))
