"""The student's folder against diffusers: its LCMScheduler, its pipeline at two steps."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch

from slam_jax.weights import pretrained, student, templates

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SD_1_5 = dict(
    _class_name="PNDMScheduler", _diffusers_version="0.6.0", num_train_timesteps=1000,
    set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None,
    clip_sample=False, **BETAS,
)  # fmt: skip
SD_2_1 = dict(
    _class_name="DDIMScheduler", _diffusers_version="0.8.0", num_train_timesteps=1000,
    set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None,
    clip_sample=False, prediction_type="v_prediction", **BETAS,
)  # fmt: skip
ZERO_SNR = dict(
    SD_2_1, rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True
)
EULER = dict(
    _class_name="EulerDiscreteScheduler", num_train_timesteps=1000, interpolation_type="linear",
    use_karras_sigmas=False, prediction_type="v_prediction", **BETAS,
)  # fmt: skip
OTHER_BETAS = dict(
    _class_name="DDPMScheduler", num_train_timesteps=500, beta_start=1e-4, beta_end=0.02,
    beta_schedule="linear", variance_type="fixed_small", clip_sample_range=2.0,
)  # fmt: skip
TRAINED_BETAS = dict(
    _class_name="DDIMScheduler", num_train_timesteps=1000, clip_sample=False,
    trained_betas=np.linspace(1e-4, 0.02, 1000).tolist(), **BETAS,
)  # fmt: skip
ITSELF = dict(
    _class_name="LCMScheduler", num_train_timesteps=1000, original_inference_steps=50, **BETAS
)
TEACHERS = [SD_1_5, SD_2_1, ZERO_SNR, EULER, OTHER_BETAS, TRAINED_BETAS, ITSELF]


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda config: config["_class_name"])
def test_scheduler_is_the_one_diffusers_makes(teacher, tmp_path):
    theirs = diffusers.LCMScheduler.from_config(teacher)
    config = student.student_scheduler_config(teacher)
    keys = set(config) - {"_class_name"}
    assert config["_class_name"] == "LCMScheduler"
    assert config == {"_class_name": "LCMScheduler"} | {key: theirs.config[key] for key in keys}
    assert keys == {key for key in diffusers.LCMScheduler().config if key[0] != "_"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    loaded = diffusers.LCMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scheduler_visits_the_times_that_were_trained(steps):
    config = student.student_scheduler_config(SD_1_5)
    scheduler = diffusers.LCMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    expected = {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]}[steps]
    assert scheduler.timesteps.tolist() == expected


def test_a_teachers_clipping_is_left_out():
    teacher = {**SD_1_5, "clip_sample": True, "thresholding": True}
    config = student.student_scheduler_config(teacher)
    assert config["clip_sample"] is False and config["thresholding"] is False


def test_diffusers_samples_the_written_student(torch_folder, tmp_path):
    teacher = pretrained.read(torch_folder)
    config = {**teacher.unet.config, "time_cond_proj_dim": 256}
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), templates.of_unet(config)
    )
    unet = pretrained.Component(config, params)
    pretrained.write(tmp_path / "student", student.student(teacher, unet))

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "student", safety_checker=None
    )
    assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
    assert pipe.unet.config.time_cond_proj_dim == 256
    projection = pipe.unet.time_embedding.cond_proj.weight
    np.testing.assert_array_equal(
        projection.detach().numpy().T, params["time_embedding"]["cond_proj"]["kernel"]
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        "at a", num_inference_steps=2, guidance_scale=1, generator=generator, output_type="np"
    ).images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()

    again = pretrained.read(tmp_path / "student")
    assert again.unet.config == {"_class_name": "UNet2DConditionModel", **config}
    jax.tree.map(np.testing.assert_array_equal, again.unet.params, params)
