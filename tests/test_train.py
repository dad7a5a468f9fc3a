"""A few steps from a teacher's folder to a student's: SDXL, and a user's pictures with faults."""

import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import tarfile

import diffusers
import jax
import numpy as np
import pytest
from PIL import Image

from slam_jax import settings, train
from slam_jax.errors import UserError
from slam_jax.runtime import bucket, checkpoint
from slam_jax.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]


def tiny_settings(folder: pathlib.Path, overrides: dict | None = None) -> settings.Settings:
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
    config.update_from_flattened_dict(changes | (overrides or {}))
    return settings.from_config(config.to_dict())


@pytest.fixture
def compiled_in_haste():
    """For programs that run but a step or two."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_sdxl_is_distilled(tiny_sdxl_folder, tmp_path, compiled_in_haste):
    # In memory the teacher is in half precision; what is shipped with the student is not.
    train.train(
        tiny_settings(tiny_sdxl_folder, {"teacher.dtype": "bfloat16"}),
        bucket.here(tmp_path / "run"),
    )
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


@pytest.fixture
def pictures(tmp_path):
    """60, every sixth empty, every fourth too narrow for the filter; one caption is too long."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(60):
        path = folder / f"{number:03d}.png"
        size = (48, 20 if number % 4 == 1 else 40, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path)
        if number % 6 == 0:
            path.write_bytes(b"")
        path.with_suffix(".txt").write_text("a" * (100 if number == 2 else 3))
    return folder


def test_bad_pictures_are_replaced_listed_and_at_last_too_many(
    tiny_folder, pictures, tmp_path, compiled_in_haste, monkeypatch
):
    monkeypatch.setenv("SLAM_JAX_CACHE", str(tmp_path / "kept"))  # the step is traced once
    changes = {
        "num_steps": 30, "batch_size": 4, "data.source": str(pictures), "data.crop": ("random",),
        "data.filters": ("short_side >= 32",), "data.max_bad_fraction": 0.005,
    }  # fmt: skip
    workdir = tmp_path / "run"

    def lines(name):
        return [json.loads(line) for line in (workdir / name).read_text().splitlines()]

    # 5 of the first 1,000 may be bad, 11 by chance; an epoch of 15 steps has more.
    with pytest.raises(UserError, match=r"13 of 61 samples .*pictures \(13 empty picture file\)"):
        train.train(tiny_settings(tiny_folder, changes), bucket.here(workdir))
    done = checkpoint.latest(workdir / "checkpoints")
    assert done > 2 and lines("metrics.jsonl")[-1]["step"] == done

    train.train(
        tiny_settings(tiny_folder, changes | {"data.max_bad_fraction": 0.9}), bucket.here(workdir)
    )
    told = lines("metrics.jsonl")
    assert [line["step"] for line in told] == list(range(1, 31))
    bad = lines("bad_samples.jsonl")
    assert sum(line["bad_samples"] for line in told) == len(bad)
    # Two epochs: each bad picture by itself, and by the one before it that is left out (5 of 6).
    keys = sorted(line["key"] for line in bad)
    assert sorted(set(keys)) == [f"{number:03d}.png" for number in range(0, 60, 6)]
    narrow_before = {f"{n:03d}.png" for n in range(0, 60, 6) if (n - 1) % 60 % 4 == 1}
    assert keys == sorted(2 * [*set(keys), *narrow_before])
    assert {line["reason"] for line in bad} == {"empty picture file"}
    assert {line["shard"] for line in bad} == {str(pictures)}
    assert sum(line["filtered_samples"] for line in told) > 0
    assert sum(line["cut_captions"] for line in told) >= 2


def test_training_from_a_cache_equals_training_from_the_pictures(
    tiny_folder, tmp_path, compiled_in_haste
):
    """Tars as img2dataset writes them, prepared by the program, against the same tars read afresh.

    The cache rounds the posterior to half precision.
    """
    rng = np.random.default_rng(1)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(24):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("txt", b"a circle")):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = str(tmp_path / "*.tar")
    prepared = subprocess.run(
        [
            sys.executable, "-m", "slam_jax.prepare", f"--source={source}", "--size=32",
            f"--model={tiny_folder}", f"--out={tmp_path / 'cache'}", "--batch_size=8",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    losses = []
    for name in (source, str(tmp_path / "cache")):
        workdir = tmp_path / f"run_{len(losses)}"
        changes = {"num_steps": 3, "eval.every_steps": 3, "data.source": name}
        train.train(tiny_settings(tiny_folder, changes), bucket.here(workdir))
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[1] != losses[0]  # or the cache was not read
