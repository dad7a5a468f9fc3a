"""Exports of a run's checkpoint: what torch loads draws what our sampler draws."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import optax
import pytest
import torch
from absl import flags
from diffusers.schedulers import scheduling_lcm

from slam_jax import experiment, export, pipeline, settings, students
from slam_jax.data import text_inputs
from slam_jax.diffusion import parameterization, schedule
from slam_jax.distill import state
from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint
from slam_jax.weights import lora, pretrained
from slam_jax.weights import student as student_folder

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle above a blue square", "a cat"]
STEPS = 3


@pytest.fixture(scope="module", params=["tiny_folder", "tiny_v_folder", "tiny_sdxl_folder"])
def run(request, tmp_path_factory):
    """A run's folder with a checkpoint in which student and target differ, and its teacher."""
    return _run_of(request.getfixturevalue(request.param), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sd1_run(tiny_folder, tmp_path_factory):
    return _run_of(tiny_folder, tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def tiny_v_folder(tiny_folder, tmp_path_factory):
    """The random model with SD 2.1's scheduler settings."""
    model = pretrained.read(tiny_folder)
    folder = tmp_path_factory.mktemp("v") / "model"
    scheduler = {**model.scheduler, "prediction_type": "v_prediction"}
    pretrained.write(folder, model._replace(scheduler=scheduler))
    return folder


def _config(teacher):
    config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]().to_dict()
    config["teacher"]["model"] = str(teacher)
    config["student"]["gamma_dim"] = 8
    return config


def _run_of(teacher_folder, workdir):
    (workdir / "config.json").write_text(json.dumps(_config(teacher_folder)))
    teacher = pretrained.read(teacher_folder)
    trees = [
        students.student_of(
            teacher.unet, 8, students.random_cond_proj, np.random.default_rng(seed)
        ).params
        for seed in (0, 1)
    ]
    start = state.init(trees[0], optax.adam(1e-3)).replace(target=trees[1])
    with checkpoint.manager(workdir / "checkpoints", keep=1, keep_every=0) as checkpoints:
        checkpoint.save_last(checkpoints, 7, start)
    return workdir, teacher, trees


def _export(run, out, *arguments):
    flags.FLAGS(["export", f"--workdir={run[0]}", f"--out={out}", *arguments])
    try:
        export.main()
    finally:
        flags.FLAGS.unparse_flags()
        for name in ("format", "dtype", "weights", "overwrite", "extract_lora"):
            flags.FLAGS[name].unparse()


def _ours(run, noise):
    """What our sampler draws of the target in the checkpoint."""
    _, teacher, (_, target) = run
    config = {**teacher.unet.config, "time_cond_proj_dim": 8}
    scheduler = student_folder.student_scheduler_config(teacher.scheduler)
    draw = pipeline.few_step(
        pipeline.student(config, np.float32),
        pipeline.decode(teacher.vae.config, np.float32), schedule.from_config(scheduler),
        parameterization.prediction_from_config(scheduler), STEPS, 50,
    )  # fmt: skip
    tokens = text_inputs.read(teacher.tokenizer, teacher.tokenizer_2)
    text = jax.jit(pipeline.encode_text(teacher, np.float32))(
        pipeline.text_params(teacher), tokens.encode(PROMPTS, (32, 32))
    )
    return np.asarray(jax.jit(draw)(target, teacher.vae.params, text, noise))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "options", [(), ("--format=single-file",), ("--format=lora", "--extract_lora=2")]
)
def test_a_terminal_shows_how_far_it_is(sd1_run, tmp_path, monkeypatch, capsys, options):
    out = tmp_path / ("x.safetensors" if "single" in str(options) else "x")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        _export(sd1_run, out, *options)
        shown = sys.stderr.getvalue()
    assert re.search(r"reading: +\d+%\|.*\[\d\d:\d\d<", shown)
    assert re.search(r"100%\|.* (\S+)/\1 \[\d\d:\d\d<00:00", shown)
    _export(sd1_run, out, *options, "--overwrite")
    assert capsys.readouterr().err == ""


def _theirs(pipe, noise, monkeypatch):
    pipe.set_progress_bar_config(disable=True)
    channels_first = torch.tensor(noise).permute(0, 1, 4, 2, 3)
    fresh = iter(channels_first[1:])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    return pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=1.0, latents=channels_first[0],
        output_type="np",
    ).images  # fmt: skip


def _load(folder):
    extra = {"add_watermarker": False} if (folder / "text_encoder_2").exists() else {}
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **extra)


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(size=(STEPS, 2, 16, 16, 4)).astype(np.float32)


def test_torch_draws_the_same_images_from_every_format(run, noise, tmp_path, monkeypatch):
    ours = _ours(run, noise)
    for form in ("diffusers", "diffusers-folded"):
        _export(run, tmp_path / form, f"--format={form}", "--dtype=float32")
        theirs = _theirs(_load(tmp_path / form), noise, monkeypatch)
        assert np.abs(ours - theirs).max() <= 2e-4, form
        config = json.loads((tmp_path / form / "unet" / "config.json").read_text())
        assert ("time_cond_proj_dim" in config) == (form == "diffusers")

    _export(run, tmp_path / "one.safetensors", "--format=single-file", "--dtype=float32")
    is_sdxl = run[1].text_encoder_2 is not None
    kind = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
    extra = {"add_watermarker": False} if is_sdxl else {"safety_checker": None}
    pipe = kind.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "diffusers-folded"),
        local_files_only=True, **extra,
    )  # fmt: skip
    pipe.scheduler = _load(tmp_path / "diffusers-folded").scheduler
    assert np.abs(ours - _theirs(pipe, noise, monkeypatch)).max() <= 2e-4


