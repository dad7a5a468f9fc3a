"""The final comparison of teacher and student."""

from pathlib import Path

from slam_jax.settings import Eval
from slam_jax.weights.pretrained import Pretrained


def report(workdir: Path, teacher: Pretrained, student: Pretrained, settings: Eval) -> str:
    """The table that the run ends with."""
    del teacher, student, settings
    return f"the student is in {workdir / 'student'}"
