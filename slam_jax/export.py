"""A run's student in the format that another tool loads.

    python -m slam_jax.export --workdir runs/tiny --format diffusers --out tiny_student

The last checkpoint is read, so this works while training goes on. Formats: diffusers (a pipeline
folder, gamma embedding included), diffusers-folded (the same as a plain UNet), single-file (one
.safetensors for ComfyUI and A1111).
"""

import json
from pathlib import Path

from absl import flags

from slam_jax import command, pipeline, settings
from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint, folder
from slam_jax.weights import card, hub, pretrained, single_file, templates
from slam_jax.weights import student as student_folder

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder.")
_FORMAT = flags.DEFINE_enum(
    "format", "diffusers", ("diffusers", "diffusers-folded", "single-file"), "What to write."
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
    workdir, out = Path(_WORKDIR.value), Path(_OUT.value)
    _check_out(out, _FORMAT.value, _OVERWRITE.value)
    config = _read_settings(workdir)
    base = config.teacher
    teacher = pretrained.load(hub.find(base.model, base.revision, base.variant, base.config))
    step, unet = _read_unet(workdir, teacher.unet, config, _STATE[_WEIGHTS.value])
    if _FORMAT.value != "diffusers":
        unet = pipeline.fold_gamma(unet)
    model = student_folder.student(
        teacher, unet, original_inference_steps=config.distill.num_subpaths
    )
    if _FORMAT.value == "single-file":
        single_file.write(out, model, dtype=_DTYPE.value)
    else:
        readme = card.card(
            base=base.model,
            base_license=card.license_of(teacher.tokenizer.parent),
            step=step,
            weights=_WEIGHTS.value,
            settings=settings.as_dict(config),
            dtype=_DTYPE.value,
        )
        pretrained.write(out, model, dtype=_DTYPE.value, readme=readme)
    print(f"{out}: step {step}, {_WEIGHTS.value} weights, {_DTYPE.value}")


def _check_out(out: Path, form: str, overwrite: bool) -> None:
    if (form == "single-file") != (out.suffix == ".safetensors"):
        wanted = "a File.safetensors" if form == "single-file" else "a folder"
        raise UserError(f"--out {out}: --format {form} writes {wanted}")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; give another, or --overwrite to replace it")
    folder.check_writable(out.absolute().parent)


def _read_settings(workdir: Path) -> settings.Settings:
    path = workdir / folder.CONFIG
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}); --workdir is the folder of a training run"
        ) from None
    return settings.from_config(values)


def _read_unet(
    workdir: Path, teacher: pretrained.Component, config: settings.Settings, part: str
) -> tuple[int, pretrained.Component]:
    """(step, the student's UNet) of the last checkpoint; `part` of the state holds it."""
    checkpoints = workdir / "checkpoints"
    step = checkpoint.latest(checkpoints)
    if step is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train until checkpoint.every_steps")
    unet_config = {**teacher.config, "time_cond_proj_dim": config.student.gamma_dim}
    shapes = templates.of_unet(unet_config)
    params = checkpoint.restore_part(checkpoints, step, part, shapes)
    return step, teacher._replace(config=unet_config, params=params)


if __name__ == "__main__":
    command.run(main, required=("workdir", "out"))
