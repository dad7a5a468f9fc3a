"""Sampling from a folder against diffusers' pipeline, fed with the same noise."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from absl import flags
from diffusers.models.autoencoders import vae
from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_img2img
from diffusers.schedulers import scheduling_lcm
from jax.sharding import Mesh
from PIL import Image

from slam_jax import drawing_programs, interactive, sample, students
from slam_jax.errors import UserError
from slam_jax.nets import lora as lora_tree
from slam_jax.runtime import mesh
from slam_jax.weights import lora, pretrained
from slam_jax.weights import student as student_folder

PROMPTS = ["a red circle above a blue square", "a cat", "an orange cross"]
STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The user's cache folder: what several tests draw with is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLAM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["tiny_folder", "tiny_sdxl_folder"])
def teacher_folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def student(teacher_folder, tmp_path_factory):
    """A student folder as training writes it."""
    teacher = pretrained.read(teacher_folder)
    unet = students.student_of(teacher.unet, 8, students.random_cond_proj, np.random.default_rng(0))
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
    monkeypatch.setattr(interactive, "BATCH_SIZES", (1, 2))
    flags.FLAGS([
        "sample", f"--prompts={tmp_path}/prompts.txt", f"--noise={tmp_path}/noise.npy",
        f"--out={tmp_path}/out.npy", f"--steps={STEPS}", *arguments,
    ])  # fmt: skip
    sample.main()
    flags.FLAGS.unparse_flags()
    for name in ("init_image", "strength", "w", "lora"):
        flags.FLAGS[name].unparse()
    return np.load(tmp_path / "out.npy")


def _torch_pipeline(folder):
    is_sdxl = (folder / "text_encoder_2").exists()
    extra = {"add_watermarker": False} if is_sdxl else {"safety_checker": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **extra)
    expected = "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline"
    assert type(pipe).__name__ == expected
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _few_steps(pipe, noise, monkeypatch):
    """diffusers' images from the same noise."""
    channels_first = torch.tensor(noise).permute(0, 1, 4, 2, 3)
    fresh = iter(channels_first[1:])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    return pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=1.0, latents=channels_first[0],
        output_type="np",
    ).images  # fmt: skip


def test_student_images_equal_diffusers(student, noise, tmp_path, monkeypatch):
    drawn = _run(tmp_path, monkeypatch, f"--model={student}")
    theirs = _few_steps(_torch_pipeline(student), noise, monkeypatch)
    assert drawn.dtype == np.float32 and drawn.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(drawn, theirs, atol=2e-4)


