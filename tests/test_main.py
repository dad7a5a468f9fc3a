"""The whole program on a random model, without torch: its run folder, its end, and its resuming.

All runs share one persistent compilation cache, so the train step is compiled once.
"""

import importlib
import json
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors import numpy as safetensors

from slam_jax.weights import pretrained

sys.path.append(str(pathlib.Path(__file__).parent))
labs = importlib.import_module("lab")
NUM_STEPS, SAVE_EVERY = labs.NUM_STEPS, labs.SAVE_EVERY
WEIGHTS = pathlib.Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_folder):
    return labs.Lab(tmp_path_factory.mktemp("lab"), tiny_folder)


@pytest.fixture(scope="module")
def straight(lab):
    """The work folder of a run that nothing interrupted, and what it said; JAX at its strictest."""
    status, _, err = lab.finish(
        "straight", JAX_NUMPY_RANK_PROMOTION="raise", JAX_NUMPY_DTYPE_PROMOTION="strict",
        JAX_DEBUG_KEY_REUSE="1",
    )  # fmt: skip
    assert status == 0, err
    return lab.folder / "straight", err


def test_the_runs_cannot_import_torch(lab):
    for name in ("torch", "diffusers", "transformers"):
        command = [sys.executable, "-c", f"import {name}"]
        found = subprocess.run(command, env=lab.environment, capture_output=True, text=True)
        assert "is blocked in this test" in found.stderr


def test_run_folder_is_complete(straight):
    workdir, _ = straight
    config = json.loads((workdir / "config.json").read_text())
    assert config["distill"]["length"] == 40 and config["optimizer"]["b1"] == 0.9
    assert len((workdir / "revision.txt").read_text().splitlines()) == 1
    assert labs.saved(workdir) == [NUM_STEPS - SAVE_EVERY, NUM_STEPS]
    lines = labs.lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(
        line.keys() == {
            "step", "loss", "grad_norm", "update_norm", "images_per_second",
            "bad_samples", "filtered_samples", "cut_captions", "skipped_updates",
        }
        for line in lines
    )  # fmt: skip
    assert list((workdir / "events").glob("events.*"))


def test_sample_grids_show_teacher_and_student(straight):
    workdir, _ = straight
    grids = sorted(path for path in (workdir / "samples").glob("step_*.png"))
    assert [path.name for path in grids] == [f"step_{n:06d}.png" for n in (5, 10, NUM_STEPS)]
    first, last = (np.asarray(Image.open(path)) for path in (grids[0], grids[-1]))
    assert first.shape == (2 * 96 + 2, 2 * 96 + 2, 3)
    # The teacher, on the left, stays as it is; the student learns.
    assert (first[:, :96] == last[:, :96]).all() and (first[:, 98:] != last[:, 98:]).any()


def test_nothing_is_shown_where_nobody_looks(straight):
    assert straight[1] == ""


def test_a_terminal_shows_compiling_and_training(lab, straight):
    workdir = _resumable(straight[0], lab.folder / "shown")
    shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
    status, shown = lab.on_terminal("shown")
    assert status == 0, shown
    for word in ("compiling the step", "training: 100%", f"{NUM_STEPS}/{NUM_STEPS}", "images/s"):
        assert word in shown
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, [\d.]+ images/s, loss", shown)
    assert "Warning" not in shown and "Traceback" not in shown


def test_student_folder_holds_the_target(straight, tiny_folder):
    workdir, _ = straight
    assert "distilled: " in (workdir / "report.html").read_text()
    student, teacher = pretrained.read(workdir / "student"), pretrained.read(tiny_folder)
    target = labs.state(workdir)["target"]
    np.testing.assert_array_equal(
        student.unet.params["conv_in"]["kernel"], target["conv_in"]["kernel"]
    )
    np.testing.assert_array_equal(
        student.vae.params["encoder"]["conv_in"]["kernel"],
        teacher.vae.params["encoder"]["conv_in"]["kernel"],
    )
    assert student.unet.config["time_cond_proj_dim"] == 8
    assert student.scheduler["_class_name"] == "LCMScheduler"
    assert student.scheduler["original_inference_steps"] == 50


def _kill_when(process: subprocess.Popen, happens, seconds: float) -> tuple[bool, str]:
    """SIGKILL so long after `happens()`; whether the process was still there, and its stderr."""
    while process.poll() is None and not happens():
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    return process.returncode == -signal.SIGKILL, err


