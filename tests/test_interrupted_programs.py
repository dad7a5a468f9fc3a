"""Ctrl-C in the middle of programs that write files: one line, status 130, nothing half-written."""

import importlib
import json
import pathlib
import re
import runpy
import sys

import numpy as np
import optax
import pytest

from slam_jax import students
from slam_jax.distill import state
from slam_jax.runtime import checkpoint
from slam_jax.weights import pretrained

sys.path.append(str(pathlib.Path(__file__).parent))
children = importlib.import_module("children")
ROOT = pathlib.Path(__file__).parents[1]


def _run_folder(workdir, teacher_folder):
    """That of a run of one step."""
    config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]().to_dict()
    config["teacher"]["model"] = str(teacher_folder)
    config["student"]["gamma_dim"] = 8
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    teacher = pretrained.read(teacher_folder)
    student = students.student_of(
        teacher.unet, 8, students.random_cond_proj, np.random.default_rng(0)
    )
    with checkpoint.manager(workdir / "checkpoints", keep=1, keep_every=0) as checkpoints:
        checkpoint.save_last(checkpoints, 1, state.init(student.params, optax.adam(1e-3)))
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module")
def ends(folder, small_folder):
    """Name -> what became of each run, in this order."""
    run = _run_folder(folder / "run", small_folder)
    prepare = [
        "--source=shapes2d", f"--model={small_folder}", "--size=32", "--num_images=60",
        "--records_per_shard=20", "--num_threads=2",
    ]  # fmt: skip
    evaluate = [
        f"--protocol={ROOT}/configs/eval/tiny.py", "--protocol.prompts.count=150",
        "--protocol.prompts.sha256=", "--protocol.reference.count=20", "--protocol.kid_subset=4",
        "--protocol.comparison.batch_size=16", "--protocol.bootstrap=0",
        f"--model={small_folder}", "--steps=1", "--w=2",
    ]  # fmt: skip
    watch = [*evaluate[:7], f"--watch={run}", "--steps=1"]
    export = [f"--workdir={run}"]
    second = r"tmp \S+shard-00001-of-00003\.array_record"
    requests = {
        "prepare": ("prepare", [*prepare, f"--out={folder}/prepared"], second),
        "prepare again": ("prepare", [*prepare, f"--out={folder}/prepared"], ""),
        "prepare straight": ("prepare", [*prepare, f"--out={folder}/straight"], ""),
        "evaluate": (
            "evaluate", [*evaluate, f"--out={folder}/scores"], r"tmp \S+000128-000149\.npz",
        ),
        "evaluate again": ("evaluate", [*evaluate, f"--out={folder}/scores"], ""),
        "evaluate straight": ("evaluate", [*evaluate, f"--out={folder}/scored"], ""),
        "watch": ("evaluate", [*watch, f"--out={folder}/watched"], r"000000-000127\.npz"),
        "export": ("export", [*export, f"--out={folder}/out"], r"vae/diffusion.*safetensors"),
        "export one": (
            "export", [*export, "--format=single-file", f"--out={folder}/out.safetensors"],
            r"partial \S+out\.safetensors",
        ),
        "sample": (
            "sample", [f"--model={small_folder}", "--prompt=a", "--steps=2", f"--out={folder}/p"],
            r"000000\.png",
        ),
        "report": ("report", [f"--workdir={run}"], r"report\.html"),
    }  # fmt: skip
    kept = children.keeping_programs(folder / "cache")
    requests = {name: children.Request(*each) for name, each in requests.items()}
    return children.run(requests, num_devices=1, **kept)


@pytest.mark.parametrize(
    "name", ["prepare", "evaluate", "watch", "export", "export one", "sample", "report"]
)
def test_the_end_is_one_line_and_status_130(ends, name):
    status, err = ends[name].status, ends[name].stderr
    told = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert status == 130, err
    assert len(told) == 1 and told[0].startswith("interrupted: nothing is half-written"), err


def test_nothing_is_half_written(ends, folder):
    left = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if re.search(r"\.tmp$|\.partial|\.replaced", path.name) and "cache" not in path.parts
    ]
    assert not left
    assert not (folder / "out").exists() and not (folder / "out.safetensors").exists()
    assert not (folder / "run" / "report.html").exists()


def _files(where):
    return {path.name: path.read_bytes() for path in where.iterdir()}


def test_a_cache_goes_on_to_the_same_bytes(ends, folder):
    assert ends["prepare again"].status == ends["prepare straight"].status == 0
    assert _files(folder / "prepared") == _files(folder / "straight")


def test_an_evaluation_goes_on_to_the_same_numbers(ends, folder):
    assert ends["evaluate again"].status == ends["evaluate straight"].status == 0
    found = [
        [row["scores"] for row in json.loads((folder / name / "results.json").read_text())["rows"]]
        for name in ("scores", "scored")
    ]
    assert found[0] == found[1] and found[0]
