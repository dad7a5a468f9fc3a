"""The program evaluate as a user runs it: results, a second time, a run's checkpoints, mistakes.

All cases run in children of one process that has imported the program once.
"""

import importlib
import json
import pathlib
import re
import runpy
import sys

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from slam_jax import experiment, settings
from slam_jax.data import shapes2d
from slam_jax.distill import state
from slam_jax.errors import UserError
from slam_jax.evaluation import drawing, final
from slam_jax.runtime import checkpoint
from slam_jax.weights import hub, pretrained

sys.path.append(str(pathlib.Path(__file__).parent))
children = importlib.import_module("children")
ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "configs" / "eval" / "tiny.py"


def _config(path=ROOT / "configs" / "tiny.py"):
    return runpy.run_path(str(path))["get_config"]().to_dict()


def _write_run(workdir, teacher_folder):
    """A run's folder with two checkpoints, of which the second is the worse by far."""
    config = _config()
    config["teacher"]["model"], config["student"]["gamma_dim"] = str(teacher_folder), 8
    config["num_steps"] = 2
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    chosen = settings.from_config(config)
    teacher = pretrained.read(teacher_folder)
    target = experiment.student(chosen, teacher.unet).params
    checkpoints = checkpoint.manager(workdir / "checkpoints", keep=2, keep_every=0)
    for step, scale in ((1, 1.0), (2, 0.0)):
        params = jax.tree.map(lambda leaf, scale=scale: jax.numpy.asarray(leaf * scale), target)
        now = state.init(params, optimizer=optax.sgd(1.0))
        checkpoint.save_last(checkpoints, step, now)
    checkpoints.close()


