"""--dry_run: from configs alone to numbers that other ways of counting give too."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
from safetensors import numpy as safetensors

from slam_jax import forecast
from slam_jax.runtime import aot, chips, hlo
from slam_jax.runtime.collectives import Collective
from slam_jax.weights import architectures, hub

ROOT = pathlib.Path(__file__).parents[1]
GAMMA_DIM = 8


def _numbers(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return sum(tensor.size for tensor in safetensors.load_file(path).values())


def _run(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "slam_jax.main", f"--config={ROOT}/configs/tiny.py", *arguments],
        cwd=folder, text=True, capture_output=True, timeout=200,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_NUM_CPU_DEVICES": "8",
            **environment,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def bare_model(tiny_folder, tmp_path_factory):
    """The model without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


ARGUMENTS = (
    "--dry_run", "--config.teacher.model=model", "--config.batch_size=32",
    "--config.accumulate=2", f"--config.student.gamma_dim={GAMMA_DIM}",
    "--config.mesh.axes=(('data',2),('fsdp',4))", "--config.optimizer.mu_dtype=bfloat16",
    "--config.mesh.rules=(('(student|target|opt_state)/.*','fsdp'),('.*',()))",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(bare_model):
    done = _run(bare_model.parent, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    again = _run(bare_model.parent, *ARGUMENTS)
    text, line = done.stdout.rsplit("\n\n", 1)
    return text, json.loads(line), done.stderr, again


def test_every_quantity_is_printed(report):
    text, line, said, _ = report
    for name in (
        "shapes only, no data, no weights", "8 x cpu", "data 2 x fsdp 4", "accumulate 2 x 16",
        "2 on each batch shard", "image uint8 [32, 32, 3], 77 tokens", "optimizer", "per device",
        "FLOPs per image", "text encoder", "counted in the compiled", "temporaries", "all-gather",
        "sent per device", "time: not predicted",
    ):  # fmt: skip
        assert name in text
    assert "compiling the step, for some" in said
    assert line["num_devices"] == 8 and line["chip"] is None and line["num_steps"] == 600


def test_a_second_time_nothing_is_compiled(report):
    text, _, _, again = report
    assert again.returncode == 0 and "compiling" not in again.stderr
    assert again.stdout.rsplit("\n\n", 1)[0] == text


def test_the_state_has_the_sizes_of_the_files(report, tiny_folder):
    _, line, _, _ = report
    teacher = _numbers(tiny_folder, "unet")
    # With the layer that takes gamma, which is as wide as the first block.
    student = teacher + GAMMA_DIM * 8
    # Adam's two moments, and the two counters of optax.
    optimizer = 2 * student + 2
    assert line["parameters"] == {
        "student": student, "target": student, "optimizer": optimizer, "teacher": teacher,
        "VAE": _numbers(tiny_folder, "vae"), "text encoder": _numbers(tiny_folder, "text_encoder"),
        "batch": 32 * (32 * 32 * 3 + 77),
    }  # fmt: skip
    sizes = line["bytes_of"]
    # The first moment takes half of what the second does.
    assert sizes["optimizer"]["all"] == 4 * optimizer - 2 * student
    assert sizes["batch"] == {"all": 32 * (3072 + 4 * 77), "per_device": 4 * (3072 + 4 * 77)}
    assert sizes["teacher"]["per_device"] == sizes["teacher"]["all"] == 4 * teacher
    # Of arrays worth cutting, from 4,096 numbers on, a quarter.
    (path,) = (tiny_folder / "unet").glob("*.safetensors")
    tensors = safetensors.load_file(path).values()
    held = sum(x.size // (4 if x.size >= 4096 else 1) for x in tensors) + GAMMA_DIM * 8
    assert sizes["student"]["per_device"] == 4 * held < sizes["student"]["all"]
    held = sum(each["per_device"] for each in sizes.values())
    assert line["xla_arguments"] == pytest.approx(held, rel=0.01)


def test_flops_are_those_of_the_passes_and_close_to_xlas(report):
    _, line, _, _ = report
    assert line["flops"] == pytest.approx(32 * sum(line["flops_of"].values()), rel=0.01)
    assert line["flops_of"]["teacher, 4 calls"] == pytest.approx(
        4 * line["flops_of"]["target, forward"], rel=0.01
    )
    # Two microbatches one after the other; of the teacher's two solver steps too one is counted.
    assert 0.3 < line["flops_once"] / line["flops"] < 0.5
    assert line["xla_flops"] * 8 == pytest.approx(line["flops_once"], rel=0.3)


@pytest.mark.parametrize(("model", "unet", "text"), [
    # As published; of SDXL both text encoders.
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, 123_060_480),
    ("stabilityai/stable-diffusion-2-1", 865_910_724, 340_387_840),
    ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684, 123_060_480 + 694_659_840),
])  # fmt: skip
def test_known_models_have_their_published_sizes(model, unet, text):
    found = architectures.find(model)
    encoders = [each for each in (found.text_encoder, found.text_encoder_2) if each is not None]

    def size(component):
        leaves = [component.params]
        total = 0
        while leaves:
            leaf = leaves.pop()
            if isinstance(leaf, dict):
                leaves += leaf.values()
            else:
                total += math.prod(leaf.shape)
        return total

    assert (size(found.unet), sum(map(size, encoders))) == (unet, text)


def test_of_a_model_on_the_hub_no_weights_are_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.extend([name, revision, *allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.locate_configs("some/model", "main") == tmp_path
    assert asked[:2] == ["some/model", "main"] and "unet/config.json" in asked
    assert not any("safetensors" in each or "msgpack" in each for each in asked)


COUNTS = forecast.Counts(
    num_devices=4, batch_size=8, microbatches=3, num_steps=3600, in_float32=False,
    flops_of={"teacher": 1}, flops=4 * 10**14, flops_once=4 * 10**14, parameters={"student": 7},
    bytes_of={"student": (28, 7)}, changing=5 * 10**9,
)  # fmt: skip
CHIP = chips.Chip("Chip", 1e14, 5e13, 16e9, 1e12, 1e11, "a page")
COMPILED = aot.Compiled(
    60.0, 1e14, 110e9, 10 * 10**9, 10**9, 3 * 10**9, 10**9, 0,
    (Collective("all-gather", 4, 2, 200 * 10**9), Collective("all-reduce", 4, 1, 10**11)),
)  # fmt: skip


def test_the_roofline_takes_the_longest():
    # Traffic: the state once there and back, the rest with every microbatch: 10 + 3 * 100 GB.
    assert forecast.roofline(COUNTS, COMPILED, CHIP) == pytest.approx((1.0, 0.31, 3.0))
    text = forecast.text(COUNTS, COMPILED, CHIP)
    assert "bound by interconnect" in text and "3.00 h, 12.0 device-h" in text
    assert "PREDICTION" in text and "fits into 16 GB of Chip: 1 GB are left" in text
    bare = forecast.text(COUNTS, COMPILED._replace(code=0), CHIP)
    assert "not made" in bare and "2 GB are left for the program" in bare
    slow = COUNTS._replace(in_float32=True, flops=10**15)
    assert forecast.roofline(slow, COMPILED, CHIP).bound == "compute"


def test_one_by_one_each_operation_takes_its_own_longest():
    # Three times 0.1 s of arithmetic, 0.2 s of memory, and 0.05 s of a kernel not known to XLA.
    work = (hlo.Work(1, 0, 2 * 10**11), hlo.Work(3, 10**13, 10**9))
    compiled = COMPILED._replace(work=work, operations=70)
    counts = COUNTS._replace(flops=4 * (3 * 10**13 + 5 * 10**12))
    assert forecast.one_by_one(counts, compiled, CHIP) == pytest.approx(0.55)
    assert "70 operations, one by one" in forecast.text(counts, compiled, CHIP)
    assert "14.5 images per second" in forecast.text(counts, compiled, CHIP)
    assert forecast.as_json(counts, compiled, CHIP)["predicted_one_by_one_s"] == pytest.approx(0.55)


def test_too_little_memory_is_said_with_the_remedy():
    larger = COMPILED._replace(temporaries=5 * 10**9)
    text = forecast.text(COUNTS, larger, CHIP)
    assert "DOES NOT FIT into 16 GB of Chip: 1 GB too much; raise accumulate" in text
    refused = aot.Compiled(60.0, 0, 0, 0, 0, 0, 0, 20e9, ())
    text = forecast.text(COUNTS, refused, CHIP)
    assert "4 GB too much" in text and "time: not predicted" in text
    assert forecast.as_json(COUNTS, refused, CHIP)["fits"] is False


def test_a_compiler_that_gives_up_says_how_much_it_wanted():
    line = "Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded"
    assert aot._USED.search(line).groups() == ("23.50", "G", "15.75", "G")


@pytest.mark.parametrize(("kind", "name"), [
    ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA L4", "L4"),
])  # fmt: skip
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    device = types.SimpleNamespace(
        device_kind=kind, platform="tpu" if "TPU" in kind else "gpu", process_index=0, coords=(0, 1)
    )
    chip = chips.find([device])
    assert chip.name == name
    # Two cores of one chip, as JAX may show them.
    pair = chips.find([device, device])
    assert pair.flops == chip.flops / (2 if "TPU" in kind else 1)
    assert chips.find([types.SimpleNamespace(device_kind="cpu", platform="cpu")]) is None


@pytest.mark.parametrize(("arguments", "message"), [
    (["--workdir=run", "--topology=v5e:2x2"], "--topology v5e:2x2 is for --dry_run"),
    (["--dry_run", "--config.batch_size=31"], "batch_size 31 is not a multiple of 8 devices"),
    (["--dry_run", "--config.teacher.model=nowhere"], "nowhere"),
])  # fmt: skip
def test_a_mistake_is_one_line_with_status_2(arguments, message, tmp_path):
    done = _run(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
