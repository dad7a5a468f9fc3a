"""Sampling from a folder against diffusers' pipeline, fed with the same noise."""

import diffusers
import numpy as np
import pytest
import torch
from absl import flags
from diffusers.schedulers import scheduling_lcm

from slam_jax import pipeline, sample
from slam_jax.weights import pretrained
from slam_jax.weights import student as student_folder

PROMPTS = ["a red circle above a blue square", "a cat", "an orange cross"]
STEPS = 2


@pytest.fixture(scope="module", params=["tiny_folder", "tiny_sdxl_folder"])
def teacher_folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def student(teacher_folder, tmp_path_factory):
    """A student folder as training writes it."""
    teacher = pretrained.read(teacher_folder)
    unet = pipeline.student_of(teacher.unet, 8, pipeline.random_cond_proj, np.random.default_rng(0))
    folder = tmp_path_factory.mktemp("student") / "student"
    pretrained.write(folder, student_folder.student(teacher, unet))
    return folder


@pytest.fixture
def noise(tmp_path):
    noise = np.random.default_rng(0).normal(size=(STEPS, 3, 16, 16, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    return noise


def _run(tmp_path, monkeypatch, *arguments):
    """The program's images from files of prompts and noise, in batches of 2."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    monkeypatch.setattr(sample, "_BATCH_SIZE", 2)
    flags.FLAGS([
        "sample", f"--prompts={tmp_path}/prompts.txt", f"--noise={tmp_path}/noise.npy",
        f"--out={tmp_path}/out.npy", f"--steps={STEPS}", *arguments,
    ])  # fmt: skip
    sample.main()
    flags.FLAGS.unparse_flags()
    return np.load(tmp_path / "out.npy")


def _torch_pipeline(folder):
    is_sdxl = (folder / "text_encoder_2").exists()
    extra = {"add_watermarker": False} if is_sdxl else {"safety_checker": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **extra)
    expected = "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline"
    assert type(pipe).__name__ == expected
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_student_images_equal_diffusers(student, noise, tmp_path, monkeypatch):
    drawn = _run(tmp_path, monkeypatch, f"--model={student}")
    channels_first = torch.tensor(noise).permute(0, 1, 4, 2, 3)
    fresh = iter(channels_first[1:])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    theirs = _torch_pipeline(student)(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=1.0, latents=channels_first[0],
        output_type="np",
    ).images  # fmt: skip
    assert drawn.dtype == np.float32 and drawn.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(drawn, theirs, atol=2e-4)


def test_teacher_images_equal_diffusers_ddim(teacher_folder, noise, tmp_path, monkeypatch):
    drawn = _run(tmp_path, monkeypatch, f"--model={teacher_folder}", "--w=2")
    pipe = _torch_pipeline(teacher_folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    theirs = pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=3.0, output_type="np",
        latents=torch.tensor(noise[0]).permute(0, 3, 1, 2),
    ).images  # fmt: skip
    np.testing.assert_allclose(drawn, theirs, atol=2e-4)


def test_noise_of_an_image_depends_on_seed_and_number_alone(tiny_folder):
    model = pretrained.read(tiny_folder)
    few, many = (sample._read_noise(None, model, STEPS, count, seed=1) for count in (2, 3))
    assert many.shape == (STEPS, 3, 16, 16, 4)
    np.testing.assert_array_equal(few, many[:, :2])
    assert np.abs(few[:, 0] - few[:, 1]).max() > 0.1


def test_pictures_come_in_rows(tmp_path):
    drawn = np.linspace(0, 1, 5 * 4 * 4 * 3, dtype=np.float32).reshape(5, 4, 4, 3)
    rows = sample._in_rows(drawn)
    assert rows.shape == (2, 4, 4, 4, 3)
    np.testing.assert_array_equal(rows.reshape(8, 4, 4, 3)[:5], drawn)
    assert (rows[1, 1:] == 1).all()
