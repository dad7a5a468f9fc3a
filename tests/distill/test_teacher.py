"""The teacher's walk down a sub-path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.diffusion import parameterization, schedule
from slam_jax.distill import teacher as teacher_walk

LEVELS = schedule.from_config(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
)
ALPHA, SIGMA = np.float64(LEVELS.alpha), np.float64(LEVELS.sigma)
RANDOM = np.random.default_rng(0)
T = np.array([999, 259, 99, 59, 19])
X_T = RANDOM.normal(size=(5, 3, 2, 4))
TEXT, NULL_TEXT = RANDOM.normal(size=(2, 5, 6, 4))


def network(math, x, t, text):
    """A made-up teacher, for jnp and numpy alike; t is [B, 1, 1, 1] and real."""
    return math.tanh(0.8 * x + text.mean(1)[:, None, None, :]) + 4e-4 * t * x


def teacher(x, t, text):
    assert t.dtype == jnp.int32
    return network(jnp, x, t.astype(jnp.float32)[:, None, None, None], text)


def walk(teacher, length, stride, w=3.0, prediction=parameterization.EPSILON, t=T):
    arrays = (jnp.asarray(array, jnp.float32) for array in (X_T, TEXT, NULL_TEXT))
    x_t, text, null_text = arrays

    @jax.jit
    def run(x_t, t):
        return teacher_walk.walk(
            teacher, x_t, t, text, null_text, w, LEVELS, prediction, length, stride
        )

    x_s, s = run(x_t, jnp.asarray(t))
    assert s.dtype == jnp.int32
    return x_s, np.asarray(s)


def relative_error(ours, expected):
    return np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected)


def one_step(x, t, s, w, v_prediction):
    """A guided DDIM step in float64, as METHOD.md §1.8 words it; guidance on the raw output."""
    alpha_t, sigma_t, alpha_s, sigma_s = (
        levels[times][:, None, None, None] for times in (t, s) for levels in (ALPHA, SIGMA)
    )
    time = t[:, None, None, None]
    cond, uncond = network(np, x, time, TEXT), network(np, x, time, NULL_TEXT)
    output = (1 + w) * cond - w * uncond
    if v_prediction:
        return alpha_s * (alpha_t * x - sigma_t * output) + sigma_s * (
            alpha_t * output + sigma_t * x
        )
    return alpha_s / alpha_t * (x - sigma_t * output) + sigma_s * output


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("w", [0.0, 8.0])
def test_one_step_is_one_guided_ddim_step(v_prediction, w):
    prediction = [parameterization.EPSILON, parameterization.V_PREDICTION][v_prediction]
    x_s, s = walk(teacher, 20, 20, w, prediction)
    expected_s = np.array([979, 239, 79, 39, 0])
    np.testing.assert_array_equal(s, expected_s)
    assert relative_error(x_s, one_step(X_T, T, expected_s, w, v_prediction)) < 1e-5


@pytest.mark.parametrize("v_prediction", [False, True])
def test_more_steps_are_a_chain_in_which_each_sample_stops_at_time_zero(v_prediction):
    prediction = [parameterization.EPSILON, parameterization.V_PREDICTION][v_prediction]
    x_s, s = walk(teacher, 100, 20, 3.0, prediction)
    np.testing.assert_array_equal(s, [899, 159, 0, 0, 0])
    x, q = X_T, T
    for _ in range(5):
        q_next = np.maximum(q - 20, 0)
        moving = (q > 0)[:, None, None, None]
        x = np.where(moving, one_step(x, q, q_next, 3.0, v_prediction), x)
        q = q_next
    assert relative_error(x_s, x) < 1e-5


def test_a_sample_at_rest_is_not_touched_by_what_the_teacher_says():
    def nonsense_at_zero(x, t, text):
        at_zero = (t == 0)[:, None, None, None]
        return jnp.where(at_zero, jnp.nan, teacher(x, t, text))

    x_s, _ = walk(nonsense_at_zero, 100, 20)
    np.testing.assert_array_equal(x_s, walk(teacher, 100, 20)[0])
    assert np.isfinite(x_s).all()
    at_rest, s = walk(nonsense_at_zero, 100, 20, t=np.zeros(5, int))
    np.testing.assert_array_equal(at_rest, X_T.astype(np.float32))
    np.testing.assert_array_equal(s, 0)


def test_more_steps_approach_the_gaussian_flow():
    spread, length = 0.5, 120
    std = np.sqrt((ALPHA * spread) ** 2 + SIGMA**2)

    def exact(x, t, text):
        del text
        alpha, sigma = LEVELS(t)
        return sigma * x / ((spread * alpha) ** 2 + sigma**2)

    t = np.array([999, 759, 499, 259, 139])
    flow = X_T * (std[t - length] / std[t])[:, None, None, None]
    steps = [1, 2, 4, 8]
    error = [relative_error(walk(exact, length, length // n, t=t)[0], flow) for n in steps]
    order = -np.polyfit(np.log(steps), np.log(error), 1)[0]
    assert abs(order - 1) < 0.15, (order, error)


def test_teacher_is_traced_once_for_any_number_of_steps():
    traced = []

    def watched(x, t, text):
        traced.append(x.shape)
        return teacher(x, t, text)

    walk(watched, 100, 20)
    assert traced == [(10, 3, 2, 4)]


def test_stride_must_divide_length():
    with pytest.raises(AssertionError):
        walk(teacher, 100, 30)
