"""What a run has trained so far: its settings, and the student in one of its checkpoints."""

import json

from etils import epath

from slam_jax import experiment, settings
from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint, folder
from slam_jax.weights import pretrained
from slam_jax.weights import student as student_folder

CHECKPOINTS = "checkpoints"


def read_settings(workdir: epath.Path) -> settings.Settings:
    """Those that the run in the folder was last started with; UserError if there is none."""
    path = workdir / folder.CONFIG
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}); --workdir is the folder of a training run"
        ) from None
    return settings.from_config(values)


def latest(workdir: epath.Path) -> int:
    """The step of the last checkpoint; UserError if there is none yet."""
    step = checkpoint.latest(workdir / CHECKPOINTS)
    if step is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train until checkpoint.every_steps")
    return step


def read(
    workdir: epath.Path, step: int, part: str, teacher: pretrained.Component,
    chosen: settings.Settings,
) -> pretrained.Component:  # fmt: skip
    """What was trained, out of the checkpoint of that step; `part` of the state holds it."""
    # Of the student only names and shapes are asked for, which do not depend on where it started.
    bare = chosen._replace(student=chosen.student._replace(start=""))
    student = experiment.student(bare, teacher)
    params = checkpoint.restore_part(workdir / CHECKPOINTS, step, part, student.params)
    return student._replace(params=params)


def student(
    workdir: epath.Path, step: int, teacher: pretrained.Pretrained, chosen: settings.Settings
) -> pretrained.Pretrained:
    """The model that the run would ship if it ended with that step: the average over steps."""
    found = read(workdir, step, "target", teacher.unet, chosen)
    unet, _ = experiment.shipped(chosen, teacher.unet, found)
    num_subpaths = chosen.distill.num_subpaths
    return student_folder.student(teacher, unet, original_inference_steps=num_subpaths)