def _mistakes(folder, model, student):
    known = [f"--protocol={TINY}", f"--out={folder}/out", f"--model={model}"]
    (folder / "file").touch()
    np.savez(folder / "foreign.npz", mu=np.zeros(3))
    coco = ROOT / "configs" / "eval" / "coco2017_5k.py"
    inception = [f"--protocol={coco}", *known[1:], f"--captions={folder}/file"]
    pictures = ["--protocol.reference.source=pictures", "--protocol.reference.crop=middle"]
    return {
        "no_protocol": (known[1:], "--protocol must be given"),
        "no_out": ([known[0], known[2]], "--out must be given"),
        "protocol_file": (["--protocol=no.py", *known[1:]], r"no\.py"),
        "protocol_key": ([*known, "--protocol.metrics=('is',)"], "'is' is not known; there are"),
        "no_model": ([*inception[:2], inception[3]], "--model must be given: this protocol"),
        "model": ([*known[:2], "--model=/no/such"], "no folder /no/such"),
        "out": ([known[0], f"--out={folder}/file/out", known[2]], "cannot write to .*file/out"),
        "sampler": ([*known, "--samplers=plms"], "--samplers plms is not known; there are ddim"),
        "student": ([*known, f"--model={student}", "--samplers=ddim"], "is made for few_step; add"),
        "w": ([*known[:2], f"--model={student}", "--w=3"], "--w 3: students' guidance was fixed"),
        "w_text": ([*known, "--w=high"], "--w high must be numbers"),
        "steps": ([*known, "--steps=4,60"], "--steps 60: ddim has 50 times"),
        "steps_text": ([*known, "--steps=few"], "--steps few must be numbers"),
        "captions": ([*known, "--captions=a.json"], "captions are shapes2d's own"),
        "no_captions": (inception[:3], "--captions must be given: COCO's annotations"),
        "coco": (inception, "file is no captions file of COCO"),
        "classifier": ([*known, "--protocol.features.weights=/no"], "/no/model.safetensors"),
        "inception": (
            [*known, "--protocol.features.network=inception", "--protocol.features.mode=clean",
             "--protocol.features.weights=/no.pth", "--protocol.metrics=('fid',)"],
            "cannot read /no.pth",
        ),
        "reference": ([*known, "--reference=a.npz"], "references are shapes2d's"),
        "no_reference": ([*known, *pictures], "there are no reference statistics .*reference.npz"),
        "foreign": ([*known, *pictures, f"--reference={folder}/foreign.npz"], "npz holds no"),
        "list": ([*known, "--protocol.prompts.seed=3"], "shapes2d have sha256 .*cannot be"),
        "few": ([*known, "--protocol.prompts.count=20"], "count 20 is less than two subsets"),
        "size": ([*known, "--protocol.images.size=33"], "33 pixels: the VAE needs"),
        "no_run": ([known[0], f"--watch={folder}/none"], "cannot read .*none/config.json"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def answers(folder, tiny_folder):
    """Name -> (status, stdout, stderr, devices touched), and what mistakes should say."""
    run = folder / "run"
    _write_run(run, tiny_folder)
    student = folder / "student"
    model = pretrained.read(tiny_folder)
    scheduler = {**model.scheduler, "_class_name": "LCMScheduler"}
    pretrained.write(student, model._replace(scheduler=scheduler))
    mistakes = _mistakes(folder, tiny_folder, student)
    few = [
        f"--protocol={TINY}", "--protocol.prompts.count=12", "--protocol.prompts.sha256=",
        "--protocol.reference.count=20",
        "--protocol.kid_subset=4", "--protocol.comparison.batch_size=2", "--protocol.bootstrap=0",
    ]  # fmt: skip
    compare = [*few, f"--model={tiny_folder}", "--steps=1", "--w=2", f"--out={folder}/out"]
    requests = {
        name: children.Request("evaluate", arguments, terminal=name in ("compare", "again"))
        for name, arguments in {
            "compare": compare,
            "again": compare,
            "watch": [*few, f"--watch={run}", "--steps=1"],
            "rewatch": [*few, f"--watch={run}", "--steps=1", "--watch_once"],
            **{name: arguments for name, (arguments, _) in mistakes.items()},
        }.items()
    }
    kept = children.keeping_programs(folder / "cache")
    answers = children.run(requests, num_devices=2, **kept)
    return answers, {name: said for name, (_, said) in mistakes.items()}


def test_every_mistake_is_one_line_with_status_2_before_any_device(answers):
    wrong = {}
    for name, said in answers[1].items():
        status, _, stderr, touched = answers[0][name]
        one_line = re.fullmatch(r"error: [^\n]*\n", stderr) is not None
        if status != 2 or not one_line or not re.search(said, stderr) or touched:
            wrong[name] = (status, stderr, touched)
    assert not wrong, "\n".join(f"{name}: {answer}" for name, answer in wrong.items())


def test_results_are_written_and_printed(answers, folder):
    status, stdout, stderr, _ = answers[0]["compare"]
    assert status == 0, stderr
    assert "warning: 12 images for 64 features" in stderr
    results = json.loads((folder / "out" / "results.json").read_text())
    tag = re.search(r"hash ([0-9a-f]{12})", stdout)[1]
    assert results["hash"] == tag and len(results["rows"]) == 1
    assert [row["guidance"] for row in results["rows"]] == [2.0]
    table = (folder / "out" / "table.md").read_text()
    assert stdout.endswith(table) and table.count(f"tiny@{tag[:8]}") == 1
    for name in ("quality.png", "samples.png"):
        Image.open(folder / "out" / name).verify()


def test_the_second_time_nothing_is_drawn(answers):
    (_, first, drawn, _), (status, again, looked, _) = answers[0]["compare"], answers[0]["again"]
    assert status == 0 and first == again
    assert "compiling" in drawn and "compiling" not in looked
    assert re.search(r"100%\|.* 24/24 \[\d\d:\d\d<00:00", drawn), drawn


def test_each_checkpoint_is_scored_and_the_best_is_kept(answers, folder, tiny_folder):
    status, stdout, stderr, _ = answers[0]["watch"]
    assert status == 0, stderr
    assert "%|" not in stderr  # no bar where nobody looks
    out = folder / "run" / "evaluation"
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    distances = [line["Frechet distance, 1 step"] for line in lines]
    best = pretrained.read(out / "best")
    expected = pretrained.read(tiny_folder).unet.params["conv_in"]["kernel"]
    scale = (1.0, 0.0)[int(np.argmin(distances))]
    np.testing.assert_allclose(best.unet.params["conv_in"]["kernel"], scale * expected, rtol=1e-6)
    assert f"step {1 + int(np.argmin(distances))} is the best so far" in stdout
    assert list((out / "events").iterdir())
    status, stdout, _, _ = answers[0]["rewatch"]
    assert status == 0 and "step 1" not in stdout


def test_a_run_ends_with_the_table_of_its_student(tiny_folder, tmp_path, monkeypatch):
    """Artists that draw what they are told are found to do so."""
    config = _config()
    config["eval"] |= {"num_images": 70, "judge": str(ROOT / config["eval"]["judge"])}
    chosen = settings.from_config(config)
    monkeypatch.setattr(final, "_NUM_REFERENCES", 300)
    monkeypatch.setattr(final, "_BOOTSTRAP", 0)
    final.check(chosen)
    source = shapes2d.Shapes2D(32, 70, 2)

    def drawer(artist, entry, batch_size):
        del artist, batch_size
        shift = 0 if entry.sampler == "few_step" else 1  # the teacher is always wrong
        return lambda numbers: np.stack([source[(int(n) + shift) % 70].image for n in numbers])

    monkeypatch.setattr(drawing, "start", lambda *_: None)
    monkeypatch.setattr(drawing, "drawer", drawer)
    teacher = hub.find(str(tiny_folder), "", "", "")
    scheduler = {**teacher.scheduler, "_class_name": "LCMScheduler"}
    table = final.report(tmp_path, teacher, teacher._replace(scheduler=scheduler), chosen)
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["model"] for row in results] == ["teacher"] * 4 + ["student"] * 3
    accuracies = [row["scores"]["prompt accuracy"]["value"] for row in results]
    assert max(accuracies[:4]) < 0.1 and accuracies[4:] == [1.0] * 3
    assert table.count("tiny@") == 7 and (tmp_path / "samples" / "final.png").exists()


def test_too_few_images_for_a_table_are_refused_before_a_run():
    config = _config()
    config["eval"]["num_images"] = 5
    with pytest.raises(
        UserError, match=r"config\.eval\.num_images=5: the table at the end needs 6"
    ):
        final.check(settings.from_config(config))
    config["eval"] |= {"num_images": 6, "judge": str(ROOT / config["eval"]["judge"])}
    final.check(settings.from_config(config))


def test_without_a_judge_a_run_says_where_the_student_is(tiny_folder, tmp_path):
    config = _config()
    config["eval"]["judge"] = ""
    teacher = hub.find(str(tiny_folder), "", "", "")
    said = final.report(tmp_path, teacher, teacher, settings.from_config(config))
    assert said == f"the student is in {tmp_path / 'student'}" and not list(tmp_path.iterdir())
