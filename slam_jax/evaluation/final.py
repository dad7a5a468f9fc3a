"""The comparison that a run ends with: teacher and student at the same noise and prompts."""

import datetime
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from slam_jax.errors import UserError
from slam_jax.evaluation import (
    classifier,
    comparison,
    drawing,
    measure,
    prompts,
    reference,
    samplers,
    score,
    table,
)
from slam_jax.evaluation import protocol as protocols
from slam_jax.evaluation.drawing import Candidate
from slam_jax.evaluation.protocol import Protocol
from slam_jax.runtime import folder, log
from slam_jax.settings import Settings
from slam_jax.weights import pretrained

TEACHER_STEPS = (50, 4, 2, 1)
STUDENT_STEPS = (4, 2, 1)
_NUM_REFERENCES = 4000  # real drawings behind the Frechet distance
_KID_SUBSET = 32
_SPACING = "trailing"
_BOOTSTRAP = 200
_BATCH_SIZE = 128  # images drawn at a time, on each device


def check(settings: Settings) -> None:
    """UserError if eval.judge holds no classifier of these images. Touches no device."""
    if settings.data.source != "shapes2d":
        raise UserError(f"eval.judge knows shapes2d, not {settings.data.source}; set it to ''")
    if settings.eval.num_images < score.FEWEST:
        raise UserError(
            f"config.eval.num_images={settings.eval.num_images}: the table at the end needs "
            f"{score.FEWEST} images in each row; raise it, or set eval.judge to ''"
        )
    classifier.read(settings.eval.judge, settings.data.size)


def of_run(settings: Settings) -> Protocol:
    """The protocol of a run's own table; configs/eval/tiny.py is that of configs/tiny.py.

    Other drawings than the training's, of the same 9,216 captions.
    """
    seed, size = settings.seed + 1, settings.data.size
    return Protocol(
        seed=seed,
        metrics=("fid", "kid", "precision", "recall", "prompt_accuracy"),
        kid_subset=min(_KID_SUBSET, settings.eval.num_images // 2),
        bootstrap=_BOOTSTRAP,
        prompts=protocols.Prompts("shapes2d", settings.eval.num_images, seed + 1, "", ""),
        images=protocols.Images(size, size, "lanczos"),
        features=protocols.Features("classifier", "", settings.eval.judge),
        clip=protocols.Clip("", "", ""),
        reference=protocols.Reference("shapes2d", _NUM_REFERENCES, seed + 2, "none", "", ""),
        comparison=protocols.Comparison(
            (), ("ddim",), TEACHER_STEPS, STUDENT_STEPS, (settings.distill.w,),
            settings.distill.num_subpaths, _SPACING, _BATCH_SIZE, settings.teacher.dtype,
            settings.attention,
        ),
    )  # fmt: skip


def report(
    workdir: Path,
    teacher: pretrained.Pretrained,
    student: pretrained.Pretrained,
    settings: Settings,
) -> str:
    """Writes samples/final.png, results.json and evaluation/; returns the table as text.

    teacher: as pretrained.find has it, its parameters unread.

    Without eval.judge, the name of a classifier's folder, there is nothing to measure with.
    """
    if not settings.eval.judge:
        return f"the student is in {workdir / 'student'}"
    protocol = of_run(settings)
    devices = Mesh(np.array(jax.local_devices()), ("data",))
    chosen = prompts.choose(protocol.prompts, None)
    meters = measure.load(protocol.features, protocol.clip, protocol.images.resize, devices)
    batch_size = devices.size * _BATCH_SIZE
    real = reference.draw_shapes2d(
        protocol.reference, protocol.images, meters.features_of, batch_size
    )
    hashed = protocols.Hashed(chosen.sha256, meters.fingerprints(), real.identity)
    setup = comparison.Setup(
        workdir / "evaluation", protocol, protocols.digest(protocol, hashed), chosen, meters,
        devices, (0, 1), keep_images=False,
    )  # fmt: skip
    candidates = _candidates(teacher, student, settings)
    with log.bar(0, comparison.num_calls(setup, candidates)) as progress:
        comparison.draw_all(setup, candidates, progress)
    rows = comparison.rows(setup, candidates, real)
    picture = comparison.picture(setup, candidates)
    folder.write_atomic(workdir / "samples" / "final.png", picture)
    named = table.Protocol("tiny", setup.digest)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = table.as_json(rows, named, date).encode()
    folder.write_atomic(workdir / "results.json", results)
    shown = f"The same noise in every row.\n\n{table.markdown(rows, named)}"
    warning = score.warning(real, len(chosen.captions))
    return shown if warning is None else f"{shown}\nwarning: {warning}"


def _candidates(teacher, student, settings: Settings) -> list[Candidate]:
    distill, known = settings.distill, ("ddim", samplers.FEW_STEP)
    grid = (distill.w,), distill.num_subpaths, _SPACING
    return [
        drawing.candidate(
            name, model, dtype, settings.attention, samplers.entries(model, known, steps, *grid)
        )
        for name, model, dtype, steps in (
            ("teacher", teacher, settings.teacher.dtype, TEACHER_STEPS),
            ("student", student, settings.student.dtype, STUDENT_STEPS),
        )
    ]
