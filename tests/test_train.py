"""Two steps on a small SDXL: from the teacher's folder to a student's that diffusers draws with."""

import importlib.util
import json
import pathlib

import diffusers
import jax
import numpy as np
import pytest

from slam_jax import settings, train
from slam_jax.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]


def tiny_settings(folder: pathlib.Path) -> settings.Settings:
    """configs/tiny.py, cut down."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    changes = {
        "teacher.model": str(folder), "num_steps": 2, "batch_size": 4, "student.gamma_dim": 8,
        "distill.length": 20, "distill.stride": 20, "data.num_threads": 0, "log.every_steps": 1,
        "eval.every_steps": 2, "eval.teacher_steps": 2, "eval.student_steps": 2, "eval.judge": "",
        "eval.prompts": ("a circle",), "optimizer.warmup_steps": 0,
    }  # fmt: skip
    config.update_from_flattened_dict(changes)
    return settings.from_config(config.to_dict())


@pytest.fixture
def compiled_in_haste():
    """For programs that run but a step or two."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_sdxl_is_distilled(tiny_sdxl_folder, tmp_path, compiled_in_haste):
    train.train(tiny_settings(tiny_sdxl_folder), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)

    teacher = pretrained.read(tiny_sdxl_folder)
    student = pretrained.read(tmp_path / "run" / "student")
    assert student.unet.config["time_cond_proj_dim"] == 8
    for part in ("vae", "text_encoder", "text_encoder_2"):
        one, other = getattr(student, part).params, getattr(teacher, part).params
        jax.tree.map(np.testing.assert_array_equal, one, other)
    # The embedding of sizes and pooled text learns too.
    moved = jax.tree.map(
        lambda one, other: np.abs(one - other).max(),
        student.unet.params["add_embedding"], teacher.unet.params["add_embedding"],
    )  # fmt: skip
    assert min(jax.tree.leaves(moved)) > 0

    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "run" / "student", add_watermarker=False
    )
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a circle", num_inference_steps=2, guidance_scale=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all()
