"""Raw outputs to x_0 and noise, boundary coefficients, the embedding of gamma."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slam_jax import errors
from slam_jax.diffusion import parameterization

SHAPE = (5, 3, 2, 4)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def coefficients(values: list[float]) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[:, None, None, None]


X_0, NOISE = normal(0), normal(1)
# The last two are inside a sub-path: their squares do not add up to one.
ALPHA = coefficients([1.0, 0.8, 0.068, 0.068, 0.5])
SIGMA = coefficients([0.0, 0.6, 0.9977, 0.93, 0.4])
X = ALPHA * X_0 + SIGMA * NOISE


def test_epsilon_gives_back_signal_and_noise():
    prediction = parameterization.EPSILON
    np.testing.assert_allclose(
        prediction.to_x0(X, jnp.asarray(NOISE), ALPHA, SIGMA), X_0, atol=1e-5
    )
    np.testing.assert_array_equal(prediction.to_eps(X, jnp.asarray(NOISE), ALPHA, SIGMA), NOISE)


def test_v_gives_back_signal_and_noise_inside_a_subpath_too():
    n = np.sqrt(np.float64(ALPHA) ** 2 + np.float64(SIGMA) ** 2)
    v = jnp.asarray((ALPHA * NOISE - SIGMA * X_0) / n, jnp.float32)
    prediction = parameterization.V_PREDICTION
    np.testing.assert_allclose(prediction.to_x0(X, v, ALPHA, SIGMA), X_0, atol=1e-5)
    np.testing.assert_allclose(prediction.to_eps(X, v, ALPHA, SIGMA), NOISE, atol=1e-5)


def test_v_is_the_velocity_of_diffusers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    t = torch.tensor([0, 19, 259, 700, 999])
    v = scheduler.get_velocity(torch.tensor(X_0), torch.tensor(NOISE), t).numpy()
    alpha_bar = scheduler.alphas_cumprod[t].numpy()
    alpha, sigma = coefficients(np.sqrt(alpha_bar)), coefficients(np.sqrt(1 - alpha_bar))
    x = alpha * X_0 + sigma * NOISE
    prediction = parameterization.V_PREDICTION
    np.testing.assert_allclose(prediction.to_x0(x, jnp.asarray(v), alpha, sigma), X_0, atol=1e-5)
    np.testing.assert_allclose(prediction.to_eps(x, jnp.asarray(v), alpha, sigma), NOISE, atol=1e-5)


@pytest.mark.parametrize("prediction", [parameterization.EPSILON, parameterization.V_PREDICTION])
def test_outputs_of_lower_precision_are_raised_first(prediction):
    output = jnp.asarray(NOISE, jnp.bfloat16)
    for convert in prediction:
        converted = convert(X, output, ALPHA, SIGMA)
        assert converted.dtype == jnp.float32
        np.testing.assert_array_equal(
            converted, convert(X, output.astype(jnp.float32), ALPHA, SIGMA)
        )


def test_prediction_type_is_read_from_the_scheduler():
    read = parameterization.prediction_from_config
    assert read({"prediction_type": "epsilon"}) is parameterization.EPSILON
    assert read({"prediction_type": "v_prediction"}) is parameterization.V_PREDICTION
    assert read({}) is parameterization.EPSILON
    with pytest.raises(errors.UserError, match=r"'sample'.*epsilon or v_prediction"):
        read({"prediction_type": "sample"})


def test_boundary_coefficients_are_those_of_released_models():
    times = [0, 1, 19, 259, 999]
    scheduler = diffusers.LCMScheduler()
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(t) for t in times]
    c_skip, c_out = parameterization.boundary(jnp.array(times))
    np.testing.assert_allclose(c_skip.ravel(), [pair[0] for pair in expected], rtol=1e-6)
    np.testing.assert_allclose(c_out.ravel(), [pair[1] for pair in expected], rtol=1e-6)


def test_consistency_function_is_the_identity_at_time_zero():
    t = jnp.array([0, 0, 0, 19, 999])
    f = parameterization.consistency(X, jnp.asarray(X_0), t)
    np.testing.assert_array_equal(f[:3], X[:3])
    np.testing.assert_allclose(f[3:], X_0[3:], atol=1e-4)


def test_gamma_reads_as_guidance_scale_of_the_released_pipelines(monkeypatch):
    # In float32 torch's own is off by a last bit on some CPUs, which counts 10,000 times here.
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exp(x.double()).to(x.dtype))
    gamma = np.array([0.0, 0.1, 0.25, 0.7633672, 1.0], np.float32)
    # guidance_scale - 1 = 10 - 10 gamma; the pipelines' method uses nothing of the pipeline.
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, 10.0 - 10.0 * torch.tensor(gamma), embedding_dim=256).numpy()
    ours = parameterization.gamma_embedding(coefficients(gamma), 256)
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-5
    np.testing.assert_allclose(
        parameterization.gamma_cond(coefficients(gamma)), [10.0, 9.0, 7.5, 2.366328, 0.0], rtol=1e-6
    )


def test_gamma_one_is_the_constant_of_the_target():
    embedding = parameterization.gamma_embedding(jnp.ones((2, 1, 1, 1)), 8)
    np.testing.assert_array_equal(embedding, [[0, 0, 0, 0, 1, 1, 1, 1]] * 2)
