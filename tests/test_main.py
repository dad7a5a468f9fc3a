"""The whole program on a random model, without torch: its run folder, its end, and its resuming.

All runs share one persistent compilation cache, so the train step is compiled once.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors import numpy as safetensors

from slam_jax.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 12
SAVE_EVERY = 2
WEIGHTS = pathlib.Path("unet") / "diffusion_pytorch_model.safetensors"

# Importing any of these fails in the runs, as where they are not installed.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(name + " is blocked in this test")

sys.meta_path.insert(0, Blocker())
"""


class Lab:
    """Runs the program in a folder of its own, where the teacher is ./model."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.folder = folder
        self.environment = {
            **os.environ, "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join([str(folder / "blocker"), str(ROOT)]),
        }  # fmt: skip
        (folder / "blocker").mkdir()
        (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
        (folder / "model").symlink_to(model)

    def start(self, workdir: str, cwd: str = ".", **environment: str) -> subprocess.Popen:
        settings = {
            "teacher.model": "model", "num_steps": NUM_STEPS, "batch_size": 4, "accumulate": 2,
            "student.gamma_dim": 8, "student.cond_proj": "random", "distill.length": 40,
            "distill.stride": 20,
            "optimizer.learning_rate": 1e-2, "data.num_threads": 1, "log.every_steps": 1,
            "checkpoint.every_steps": SAVE_EVERY, "eval.every_steps": 5, "eval.teacher_steps": 2,
            "eval.student_steps": 2, "eval.judge": "", "faults.max_skips": 1,
            "eval.prompts": ("a circle", "a square"),
        }  # fmt: skip
        return subprocess.Popen(
            [
                sys.executable, "-m", "slam_jax.main", "--config", str(ROOT / "configs/tiny.py"),
                "--workdir", str(self.folder / workdir),
                *(f"--config.{name}={value}" for name, value in settings.items()),
            ],
            cwd=self.folder / cwd, env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, workdir: str, cwd: str = ".", **environment: str) -> tuple[int, str, str]:
        process = self.start(workdir, cwd, **environment)
        out, err = process.communicate()
        return process.returncode, out, err


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_folder):
    return Lab(tmp_path_factory.mktemp("lab"), tiny_folder)


@pytest.fixture(scope="module")
def straight(lab):
    """The work folder of a run that nothing interrupted, and what it said; JAX at its strictest."""
    status, _, err = lab.finish(
        "straight", JAX_NUMPY_RANK_PROMOTION="raise", JAX_NUMPY_DTYPE_PROMOTION="strict",
        JAX_DEBUG_KEY_REUSE="1",
    )  # fmt: skip
    assert status == 0, err
    return lab.folder / "straight", err


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _numbers(workdir):
    """All that was logged, but for the speed."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in _lines(workdir)]


def _saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _state(workdir):
    manager = ocp.CheckpointManager((workdir / "checkpoints").absolute())
    found = manager.restore(NUM_STEPS, args=ocp.args.StandardRestore())
    manager.close()
    return found


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
    assert _saved(workdir) == [NUM_STEPS - SAVE_EVERY, NUM_STEPS]
    lines = _lines(workdir)
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


def test_bar_shows_compiling_and_training(straight):
    _, err = straight
    for word in ("compiling the step", "training: 100%", f"{NUM_STEPS}/{NUM_STEPS}", "images/s"):
        assert word in err
    assert "loss" in err and "Warning" not in err and "Traceback" not in err


def test_student_folder_holds_the_target(straight, tiny_folder):
    workdir, _ = straight
    student, teacher = pretrained.read(workdir / "student"), pretrained.read(tiny_folder)
    target = _state(workdir)["target"]
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

    expected, found = (dict(_flat(_state(folder))) for folder in (straight[0], workdir))
    assert expected.keys() == found.keys() and len(found) > 100
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert _numbers(workdir) == _numbers(straight[0])
    assert _files(workdir / "student") == _files(straight[0] / "student")
    assert _files(workdir / "samples") == _files(straight[0] / "samples")


def _flat(tree, path=""):
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield from _flat(value, f"{path}/{key}")
    elif tree is not None:
        yield path, np.asarray(tree)


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name.startswith(("step_", "diffusion", "model", "scheduler"))
    }


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
    assert _saved(workdir) == [saved]
    # It went back once, and on with the data that come after those of the two steps.
    rollbacks = (workdir / "rollbacks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in rollbacks] == [
        {"step": saved + 2, "back_to": saved, "offset": 2}
    ]
    lines = _lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, saved + 3))
    assert [line["skipped_updates"] for line in lines] == [0] * saved + [1, 1]
    assert all("loss" not in line for line in lines[saved:])