def test_killed_at_any_moment_and_resumed_is_bit_identical(lab, straight):
    workdir, rng = lab.folder / "killed", random.Random(0)

    def logged(step):
        path = workdir / "metrics.jsonl"
        return lambda: path.exists() and len(path.read_bytes().splitlines()) >= step

    def saving():
        return list((workdir / "checkpoints").glob(f"{2 * SAVE_EVERY}.*tmp*"))

    moments = (
        (saving, 0.0),
        (logged(rng.randint(6, 9)), rng.uniform(0.0, 0.2)),
        ((lab.folder / "killed" / ".student.partial").exists, 0.0),
    )
    for number, (happens, wait) in enumerate(moments):
        killed, err = _kill_when(lab.start("killed"), happens, wait)
        # The last moment is short; where it is missed, the end is come to twice.
        assert killed or number == len(moments) - 1, err
    status, _, err = lab.finish("killed")
    assert status == 0, err

    expected, found = (dict(labs.flat(labs.state(folder))) for folder in (straight[0], workdir))
    assert expected.keys() == found.keys() and len(found) > 100
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert labs.numbers(workdir) == labs.numbers(straight[0])
    assert labs.files(workdir / "student") == labs.files(straight[0] / "student")
    assert labs.files(workdir / "samples") == labs.files(straight[0] / "samples")


def test_losses_that_stay_nan_stop_the_run_and_keep_the_checkpoint(lab, straight, tiny_folder):
    """Resumed before the last steps with a teacher whose weights have become NaN."""
    poisoned = pathlib.Path(shutil.copytree(tiny_folder, lab.folder / "poisoned" / "model"))
    tensors = safetensors.load_file(poisoned / WEIGHTS)
    safetensors.save_file(
        {k: v * np.float32("nan") for k, v in tensors.items()}, poisoned / WEIGHTS
    )
    workdir = pathlib.Path(shutil.copytree(straight[0], lab.folder / "stopped"))
    shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
    status, _, err = lab.finish("stopped", "poisoned")
    last = err.splitlines()[-1]
    assert status == 1
    saved = NUM_STEPS - SAVE_EVERY
    assert f"step {saved + 1}: the update was dropped, since the loss is nan" in err
    assert last.startswith(f"error: step {saved + 2}: 2 updates within 1000 steps were drop"), err
    assert "Traceback" not in err
    assert labs.saved(workdir) == [saved]
    # It went back once, and on with the data that come after those of the two steps.
    rollbacks = (workdir / "rollbacks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in rollbacks] == [
        {"step": saved + 2, "back_to": saved, "offset": 2}
    ]
    lines = labs.lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, saved + 3))
    assert [line["skipped_updates"] for line in lines] == [0] * saved + [1, 1]
    assert all("loss" not in line for line in lines[saved:])


def _resumable(straight: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The run before its student was written."""
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "student")
    return workdir


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(lab, straight):
    workdir = _resumable(straight[0], lab.folder / "damaged")
    newest = workdir / "checkpoints" / str(NUM_STEPS)
    path = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, _, err = lab.finish("damaged")
    assert status == 0, err
    told = f"warning: the checkpoint of step {NUM_STEPS} in {workdir / 'checkpoints'} is damaged ("
    assert told in err and f"set aside as {NUM_STEPS}.damaged, and the one before is used" in err
    assert (workdir / "checkpoints" / f"{NUM_STEPS}.damaged").exists()
    found, expected = (dict(labs.flat(labs.state(folder))) for folder in (workdir, straight[0]))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert labs.numbers(workdir) == labs.numbers(straight[0])
    assert labs.files(workdir / "student") == labs.files(straight[0] / "student")


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(lab, straight):
    workdir = _resumable(straight[0], lab.folder / "full")
    shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
    pictures = max(path.stat().st_size for path in (workdir / "samples").iterdir())
    # Of the files that are written until then the arrays' alone are so large.
    process = lab.start("full")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2 * pictures, 2 * pictures))
    _, err = process.communicate()
    assert process.returncode == 2, err
    last = NUM_STEPS - SAVE_EVERY
    assert err.splitlines()[-1] == (
        f"error: no checkpoint of step {NUM_STEPS} in {workdir / 'checkpoints'}: File too large; "
        f"the last one is of step {last}; make room, and run again to go on from there"
    )
    assert labs.saved(workdir) == [last]