def test_plain_student_with_two_loras_equals_diffusers(tiny_folder, noise, tmp_path, monkeypatch):
    """A UNet without gamma layer is a student where its scheduler is LCM's, as a LoRA run ends."""
    model = pretrained.read(tiny_folder)
    pretrained.write(tmp_path / "plain", student_folder.student(model, model.unet))
    pipe = _torch_pipeline(tmp_path / "plain")
    arguments = []
    for seed, (name, scale) in enumerate([("one", 0.8), ("two", -0.5)]):
        rng = np.random.default_rng(seed)
        tree = lora_tree.init(rng, model.unet.params, ["to_q", "conv1"], 2)
        tree = jax.tree.map(lambda leaf, rng=rng: rng.normal(0, 0.2, leaf.shape), tree)
        lora.write(tmp_path / name, tree, dtype=np.float32)
        pipe.load_lora_weights(tmp_path / name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
        arguments.append(f"--lora={tmp_path}/{name}/{lora.KOHYA_FILE}:{scale}")
    theirs = _few_steps(pipe, noise, monkeypatch)
    drawn, without = (
        _run(tmp_path, monkeypatch, f"--model={tmp_path}/plain", *extra)
        for extra in (arguments, ())
    )
    np.testing.assert_allclose(drawn, theirs, atol=2e-4)
    assert np.abs(drawn - without).max() > 0.01


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


# diffusers has no such pipeline for SDXL.
@pytest.mark.parametrize("teacher_folder", ["tiny_folder"], indirect=True)
def test_image_to_image_equals_diffusers(student, noise, tmp_path, monkeypatch):
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    drawn = _run(
        tmp_path, monkeypatch, f"--model={student}", f"--init_image={tmp_path}/start.png",
        "--strength=0.6",
    )  # fmt: skip

    key = jax.random.fold_in(jax.random.key(0), drawing_programs._POSTERIOR_STREAM)
    posterior_noise = [
        jax.random.normal(jax.random.fold_in(key, number), (1, 16, 16, 4)) for number in range(3)
    ]
    channels_first = torch.tensor(noise).permute(0, 1, 4, 2, 3)
    pipe = diffusers.LatentConsistencyModelImg2ImgPipeline.from_pretrained(
        student, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(PROMPTS):
        fresh = iter(channels_first[:, number : number + 1])
        latent_noise = torch.tensor(np.asarray(posterior_noise[number])).permute(0, 3, 1, 2)
        monkeypatch.setattr(vae, "randn_tensor", lambda *_, _noise=latent_noise, **__: _noise)
        for module in (pipeline_latent_consistency_img2img, scheduling_lcm):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, _fresh=fresh, **__: next(_fresh))
        theirs = pipe(
            prompt, Image.fromarray(picture), num_inference_steps=STEPS, strength=0.6,
            guidance_scale=1.0, output_type="np",
        ).images  # fmt: skip
        np.testing.assert_allclose(drawn[number], theirs[0], atol=2e-4)


@pytest.mark.parametrize("teacher_folder", ["tiny_folder"], indirect=True)
def test_a_folder_gets_numbered_pictures_with_their_settings(student, noise, tmp_path, monkeypatch):
    drawn = _run(tmp_path, monkeypatch, f"--model={student}")
    _run(tmp_path, monkeypatch, f"--model={student}", f"--out={tmp_path}/many")
    paths = sorted((tmp_path / "many").iterdir())
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    for path, prompt, expected in zip(paths, PROMPTS, drawn, strict=True):
        with Image.open(path) as picture:
            assert np.abs(np.asarray(picture) - 255 * expected).max() <= 0.51
            settings = json.loads(picture.text["slam_jax"])
        assert settings["prompt"] == prompt and settings["steps"] == STEPS
        assert settings["model"] == str(student) and settings["number"] == int(path.stem)
        assert (settings["compute_dtype"], settings["attention"]) == ("float32", "xla")


def test_attention_of_other_devices_is_refused(noise, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="attention=flash is made for TPUs, not for cpu; use xla"):
        _run(tmp_path, monkeypatch, "--attention=flash")
    flags.FLAGS.unparse_flags()
    flags.FLAGS["attention"].unparse()
    with pytest.raises(UserError, match="dtype 'int8' is not one of float32, bfloat16"):
        _run(tmp_path, monkeypatch, "--compute_dtype=int8")
    flags.FLAGS.unparse_flags()
    flags.FLAGS["compute_dtype"].unparse()


def test_images_do_not_depend_on_batches_and_devices(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    drawn = []
    for count in (4, 1):
        devices = jax.devices()[:count]
        monkeypatch.setattr(mesh, "make", lambda axes, _d=devices: Mesh(np.array(_d), ("data",)))
        flags.FLAGS([
            "sample", f"--prompts={tmp_path}/prompts.txt", f"--model={tiny_folder}", "--steps=2",
            f"--out={tmp_path}/out.npy", "--w=1", "--seed=3",
        ])  # fmt: skip
        sample.main()
        flags.FLAGS.unparse_flags()
        drawn.append(np.load(tmp_path / "out.npy"))
    np.testing.assert_allclose(*drawn, atol=1e-4)


def test_pictures_come_in_rows(tmp_path):
    drawn = np.linspace(0, 1, 5 * 4 * 4 * 3, dtype=np.float32).reshape(5, 4, 4, 3)
    rows = sample._in_rows(drawn)
    assert rows.shape == (2, 4, 4, 4, 3)
    np.testing.assert_array_equal(rows.reshape(8, 4, 4, 3)[:5], drawn)
    assert (rows[1, 1:] == 1).all()
