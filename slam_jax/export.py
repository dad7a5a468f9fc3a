"""A run's student in the format that another tool loads.

    python -m slam_jax.export --workdir runs/tiny --format diffusers --out tiny_student
    python -m slam_jax.export --workdir runs/tiny --format single-file --out tiny.safetensors

The last checkpoint is read, so this works while training goes on. Formats: diffusers (a pipeline
folder, gamma embedding included), diffusers-folded (the same as a plain UNet), single-file (one
.safetensors for ComfyUI and A1111), lora (a folder with the LoRA as diffusers and as ComfyUI
spell it).
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from slam_jax import command, experiment, settings, students, trained
from slam_jax.errors import UserError
from slam_jax.runtime import bucket, folder, log
from slam_jax.weights import (
    card,
    lora,
    lora_svd,
    pretrained,
    single_file,
    tensorfile,
    translate,
)  # fmt: skip
from slam_jax.weights import student as student_folder

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, here or gs://BUCKET/FOLDER.")
_FORMAT = flags.DEFINE_enum(
    "format", "diffusers", ("diffusers", "diffusers-folded", "single-file", "lora"),
    "What to write.",
)  # fmt: skip
_EXTRACT_LORA = flags.DEFINE_integer(
    "extract_lora", None, "For --format lora of a run that trained all parameters: the rank."
)
# Other programs have a flag of that name.
_OUT = flags.DEFINE_string(
    "out", None, "Folder, or File.safetensors for single-file.", allow_override=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype", student_folder.DTYPES[0], student_folder.DTYPES, "Of the weights in the files."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ("ema", "online"), "The average over steps, or the last step's."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out names.")

# Which part of the train state holds them.
_STATE = {"ema": "target", "online": "student"}


def main() -> None:
    out = Path(_OUT.value)
    _check_out(out, _FORMAT.value, _OVERWRITE.value)
    workdir = bucket.reached("workdir", _WORKDIR.value)
    config = trained.read_settings(workdir)
    _check_rank(config.student.lora.rank, _FORMAT.value, _EXTRACT_LORA.value)
    found = experiment.teacher(config)
    step = trained.latest(workdir)
    whole, of_unet = (sum(map(math.prod, _shapes(part))) for part in (found, found.unet.params))
    last = of_unet if _FORMAT.value == "lora" else whole
    with log.bar(0, whole + of_unet + last) as progress:
        progress.bar.unit_scale, told = True, progress.bar.update
        with log.phase(progress, "reading"):
            teacher = pretrained.load(found, place=partial(_counted, told))
            student = trained.read(workdir, step, _STATE[_WEIGHTS.value], teacher.unet, config)
            told(of_unet)
        with log.phase(progress, "writing"):
            kept = _write(out, config, step, teacher, student, told)
            told(progress.bar.total - progress.bar.n)
    for name, share in kept.items():
        print(f"{share:8.2%} {name}")
    print(f"{out}: step {step}, {_WEIGHTS.value} weights, {_DTYPE.value}")


def _shapes(params: Any) -> list[tuple[int, ...]]:
    """Of all parameters, read or not, in a tree."""
    return [leaf.shape for leaf in jax.tree.leaves(params) if isinstance(leaf, translate.Unread)]


def _counted(told: tensorfile.Told, _path: tuple[str, ...], parameter: np.ndarray) -> np.ndarray:
    """The parameter as it is."""
    told(parameter.size)
    return parameter


def _write(
    out: Path, config: settings.Settings, step: int, teacher: pretrained.Pretrained,
    student: pretrained.Component, told: tensorfile.Told,
) -> dict[str, float]:  # fmt: skip
    """In the format asked for; of an extracted LoRA, the share of each tensor's change it keeps."""
    unet, additions = experiment.shipped(config, teacher.unet, student)
    kept = {}
    if _FORMAT.value != "diffusers":
        unet = students.fold_gamma(unet)
    model = student_folder.student(
        teacher, unet, original_inference_steps=config.distill.num_subpaths
    )
    if _FORMAT.value == "lora":
        if additions is None:
            additions, kept = lora_svd.extract(teacher.unet, unet, _EXTRACT_LORA.value, told)
        lora.write(out, additions, dtype=_DTYPE.value)
    elif _FORMAT.value == "single-file":
        single_file.write(out, model, dtype=_DTYPE.value, told=told)
    else:
        readme = card.card(
            base=config.teacher.model,
            base_license=card.license_of(teacher.tokenizer.parent),
            step=step,
            weights=_WEIGHTS.value,
            settings=settings.as_dict(config),
            dtype=_DTYPE.value,
        )
        pretrained.write(out, model, dtype=_DTYPE.value, readme=readme, told=told)
    return kept


def _check_out(out: Path, form: str, overwrite: bool) -> None:
    if (form == "single-file") != (out.suffix == ".safetensors"):
        wanted = "a File.safetensors" if form == "single-file" else "a folder"
        raise UserError(f"--out {out}: --format {form} writes {wanted}")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; give another, or --overwrite to replace it")
    folder.check_writable(out.absolute().parent)


def _check_rank(trained_rank: int, form: str, extracted_rank: int | None) -> None:
    if extracted_rank is not None and (trained_rank or form != "lora" or extracted_rank < 1):
        raise UserError(
            f"--extract_lora {extracted_rank}: give a rank of at least 1, for --format lora of a "
            "run that trained all parameters"
        )
    if form == "lora" and not trained_rank and extracted_rank is None:
        raise UserError(
            "this run trained all parameters; for a LoRA of them give --extract_lora RANK"
        )


if __name__ == "__main__":
    command.run(main, required=("workdir", "out"))
