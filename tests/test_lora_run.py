"""A LoRA run from start to end, resumed on the way: what is saved, and what is written."""

import json
import os
import pathlib
import subprocess
import sys

import diffusers
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from slam_jax.weights import pretrained, translate

ROOT = pathlib.Path(__file__).parents[1]
TARGETS = ("to_q", "conv1", "conv_shortcut", "time_emb_proj")


@pytest.fixture(scope="module")
def workdir(small_folder, tmp_path_factory):
    """The folder of a run of two steps that another one took up and led to three."""
    folder = tmp_path_factory.mktemp("lora_run")
    values = {
        "teacher.model": small_folder, "batch_size": 4, "student.gamma_dim": 8,
        "student.cond_proj": "random", "student.lora.rank": 2, "student.lora.alpha": 1.0,
        "student.lora.targets": TARGETS, "distill.gamma": ("uniform",), "distill.length": 20,
        "distill.stride": 20, "data.num_threads": 1, "log.every_steps": 1, "eval.judge": "",
        "eval.prompts": ("a",), "eval.teacher_steps": 1, "eval.student_steps": 1,
    }  # fmt: skip
    environment = {
        **os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT),
        "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEBUG_KEY_REUSE": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    for num_steps in (2, 3):
        subprocess.run(
            [
                sys.executable, "-m", "slam_jax.main", "--config", str(ROOT / "configs/tiny.py"),
                "--workdir", str(folder / "run"), f"--config.num_steps={num_steps}",
                *(f"--config.{name}={value}" for name, value in values.items()),
            ],
            cwd=folder, env=environment, check=True,
        )  # fmt: skip
    return folder / "run"


def test_resumed_run_goes_on(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_checkpoint_holds_the_lora_and_the_gamma_layer_alone(workdir, small_folder):
    manager = ocp.CheckpointManager((workdir / "checkpoints").absolute())
    saved = manager.restore(3, args=ocp.args.StandardRestore())
    manager.close()
    for part in ("student", "target"):
        names = {".".join(path[-2:-1]) for path in traverse_util.flatten_dict(saved[part])}
        assert names == {"lora_down", "lora_up", "cond_proj"}
    ups = [
        np.abs(leaf).max()
        for path, leaf in traverse_util.flatten_dict(saved["student"]).items()
        if path[-2] == "lora_up"
    ]
    assert min(ups) > 0
    base = pretrained.read(small_folder).unet.params["conv_in"]["kernel"]
    assert not any(leaf.shape == base.shape for leaf in _leaves(saved))


def _leaves(tree):
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(value)
    elif tree is not None:
        yield np.asarray(tree)


def test_student_is_a_plain_unet_of_teacher_and_lora(workdir, small_folder):
    """As diffusers fuses them, from the LoRA's own file."""
    student = pretrained.read(workdir / "student")
    assert student.unet.config.get("time_cond_proj_dim") is None
    assert student.scheduler["_class_name"] == "LCMScheduler"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(small_folder, safety_checker=None)
    pipe.load_lora_weights(workdir / "student_lora")
    pipe.fuse_lora()
    ours = translate.to_tensors(student.unet.params)
    theirs = {
        name.replace(".base_layer", ""): tensor.numpy()
        for name, tensor in pipe.unet.state_dict().items()
        if "lora_" not in name
    }
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-7, err_msg=name)
    teacher = translate.to_tensors(pretrained.read(small_folder).unet.params)
    changed = {name for name in ours if not np.array_equal(ours[name], teacher[name])}
    assert changed == {
        name for name in ours if name.endswith(tuple(f"{target}.weight" for target in TARGETS))
    }
