"""A whole run that is sent to Weights & Biases, for which stand_ins/wandb.py stands."""

import importlib
import json
import os
import pathlib
import signal
import sys
import time

import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
labs = importlib.import_module("lab")
STAND_IN = pathlib.Path(__file__).parent / "stand_ins"
ON = "--config.log.wandb_project=student"
FEW = (
    "--config.num_steps=6", "--config.accumulate=1", "--config.distill.length=20",
    "--config.eval.every_steps=4", "--config.eval.teacher_steps=1",
    "--config.eval.student_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_folder):
    return labs.Lab(tmp_path_factory.mktemp("lab"), small_folder)


def environment(lab, told: pathlib.Path) -> dict[str, str]:
    path = os.pathsep.join([str(STAND_IN), lab.environment["PYTHONPATH"]])
    return {"PYTHONPATH": path, "TOLD": str(told)}


def calls(told: pathlib.Path, name: str) -> list[dict]:
    found = [json.loads(line) for line in told.read_text().splitlines()]
    return [call for call in found if call["call"] == name]


def test_a_killed_and_resumed_run_is_one_run_there_and_no_step_is_told_twice(lab, tmp_path):
    told, workdir = tmp_path / "told", lab.folder / "killed"
    around = environment(lab, told)
    process = lab.start("killed", ".", *FEW, ON, **around)
    until = time.monotonic() + 300
    while not told.exists() or len(calls(told, "log")) < 5:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, _, err = lab.finish("killed", ".", *FEW, ON, **around)
    assert (status, err) == (0, "")

    first, second = calls(told, "init")
    assert first == second and len(first["id"]) >= 8
    assert (first["project"], first["name"], first["resume"]) == ("student", "killed", "allow")
    assert first["dir"] == str(workdir)
    assert first["config"] == json.loads((workdir / "config.json").read_text())
    logged = calls(told, "log")
    steps = [call["step"] for call in logged if "loss" in call["values"]]
    assert steps == list(range(1, 7))
    for line in labs.numbers(workdir):
        (told_so, *_) = [call for call in logged if call["step"] == line["step"]]
        assert line.items() <= {**told_so["values"], "step": line["step"]}.items()
    pictures = {c["step"]: c["values"] for c in logged if "loss" not in c["values"]}
    assert pictures == dict.fromkeys((4, 6), {"teacher and student": [194, 194, 3]})
    assert [call["exit_code"] for call in calls(told, "finish")] == [0]