def test_a_lora_run_is_exported_in_every_format(tiny_folder, noise, tmp_path, monkeypatch):
    """A LoRA on the teacher, and the teacher with it merged, in torch: the same images."""
    workdir, teacher = tmp_path / "run", pretrained.read(tiny_folder)
    workdir.mkdir()
    config = _config(tiny_folder)
    config["student"]["lora"] = {"rank": 2, "alpha": 3.0, "targets": ("to_.*", "conv.*")}
    (workdir / "config.json").write_text(json.dumps(config))
    trained = experiment.student(settings.from_config(config), teacher.unet).params
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), trained)
    with checkpoint.manager(workdir / "checkpoints", keep=1, keep_every=0) as checkpoints:
        checkpoint.save_last(checkpoints, 7, state.init(trained, optax.adam(1e-3)))

    run = (workdir,)
    _export(run, tmp_path / "lora", "--format=lora", "--dtype=float32")
    _export(run, tmp_path / "merged", "--dtype=float32")
    _export(run, tmp_path / "one.safetensors", "--format=single-file", "--dtype=float32")
    pipe = _load(tiny_folder)
    pipe.scheduler = _load(tmp_path / "merged").scheduler
    plain = _theirs(pipe, noise, monkeypatch)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    fused = _theirs(pipe, noise, monkeypatch)
    assert np.abs(fused - plain).max() > 0.01
    assert np.abs(fused - _theirs(_load(tmp_path / "merged"), noise, monkeypatch)).max() <= 2e-4
    read_back = pretrained.read(tmp_path / "one.safetensors", config=tmp_path / "merged").unet
    expected = pretrained.read(tmp_path / "merged").unet.params
    jax.tree.map(np.testing.assert_array_equal, read_back.params, expected)


def test_a_lora_is_extracted_from_a_full_student(sd1_run, noise, tmp_path, capsys):
    with pytest.raises(UserError, match="give --extract_lora RANK"):
        _export(sd1_run, tmp_path / "lora", "--format=lora")
    _export(sd1_run, tmp_path / "lora", "--format=lora", "--extract_lora=2", "--dtype=float32")
    # Only the gamma layer was drawn anew, which folds into a bias; the sinusoids of so small a
    # network sum to 1 only nearly (tests/weights/test_lora_svd.py).
    assert re.search(r" 99.\d\d% time_embedding.linear_1.bias\n", capsys.readouterr().out)
    teacher = sd1_run[1]
    with_lora = lora.apply(teacher, tmp_path / "lora" / lora.KOHYA_FILE, 1.0)
    plain = pipeline.teacher(teacher.unet.config, np.float32)
    folded = students.fold_gamma(
        teacher.unet._replace(
            config={**teacher.unet.config, "time_cond_proj_dim": 8}, params=sd1_run[2][1]
        )
    )
    text = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)
    inputs = (noise[0], np.array([999, 19]), text)
    base, ours, expected = (
        jax.jit(plain)(params, *inputs)
        for params in (teacher.unet.params, with_lora.unet.params, folded.params)
    )
    change = np.abs(base - expected).max()
    assert change > 1e-3
    assert np.abs(ours - expected).max() < 0.1 * change


def test_half_precision_is_within_a_level_of_eight_bits(sd1_run, noise, tmp_path, monkeypatch):
    ours = _ours(sd1_run, noise)
    _export(sd1_run, tmp_path / "half")
    assert np.abs(ours - _theirs(_load(tmp_path / "half"), noise, monkeypatch)).mean() <= 1 / 255
    stored = pretrained.read(tmp_path / "half", dtype=None)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(stored.unet.params)}
    assert dtypes == {np.dtype(np.float16)}


def test_online_weights_are_the_student_and_ema_the_target(sd1_run, tmp_path):
    for which, expected in zip(("online", "ema"), sd1_run[2], strict=True):
        _export(sd1_run, tmp_path / which, f"--weights={which}", "--dtype=float32")
        found = pretrained.read(tmp_path / which).unet.params
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_card_says_how_to_sample_and_whose_the_base_is(sd1_run, tmp_path):
    base = sd1_run[1].tokenizer.parent
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: []\n---\n# Base\n")
    try:
        _export(sd1_run, tmp_path / "model", "--weights=online")
    finally:
        (base / "README.md").unlink()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "\nlicense: creativeml-openrail-m\n" in card.split("---")[1]
    for words in ("guidance_scale=1", "2 to 4", "online", "after 7 updates", "distill.w = 8.0"):
        assert words in card, words
    assert str(base) in card and "shapes2d" in card


def test_an_existing_target_is_kept_without_overwrite(sd1_run, tmp_path):
    _export(sd1_run, tmp_path / "model")
    marker = tmp_path / "model" / "marker"
    marker.write_text("")
    with pytest.raises(UserError, match="exists; give another, or --overwrite"):
        _export(sd1_run, tmp_path / "model")
    assert marker.exists()
    _export(sd1_run, tmp_path / "model", "--overwrite")
    assert not marker.exists()


def test_a_full_disk_leaves_nothing(sd1_run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        _export(sd1_run, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "form", "message"),
    [
        ("x.safetensors", "diffusers", "writes a folder"),
        ("x", "single-file", "writes a File.safetensors"),
    ],
)
def test_the_name_must_suit_the_format(sd1_run, tmp_path, out, form, message):
    with pytest.raises(UserError, match=message):
        _export(sd1_run, tmp_path / out, f"--format={form}")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json.*training run"):
        _export((tmp_path,), tmp_path / "x")
    (tmp_path / "config.json").write_text(json.dumps(_config(ROOT / "assets" / "tiny_sd")))
    with pytest.raises(UserError, match="no checkpoint yet"):
        _export((tmp_path,), tmp_path / "x")
