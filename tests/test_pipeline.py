"""The nets as pure functions: scaling, posterior, and a student that starts as its teacher."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slam_jax import pipeline, students
from slam_jax.data import text_inputs
from slam_jax.diffusion import ode_sampler, parameterization, sampler, schedule
from slam_jax.errors import UserError
from slam_jax.nets import lora, vae
from slam_jax.weights import lora as lora_file
from slam_jax.weights import pretrained, translate
from slam_jax.weights import student as student_folder

SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_folder):
    return pretrained.read(tiny_folder)


@pytest.fixture(scope="module")
def pixels():
    return jnp.array(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def posterior(model, pixels):
    """By the network itself, which takes [-1, 1]."""
    net, image = vae.from_config(model.vae.config), pixels.astype(jnp.float32) / 127.5 - 1
    return net.apply({"params": model.vae.params}, image, method=net.encode)


@pytest.mark.parametrize("cached", [False, True])
def test_latents_are_scaled_samples_of_the_posterior(model, pixels, posterior, cached):
    # 64 latents of 64 pictures of the same thing.
    batch = {"image": jnp.repeat(pixels, 64, axis=0)}
    if cached:
        moments = jax.jit(pipeline.cached_posterior(model.vae.config, jnp.float32))
        batch = {"moments": moments(model.vae.params, batch["image"])}
    encode = jax.jit(pipeline.encode_image(model.vae.config, jnp.float32))
    latents = encode(model.vae.params, batch, jax.random.key(1))
    spread = 0.5 * np.exp(0.5 * posterior.logvar[0])
    error = (np.mean(latents, axis=0) - 0.5 * posterior.mean[0]) / (spread / 8)
    assert np.abs(error).max() < 5 and abs(np.std(error) - 1) < 0.2
    np.testing.assert_allclose(np.std(latents, axis=0) / spread, 1, atol=0.45)


def test_a_cached_posterior_is_the_posterior_in_half_precision(model, pixels, posterior):
    moments = pipeline.cached_posterior(model.vae.config, jnp.float32)(model.vae.params, pixels)
    assert moments.dtype == jnp.bfloat16 and moments.shape == (1, 16, 16, 8)
    expected = np.concatenate([posterior.mean, posterior.logvar], axis=-1)
    np.testing.assert_allclose(np.asarray(moments, np.float32), expected, rtol=2**-8, atol=1e-6)


def test_the_same_draw_comes_from_pictures_and_from_a_cache(model, pixels):
    params = model.vae.params
    moments = pipeline.cached_posterior(model.vae.config, jnp.float32)(params, pixels)
    encode = jax.jit(pipeline.encode_image(model.vae.config, jnp.float32))
    fresh, cached = (
        encode(params, batch, jax.random.key(1))
        for batch in ({"image": pixels}, {"moments": moments})
    )
    assert np.abs(fresh - cached).max() < 2**-7 * np.abs(fresh).max()


def test_decode_undoes_the_scaling_and_stays_in_range(model):
    latent = 0.5 * jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
    net = vae.from_config(model.vae.config)
    raw = net.apply({"params": model.vae.params}, latent / 0.5, method=net.decode)
    image = jax.jit(pipeline.decode(model.vae.config, jnp.float32))(model.vae.params, latent)
    np.testing.assert_allclose(image, np.clip((np.asarray(raw) + 1) / 2, 0, 1), atol=1e-5)
    assert image.min() == 0 and image.max() == 1


def test_student_with_zero_cond_proj_is_the_teacher(model):
    student = students.student_of(model.unet, 8, students.zero_cond_proj, np.random.default_rng(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    text = jax.random.normal(jax.random.key(1), (2, 5, 16))
    t, gamma = jnp.array([999, 19]), jnp.array([0.3, 1.0]).reshape(2, 1, 1, 1)
    call = jax.jit(pipeline.student(student.config, jnp.float32))
    ours = call(student.params, x, t, text, gamma)
    theirs = jax.jit(pipeline.teacher(model.unet.config, jnp.float32))(
        model.unet.params, x, t, text
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

    # With torch's default weights in that layer, gamma makes a difference.
    student = students.student_of(
        model.unet, 8, students.random_cond_proj, np.random.default_rng(0)
    )
    assert jnp.abs(call(student.params, x, t, text, gamma) - theirs).max() > 1e-3
    assert "cond_proj" not in model.unet.params["time_embedding"]


def relative_error(one, other) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_folded_gamma_is_gamma_one(model):
    student = students.student_of(
        model.unet, 256, students.random_cond_proj, np.random.default_rng(0)
    )
    folded = students.fold_gamma(student)
    assert "time_cond_proj_dim" not in folded.config
    assert student.config["time_cond_proj_dim"] == 256
    assert students.fold_gamma(folded) is folded
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    text = jax.random.normal(jax.random.key(1), (2, 5, 16))
    t, one = jnp.array([999, 259]), jnp.ones((2, 1, 1, 1))
    call = jax.jit(pipeline.student(student.config, jnp.float32))
    plain = jax.jit(pipeline.teacher(folded.config, jnp.float32))
    ours = [call(student.params, x, t, text, one), plain(folded.params, x, t, text)]

    # torch's UNets, the student's fed what torch's pipeline feeds it at guidance_scale = 1.
    scale = torch.zeros(2)
    cond = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, 256)
    theirs = []
    for component, kwargs in ((student, {"timestep_cond": cond}), (folded, {})):
        net = diffusers.UNet2DConditionModel.from_config(component.config)
        tensors = translate.to_tensors(component.params)
        net.load_state_dict({n: torch.tensor(tensors[n]) for n in tensors})
        with torch.no_grad():
            inputs = (
                torch.tensor(np.asarray(array)) for array in (x.transpose(0, 3, 1, 2), t, text)
            )
            out = net(*inputs, **kwargs).sample
        theirs.append(out.permute(0, 2, 3, 1).numpy())
    assert relative_error(ours[1], ours[0]) <= 1e-5
    assert relative_error(theirs[1], theirs[0]) <= 1e-5
    assert relative_error(ours[1], theirs[0]) <= 1e-5
    # The layer that is folded away matters.
    assert relative_error(plain(model.unet.params, x, t, text), theirs[0]) > 1e-3


def test_random_cond_proj_is_drawn_as_torch_draws_it():
    torch.manual_seed(0)
    theirs = torch.nn.Linear(256, 320, bias=False).weight.detach().numpy()
    ours = students.random_cond_proj(np.random.default_rng(0), (256, 320))
    assert ours.shape == theirs.T.shape and ours.dtype == np.float32
    levels = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        np.quantile(ours, levels), np.quantile(theirs, levels), atol=0.02 / 16
    )


def test_student_is_no_teacher(model):
    student = students.student_of(model.unet, 8, students.zero_cond_proj, np.random.default_rng(0))
    with pytest.raises(UserError, match="student already"):
        students.student_of(student, 8, students.zero_cond_proj, np.random.default_rng(0))


def test_image_size_must_suit_the_vae(model):
    assert pipeline.latent_shape(model, 32) == (16, 16, 4)
    with pytest.raises(UserError, match="31 pixels.*multiple of 2"):
        pipeline.latent_shape(model, 31)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxls_text_is_that_of_diffusers(tiny_sdxl_folder, force_zeros):
    prompts = ["a red circle", "x"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tiny_sdxl_folder, add_watermarker=False, force_zeros_for_empty_prompt=force_zeros
    )
    with torch.no_grad():
        hidden, null_hidden, pooled, null_pooled = pipe.encode_prompt(prompts, device="cpu")
    time_ids = pipe._get_add_time_ids((48, 32), (0, 0), (48, 32), torch.int32, 12)

    model = pretrained.read(tiny_sdxl_folder)._replace(force_zeros_for_empty_prompt=force_zeros)
    params, tokens = (
        pipeline.text_params(model),
        text_inputs.read(model.tokenizer, model.tokenizer_2),
    )
    text = jax.jit(pipeline.encode_text(model, jnp.float32))(
        params, tokens.encode(prompts, (48, 32))
    )
    np.testing.assert_allclose(text.hidden_states, hidden, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(text.pooled, pooled, atol=1e-4, rtol=1e-5)
    np.testing.assert_array_equal(text.time_ids, [*time_ids, *time_ids])

    encode_null = jax.jit(pipeline.encode_null_text(model, jnp.float32))
    null_text = encode_null(params, tokens.encode([""], (48, 32)))
    np.testing.assert_allclose(null_text.hidden_states, null_hidden[:1], atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(null_text.pooled, null_pooled[:1], atol=1e-4, rtol=1e-5)
    assert (np.abs(null_text.pooled).max() == 0) == force_zeros


def test_lora_student_at_gamma_1_is_the_plain_unet_with_the_lora_merged(model):
    """Bit for bit, whatever the gamma layer has become; and gamma below 1 is seen."""
    rng = np.random.default_rng(0)
    student = students.student_of(model.unet, 8, students.random_cond_proj, rng)
    trained = students.lora_of(model.unet, student, ["to_q", "conv.*"], 2, rng)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), trained.params
    )
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    text = jax.random.normal(jax.random.key(1), (2, 5, 16))
    t = jnp.array([999, 19])
    call = jax.jit(pipeline.lora_student(trained.config, jnp.float32))
    at_one, below = (
        call(lora.merge(model.unet.params, params, 0.5), x, t, text, jnp.full((2, 1, 1, 1), gamma))
        for gamma in (1.0, 0.9)
    )
    merged = lora_file.merged(model.unet, lora_file.baked(params, 0.5))
    assert "cond_proj" not in merged.params["time_embedding"]
    plain = jax.jit(pipeline.student(model.unet.config, jnp.float32))(
        merged.params, x, t, text, jnp.full((2, 1, 1, 1), 0.3)
    )
    np.testing.assert_allclose(at_one, plain, rtol=0, atol=1e-6)
    assert jnp.abs(below - at_one).max() > 1e-2
    teacher = jax.jit(pipeline.teacher(model.unet.config, jnp.float32))
    assert jnp.abs(teacher(model.unet.params, x, t, text) - at_one).max() > 1e-2


def test_few_step_students_are_known_by_scheduler_or_gamma(model):
    student = students.student_of(model.unet, 8, students.zero_cond_proj, np.random.default_rng(0))
    assert not students.is_student(model)
    assert students.is_student(model._replace(unet=student))
    assert students.is_student(student_folder.student(model, model.unet))


@pytest.mark.parametrize("name", sampler.GUIDED)
def test_the_named_sampler_draws(name):
    levels, x_T = (
        schedule.from_config(SCHEDULER),
        jax.random.normal(jax.random.key(0), (2, 2, 2, 3)),
    )
    sample = pipeline.guided(
        name, lambda params, x, t, text: params * x, lambda params, x_0: params + x_0, levels,
        parameterization.EPSILON, SCHEDULER, num_steps=3, w=2.0,
    )  # fmt: skip
    text = jnp.zeros((2, 1, 1))
    ours = sample(jnp.array(0.1), jnp.array(0.3), text, text[:1], x_T)
    others = {
        other: ode_sampler.sample(
            lambda x, t, text: 0.1 * x, parameterization.EPSILON,
            chosen.path(3, levels, SCHEDULER), chosen.correct, x_T, text, text[:1], 2.0,
        )
        for other, chosen in sampler.GUIDED.items()
    }  # fmt: skip
    error = {other: np.abs(ours - 0.3 - x_0).max() for other, x_0 in others.items()}
    assert error.pop(name) < 1e-5 and min(error.values()) > 1e-2, error


@pytest.mark.parametrize("name", sampler.GUIDED)
def test_a_teacher_is_sampled_by_any_name(model, name):
    """Traced only. linspace, a config's default, leads Euler and Heun between training's times."""
    sample = pipeline.guided(
        name, pipeline.teacher(model.unet.config, np.float32),
        pipeline.decode(model.vae.config, np.float32), schedule.from_config(model.scheduler),
        parameterization.EPSILON, model.scheduler, num_steps=5, w=2.0,
    )  # fmt: skip
    text, null_text, x_T = jnp.zeros((2, 7, 16)), jnp.zeros((1, 7, 16)), jnp.zeros((2, 16, 16, 4))
    params = model.unet.params, model.vae.params
    assert jax.eval_shape(sample, *params, text, null_text, x_T).shape == (2, 32, 32, 3)
