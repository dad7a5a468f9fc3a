"""The recorded step of the released script, others made here with torch, and spoilt copies."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

HERE = Path(__file__).parent
RECORDED = HERE / "reference" / "reference_step"
WEIGHTS = "diffusion_pytorch_model.safetensors"

sys.path.append(str(HERE))  # where the program finds its reader, too
reference_step = importlib.import_module("reference_step")
reference_recording = importlib.import_module("reference_recording")
torch_step = importlib.import_module("torch_step")

OUTPUTS = sorted(
    safetensors.numpy.load_file(RECORDED / "tensors.safetensors").keys()
    - set(reference_recording.INPUTS)
)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(RECORDED, tmp_path / "copy", copy_function=shutil.copyfile))


@pytest.fixture(scope="module")
def our_values():
    """What the intact recording is replayed to."""
    return reference_step.replay(reference_recording.read(RECORDED))


def change(path: Path, name: str, by: np.ndarray | float) -> None:
    tensors = safetensors.numpy.load_file(path)
    tensors[name] = (tensors[name] + by).astype(tensors[name].dtype)
    safetensors.numpy.save_file(tensors, path)


def failures(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines() if line.endswith("FAIL")]


# --- As it is --------------------------------------------------------------------------------


def test_recorded_step_passes_and_every_tensor_is_printed(capsys):
    status = reference_step.main([str(RECORDED)])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0, lines
    assert [line.split()[0] for line in lines[:-1]] == OUTPUTS
    assert all(float(line.split()[1]) <= 1e-4 for line in lines[:-1])
    assert lines[-1] == f"{len(OUTPUTS)} of {len(OUTPUTS)} within 1e-04"


def test_status_reaches_the_shell(tmp_path):
    command = [sys.executable, HERE / "reference_step.py", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("malformed: cannot read")


# --- Another recording, made by torch ----------------------------------------------------------


def test_recording_of_other_shapes_passes(tmp_path, capsys):
    # 30 sub-paths do not divide 1000: 33 long, ending at 989.
    torch_step.record(tmp_path, num_times=30, w=2.5, batch=3)
    status = reference_step.main([str(tmp_path)])
    assert status == 0, capsys.readouterr().out


# --- Spoilt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_any_changed_output_is_noticed(copy, our_values, monkeypatch, capsys, name):
    monkeypatch.setattr(reference_step, "replay", lambda recording: our_values)
    tensors = safetensors.numpy.load_file(copy / "tensors.safetensors")
    # The smallest change of one element that the tolerance may not hide; whole for whole numbers.
    by = np.zeros_like(tensors[name])
    size = 2e-4 * np.linalg.norm(tensors[name])
    by.flat[0] = size if by.dtype.kind == "f" else 1
    change(copy / "tensors.safetensors", name, by)
    assert reference_step.main([str(copy)]) == 1
    assert failures(capsys.readouterr().out) == [name]


@pytest.mark.parametrize(
    "file, name",
    [
        (f"teacher_unet/{WEIGHTS}", "mid_block.resnets.0.conv1.weight"),
        (f"student_unet/{WEIGHTS}", "time_embedding.cond_proj.weight"),
        (f"target_unet/{WEIGHTS}", "conv_in.bias"),
        ("tensors.safetensors", "noise"),
        ("tensors.safetensors", "uncond_embeds"),
    ],
)
def test_changed_weight_or_input_is_noticed(copy, capsys, file, name):
    change(copy / file, name, 0.05)
    assert reference_step.main([str(copy)]) == 1
    failed = failures(capsys.readouterr().out)
    assert "grad_huber_conv_out" in failed, failed
    assert "start_timesteps" not in failed


def test_not_a_number_is_a_failure(copy, our_values, monkeypatch):
    spoilt = {**our_values, "target": np.full_like(our_values["target"], np.nan)}
    monkeypatch.setattr(reference_step, "replay", lambda recording: spoilt)
    assert reference_step.main([str(copy)]) == 1


def test_another_shape_is_a_failure(copy, our_values, monkeypatch):
    spoilt = {**our_values, "target": our_values["target"][:1]}
    monkeypatch.setattr(reference_step, "replay", lambda recording: spoilt)
    assert reference_step.main([str(copy)]) == 1


# --- Malformed ---------------------------------------------------------------------------------


def rewrite(copy: Path, name: str, tensor: np.ndarray | None) -> None:
    tensors = safetensors.numpy.load_file(copy / "tensors.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    safetensors.numpy.save_file(tensors, copy / "tensors.safetensors")


def write_setting(copy: Path, key: str, value) -> None:
    settings = json.loads((copy / "step.json").read_text())
    (copy / "step.json").write_text(json.dumps({**settings, key: value}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


MALFORMED = {
    "no such folder": (shutil.rmtree, "step.json"),
    "no settings": (lambda copy: (copy / "step.json").unlink(), "step.json"),
    "broken settings": (lambda copy: (copy / "step.json").write_text("{"), "step.json"),
    "a setting missing": (lambda copy: (copy / "step.json").write_text("{}"), "w_scale"),
    "a setting that is no number": (lambda copy: write_setting(copy, "skip", "20"), "skip is '20'"),
    "no grid": (lambda copy: write_setting(copy, "num_ddim_timesteps", 0), "num_subpaths 0"),
    "two prediction types": (
        lambda copy: write_setting(copy, "prediction_type", "v_prediction"), "prediction_type",
    ),
    "no network": (lambda copy: shutil.rmtree(copy / "target_unet"), "target_unet"),
    "cut weights": (lambda copy: truncate(copy / "student_unet" / WEIGHTS), "cut short"),
    "cut tensors": (lambda copy: truncate(copy / "tensors.safetensors"), "tensors.safetensors"),
    "an input missing": (lambda copy: rewrite(copy, "gamma", None), "lacks tensor 'gamma'"),
    "an output missing": (lambda copy: rewrite(copy, "x_prev", None), "lacks tensor 'x_prev'"),
    "an index too large": (
        lambda copy: rewrite(copy, "index", np.array([0, 50, 1, 2])), "from 0 to 49",
    ),
    "an index that is not whole": (
        lambda copy: rewrite(copy, "index", np.array([0.0, 1, 2, 3])), "integers",
    ),
    "an input of another batch": (
        lambda copy: rewrite(copy, "gamma", np.ones(3, np.float32)), "shapes do not fit each other",
    ),
    "text of another width": (
        lambda copy: [
            rewrite(copy, name, np.ones((4, 7, 23), np.float32))
            for name in ("prompt_embeds", "uncond_embeds")
        ],
        "width 23 do not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_directory_is_told_apart(copy, capsys, spoil, message):
    spoil(copy)
    assert reference_step.main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("malformed: ") and error.count("\n") == 1


def test_student_that_takes_no_gamma_is_malformed(copy, capsys):
    shutil.rmtree(copy / "student_unet")
    shutil.copytree(copy / "teacher_unet", copy / "student_unet")
    assert reference_step.main([str(copy)]) == 2
    assert "time_cond_proj_dim" in capsys.readouterr().err
