"""Rows of a comparison: a random model and a student of it, drawn, measured, killed, shared out."""

import json
import pathlib
import runpy

import diffusers
import jax
import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers.schedulers import scheduling_lcm
from jax.sharding import Mesh
from PIL import Image

from slam_jax import students
from slam_jax.data import shapes2d
from slam_jax.errors import UserError
from slam_jax.evaluation import (
    classifier,
    comparison,
    drawing,
    measure,
    prompts,
    protocol,
    reference,
    samplers,
    score,
    store,
)
from slam_jax.nets.classifier import ShapesClassifier
from slam_jax.runtime import executables, log
from slam_jax.weights import pretrained
from slam_jax.weights import student as student_folder

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 12


@pytest.fixture(scope="module")
def small():
    """The tiny protocol with few images in files of four, three at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SIZE", 4)
        config = runpy.run_path(str(ROOT / "configs" / "eval" / "tiny.py"))["get_config"]()
        config.prompts.count, config.reference.count, config.kid_subset = COUNT, 40, 4
        config.prompts.sha256 = ""
        config.features.weights = str(ROOT / config.features.weights)
        config.comparison.batch_size, config.bootstrap = 3, 20
        yield protocol.from_config(config.to_dict())


@pytest.fixture(scope="module")
def setup(small, tmp_path_factory):
    devices = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    meters = measure.load(small.features, small.clip, 32, devices)
    return comparison.Setup(
        tmp_path_factory.mktemp("out"), small, "0123456789ab", prompts.choose(small.prompts, None),
        meters, devices, (0, 1), keep_images=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_folder):
    """The random model, and its student."""
    teacher = pretrained.read(tiny_folder)
    unet = students.student_of(teacher.unet, 8, students.random_cond_proj, np.random.default_rng(0))
    return teacher, student_folder.student(teacher, unet)


@pytest.fixture(scope="module")
def candidates(models):
    names, samplers_known = ("teacher", "student"), ("heun", "few_step")
    return [
        drawing.candidate(
            name, model, "float32", "xla",
            samplers.entries(model, samplers_known, (2,), (2.0,), 50, "trailing"),
        )
        for name, model in zip(names, models, strict=True)
    ]  # fmt: skip


def _draw(setup, candidates):
    with log.bar(0, comparison.num_calls(setup, candidates)) as progress:
        comparison.draw_all(setup, candidates, progress)
        return progress.bar.n


@pytest.fixture(scope="module")
def drawn(setup, candidates):
    """The rows' folders, teacher's and student's, and what the bar counted.

    Each sampler is compiled once for all tests.
    """
    drawers, drawer = {}, drawing.drawer

    def kept(artist, entry, batch_size):
        if (entry, batch_size) not in drawers:
            drawers[entry, batch_size] = drawer(artist, entry, batch_size)
        return drawers[entry, batch_size]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "drawer", kept)
        counted = _draw(setup, candidates)
        yield [comparison._folder(setup, each, each.entries[0]) for each in candidates], counted


@pytest.fixture(scope="module")
def real(small, setup):
    return reference.draw_shapes2d(small.reference, small.images, setup.meters.features_of, 40)


def _pictures(where):
    paths = sorted(where.glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_a_runs_later_students_are_drawn_by_the_program_of_its_first(
    models, setup, tmp_path, monkeypatch
):
    def drawn(student):
        (entry,) = samplers.entries(student, ("few_step",), (1,), (), 50, "trailing")
        chosen = drawing.candidate("student", student, "float32", "xla", [entry])
        artist = drawing.start(chosen, ["a red circle"] * 2, 32, 0, setup.devices)
        return drawing.drawer(artist, entry, 2)(np.arange(2))

    first = models[1]
    params = jax.tree.map(lambda x: 1.1 * np.asarray(x), first.unet.params)
    later = first._replace(unet=first.unet._replace(params=params))
    expected = drawn(later)
    monkeypatch.setenv("SLAM_JAX_CACHE", str(tmp_path))
    assert (drawn(first) != expected).any()
    assert len([*(tmp_path / "executables").iterdir()]) == 1
    monkeypatch.setattr(executables.export, "export", None)
    np.testing.assert_array_equal(drawn(later), expected)


def test_bar_counts_every_call_of_the_unet(drawn, setup, candidates):
    # Heun's two steps are three guided calls.
    assert drawn[1] == comparison.num_calls(setup, candidates) == COUNT * (2 * 3 + 2)


def test_images_are_diffusers_at_the_noise_of_seed_and_number(
    drawn, models, setup, tmp_path, monkeypatch
):
    """So batches do not matter, and `sample` draws the same with that seed."""
    pretrained.write(tmp_path / "student", models[1])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "student", safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    key = jax.random.key(setup.protocol.seed)
    draw = jax.jit(
        lambda number: jax.random.normal(jax.random.fold_in(key, number), (2, 16, 16, 4))
    )
    noise = np.stack([draw(jax.device_put(np.uint32(number))) for number in range(COUNT)], axis=1)
    first, second = torch.tensor(noise).permute(0, 1, 4, 2, 3)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: second)
    theirs = pipe(
        setup.chosen.captions, num_inference_steps=2, guidance_scale=1.0, latents=first,
        output_type="np",
    ).images  # fmt: skip
    pictures = _pictures(drawn[0][1])
    assert pictures.shape == (COUNT, 32, 32, 3)
    np.testing.assert_allclose(pictures / 255, theirs, atol=0.51 / 255 + 2e-4)


def test_features_are_the_classifiers_of_what_was_drawn(drawn, small):
    net = ShapesClassifier(shapes2d.LABEL_SIZES)
    params = classifier.read(small.features.weights, 32)
    for where in drawn[0]:
        images = jax.device_put(_pictures(where).astype(np.float32) / 127.5 - 1)
        features, logits = net.apply({"params": params}, images)
        measured = store.read(where, COUNT)
        np.testing.assert_allclose(measured["features"], features, atol=1e-5)
        np.testing.assert_allclose(measured["logits"], np.concatenate(logits, 1), atol=1e-4)


def test_numbers_are_scipys(drawn, setup, candidates, real):
    rows = comparison.rows(setup, candidates, real)
    assert [(row.model, row.sampler, row.steps, row.guidance, row.network_calls, row.images)
            for row in rows] == [("teacher", "heun", 2, 2.0, 6, COUNT),
                                 ("student", "few_step", 2, None, 2, COUNT)]  # fmt: skip
    for row, where in zip(rows, drawn[0], strict=True):
        assert list(row.scores) == [
            "Frechet distance", "KID", "precision", "recall", "prompt accuracy"
        ]  # fmt: skip
        features = store.read(where, COUNT)["features"].astype(np.float64)
        a, b = np.cov(features.T), np.cov(real.features.T.astype(np.float64))
        root = scipy.linalg.sqrtm(b)
        overlap = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root.real @ a @ root.real), 0)).sum()
        apart = ((features.mean(0) - real.features.mean(0, np.float64)) ** 2).sum()
        expected = apart + np.trace(a) + np.trace(b) - 2 * overlap
        assert row.scores["Frechet distance"].value == pytest.approx(expected, rel=1e-4)
        low, high = row.scores["Frechet distance"].interval
        assert low < row.scores["Frechet distance"].value < high and row.seconds > 0


def _without_times(where):
    return {k: v for k, v in store.read(where, COUNT).items() if k not in ("seconds", "is_first")}


def test_a_killed_run_goes_on_to_the_same_numbers(drawn, setup, candidates, tmp_path, monkeypatch):
    again, fill = setup._replace(out=tmp_path), store.fill
    student = candidates[1:]

    def killed(folder, missing, measure):
        fill(folder, missing[:1], measure)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "fill", killed)
        _draw(again, student)
    shards = []
    monkeypatch.setattr(
        store, "fill", lambda folder, missing, m: shards.append(missing) or fill(folder, missing, m)
    )
    _draw(again, student)
    assert [len(each) for each in shards] == [2]
    where = comparison._folder(again, student[0], student[0].entries[0])
    for name, array in _without_times(drawn[0][1]).items():
        np.testing.assert_array_equal(_without_times(where)[name], array)
    np.testing.assert_array_equal(_pictures(where), _pictures(drawn[0][1]))
    _draw(again, student)
    assert len(shards) == 1
    next(where.glob("000006.png")).unlink()
    _draw(again, student)
    assert [each.start for each in shards[1]] == [4]


def test_hosts_share_the_images(drawn, setup, candidates, tmp_path):
    student = candidates[1:]
    for host in range(2):
        _draw(setup._replace(out=tmp_path, part=(host, 2), keep_images=False), student)
    where = comparison._folder(setup._replace(out=tmp_path), student[0], student[0].entries[0])
    for name, array in _without_times(drawn[0][1]).items():
        np.testing.assert_array_equal(_without_times(where)[name], array)
    assert len(list(where.glob("*.png"))) == comparison.SHOWN
    about = json.loads((where / "about.json").read_text())
    assert about["sampler"] == "few_step" and about["protocol"] == setup.digest


def test_scores_are_of_each_picture_and_its_own_caption(drawn, setup, candidates, tmp_path):
    def scores_of(pictures, captions):
        return {"clip": np.array([hash(c) % 97 + p.mean() for p, c in
                                  zip(pictures, captions, strict=True)])}  # fmt: skip

    meters = setup.meters._replace(scores_of=scores_of)
    scored = setup._replace(out=tmp_path, meters=meters)
    _draw(scored, candidates[1:])
    where = comparison._folder(scored, candidates[1], candidates[1].entries[0])
    expected = scores_of(_pictures(where), setup.chosen.captions)["clip"]
    np.testing.assert_array_equal(store.read(where, COUNT)["clip"], expected)


def test_time_is_that_of_all_but_the_first_batch(setup, candidates, real, monkeypatch):
    measured = {
        "features": np.random.default_rng(0).normal(size=(COUNT, 64)),
        "logits": np.zeros((COUNT, 22)),
        "seconds": np.array([9.0] * 3 + [1.0] * 6 + [2.0] * 3),
        "is_first": np.arange(COUNT) < 3,
    }
    monkeypatch.setattr(store, "read", lambda *_: measured)
    (row,) = comparison.rows(setup, candidates[1:], real)
    assert row.seconds == pytest.approx(12 / 9)
    measured["is_first"] = np.ones(COUNT, bool)
    (row,) = comparison.rows(setup, candidates[1:], real)
    assert row.seconds == pytest.approx(39 / 12)


def test_identity_is_of_all_that_draws(models, candidates):
    student = models[1]
    changed = [
        student._replace(scheduler={**student.scheduler, "beta_end": 0.013}),
        student._replace(vae=models[0].vae._replace(config={**student.vae.config, "a": 1})),
        student._replace(unet=student.unet._replace(
            params=jax.tree.map(lambda leaf: leaf * 1.001, student.unet.params))),
    ]  # fmt: skip
    made = [drawing.candidate("a", each, "float32", "xla", ()) for each in (student, *changed)]
    made.append(drawing.candidate("b", student, "bfloat16", "xla", ()))
    made.append(drawing.candidate("b", student, "float32", "cudnn", ()))
    assert made[0].identity == candidates[1].identity
    assert len({each.identity for each in made}) == len(made)


def test_samplers_are_asked_of_the_models_they_are_made_for(models):
    teacher, student = models
    found = samplers.entries(teacher, ("ddim", "euler", "few_step"), (2, 4), (1.0, 8), 50, "")
    assert len(found) == 8 and {each.w for each in found} == {1.0, 8.0}
    found = samplers.entries(student, ("ddim", "few_step"), (2, 4), (1.0, 8), 50, "")
    assert [each.steps for each in found] == [2, 4] and found[0].sampler == "few_step"
    with pytest.raises(UserError, match="--steps 51: ddim has 50 times"):
        samplers.entries(teacher, ("ddim",), (51,), (1.0,), 50, "")
    with pytest.raises(UserError, match="--samplers plms is not known; there are ddim"):
        samplers.check_known(("ddim", "plms"))
    with pytest.raises(UserError, match="--samplers ddim is for models that are no students, and"):
        samplers.check(("ddim",), [True], ["a"])
    with pytest.raises(UserError, match="few_step is for few-step students, and a is none"):
        samplers.check(("few_step",), [False], ["a"])
    with pytest.raises(UserError, match="ddim: b is made for few_step; add"):
        samplers.check(("ddim",), [False, True], ["a", "b"])


def test_too_few_images_are_told_of(small, real):
    score.check(small)
    assert "biased upwards" in score.warning(real, 64)
    assert score.warning(real, 65) is None
    with pytest.raises(UserError, match="count 12 is less than two subsets of .*kid_subset 7"):
        score.check(small._replace(kid_subset=7))
    few = small._replace(prompts=small.prompts._replace(count=5), metrics=("recall",))
    with pytest.raises(UserError, match="count 5: precision and recall need 6"):
        score.check(few)
