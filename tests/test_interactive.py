"""Drawing on request: the pictures of the fixed sampler, without being compiled again."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax.sharding import Mesh
from PIL import Image

from slam_jax import drawing_programs, interactive, pipeline, sample, students
from slam_jax.data import text_inputs
from slam_jax.diffusion import parameterization, schedule
from slam_jax.errors import UserError
from slam_jax.evaluation import noise as image_noise
from slam_jax.nets import kernels
from slam_jax.runtime import apart, mesh
from slam_jax.weights import pretrained, templates
from slam_jax.weights import student as student_folder

COMPILED = "/jax/core/compile/backend_compile_duration"
FROM_FILE = "/jax/compilation_cache/cache_hits"


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    teacher = pretrained.read(tiny_folder)
    unet = students.student_of(teacher.unet, 8, students.random_cond_proj, np.random.default_rng(0))
    folder = tmp_path_factory.mktemp("student") / "student"
    pretrained.write(folder, student_folder.student(teacher, unet))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The user's cache folder, which all tests here share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLAM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def drawer(folder):
    templates._shapes.cache_clear()
    return interactive.start(pretrained.find(folder))


@contextlib.contextmanager
def counted():
    """How often a program is asked of XLA, and how often it comes from a file."""
    counts = {COMPILED: 0, FROM_FILE: 0}

    def count(event, _=0.0, **__):
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(count)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
        jax.monitoring.unregister_event_listener(count)


def test_pictures_are_those_of_the_sampler_made_for_so_many_steps(drawer, folder):
    """pipeline.few_step, which knows its steps beforehand, with the noise of evaluation/."""
    steps, prompts, seeds = 3, ["a red circle", "a cat", "a red circle"], [7, 2**32 - 1, 7]
    drawn = interactive.pictures(drawer, prompts, seeds, steps)

    model = pretrained.read(folder)
    few_step = pipeline.few_step(
        pipeline.student(model.unet.config, np.float32),
        pipeline.decode(model.vae.config, np.float32), schedule.from_config(model.scheduler),
        parameterization.prediction_from_config(model.scheduler), steps, 50,
    )  # fmt: skip
    ids = text_inputs.read(model.tokenizer, None).encode(prompts, (32, 32))
    text = jax.jit(pipeline.encode_text(model, np.float32))(model.text_encoder.params, ids)
    noise = np.concatenate(
        [image_noise.of_images(seed, steps, (16, 16, 4))(np.array([0])) for seed in seeds], axis=1
    )
    expected = jax.jit(few_step)(model.unet.params, model.vae.params, text, jnp.asarray(noise))
    assert drawn.dtype == np.uint8 and drawn.shape == (3, 32, 32, 3)
    assert np.abs(drawn - 255 * np.asarray(expected)).max() < 0.51
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()


def test_a_prompt_seed_or_number_of_steps_compiles_nothing(drawer):
    interactive.prepare(drawer, [1, 4])
    with counted() as counts:
        seen = [
            interactive.pictures(drawer, ["a cat", f"{steps} dogs", "a cat"][:count], seeds, steps)
            for steps, count, seeds in [
                (1, 1, [3]),
                (2, 3, [4, 5, 6]),
                (8, 1, [3]),
                (5, 3, [0] * 3),
            ]
        ]
    assert not any(counts.values()), counts
    assert [len(drawn) for drawn in seen] == [1, 3, 1, 3]
    assert (seen[0] != seen[2]).any()


def test_a_prompt_is_encoded_once(drawer, monkeypatch):
    asked = []
    run = interactive._program
    monkeypatch.setattr(interactive, "_MOST_TEXTS", 2)
    monkeypatch.setattr(
        interactive, "_program",
        lambda drawer, build, *rest: asked.append(build) or run(drawer, build, *rest),
    )  # fmt: skip
    for prompt, encoded in [("x", 1), ("y", 1), ("x", 0), ("z", 1), ("x", 0), ("y", 1)]:
        interactive.pictures(drawer, [prompt], [0], 1)
        assert asked.count(drawing_programs.text) == encoded, prompt
        asked.clear()


def test_another_process_traces_and_compiles_nothing(drawer, folder, tmp_path, monkeypatch):
    """And `sample` draws the picture that `pictures` draws, by the very same programs."""
    expected = interactive.pictures(drawer, ["a cat"], [5], 3)

    def traced(*_, **__):
        raise AssertionError("traced")

    monkeypatch.setattr(drawing_programs, "_drawn", traced)
    monkeypatch.setattr(jax, "eval_shape", traced)
    templates._shapes.cache_clear()
    monkeypatch.setattr(mesh, "make", lambda *_: Mesh(np.array(jax.devices()[:1]), ("data",)))
    flags.FLAGS([
        "sample", f"--model={folder}", "--prompt=a cat", "--seed=5", "--steps=3",
        f"--out={tmp_path}/out",
    ])  # fmt: skip
    with counted() as counts:
        sample.main()
    flags.FLAGS.unparse_flags()
    for name in ("seed", "prompt"):
        flags.FLAGS[name].unparse()
    assert counts == {COMPILED: 2, FROM_FILE: 2}
    with Image.open(tmp_path / "out" / "000000.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), expected[0])


def test_a_model_of_the_same_shapes_is_not_drawn_by_anothers_program(drawer, folder):
    other = pretrained.read(folder)
    other = interactive.start(other._replace(scheduler={**other.scheduler, "beta_end": 0.02}))
    ours, theirs = (interactive.pictures(each, ["a cat"], [5], 1) for each in (drawer, other))
    assert (ours != theirs).any()


def test_a_teacher_takes_any_guidance_without_being_compiled(tiny_folder):
    teacher = interactive.start(pretrained.find(tiny_folder))
    first = interactive.pictures(teacher, ["a cat"], [0], 2, w=1.0)
    with counted() as counts:
        second = interactive.pictures(teacher, ["a cat"], [0], 2, w=4.0)
    assert not any(counts.values()) and (first != second).any()


def test_a_kernel_of_attention_is_called_by_every_device(drawer, folder, monkeypatch):
    """In the place of a TPU's, which XLA cannot cut: one that sees how many examples it gets."""
    seen = set()

    def kernel(query, key, value):
        seen.add(query.shape[0])
        return kernels.attend(query, key, value)

    monkeypatch.setitem(kernels.BY_NAME, "flash", kernel)
    monkeypatch.setitem(apart._MADE_FOR, "flash", ("CPUs", ("cpu",)))
    two = mesh.make((("data", 2),), jax.devices()[:2])
    cut = interactive.start(pretrained.find(folder), attention="flash", devices=two)
    asked = ["a", "b", "c", "d"], range(4), 2
    drawn, wanted = (interactive.pictures(each, *asked).astype(int) for each in (cut, drawer))
    assert seen == {2}
    assert np.abs(drawn - wanted).max() <= 1


def test_half_precision_draws_nearly_the_same(drawer, folder):
    half = interactive.start(pretrained.find(folder), dtype="bfloat16")
    kernel = half.model.unet.params["conv_in"]["kernel"]
    assert kernel.dtype == "bfloat16"
    asked = ["a", "b"], range(2), 2
    drawn, wanted = (interactive.pictures(each, *asked).astype(int) for each in (half, drawer))
    assert 0 < np.abs(drawn - wanted).mean() < 4


def test_attention_that_is_not_for_these_devices_is_refused(folder):
    message = "attention=cudnn is made for NVIDIA GPUs, not for cpu; use xla"
    with pytest.raises(UserError, match=message):
        interactive.start(pretrained.find(folder), attention="cudnn")


def test_memory_is_known_of_programs_from_files_too(drawer, folder):
    interactive.prepare(drawer, [1])
    again = interactive.start(pretrained.find(folder))
    assert interactive.memory(again) == 0
    interactive.prepare(again, [1])
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(drawer.model.unet.params)) < (
        interactive.memory(again)
    ) < 2**27  # fmt: skip


def test_steps_that_the_student_lacks(drawer):
    with pytest.raises(UserError, match="51 sampling steps"):
        interactive.pictures(drawer, ["x"], [0], 51)
