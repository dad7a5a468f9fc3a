"""Which samplers there are, for which models they are made, and what they cost."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from slam_jax import pipeline, students
from slam_jax.diffusion import parameterization, sampler, schedule, spacing
from slam_jax.errors import UserError
from slam_jax.nets import kernels
from slam_jax.runtime import apart
from slam_jax.shapes import Image
from slam_jax.weights import pretrained

# Of students; those of other models are sampler.GUIDED.
FEW_STEP = "few_step"
KNOWN = (*sampler.GUIDED, FEW_STEP)


class Entry(NamedTuple):
    """One way of drawing with a model."""

    sampler: str
    steps: int
    w: float | None  # None for students, whose guidance was fixed in training
    original_steps: int  # grid on which the times of few_step and ddim lie
    spacing: str  # of the other samplers' times: timestep_spacing, "" for the scheduler's own


def entries(
    model: pretrained.Pretrained, chosen: Sequence[str], steps: Sequence[int],
    ws: Sequence[float | int], original_steps: int, spaced: str,
) -> list[Entry]:  # fmt: skip
    """Every combination of those samplers that are made for the model; UserError if one cannot be.

    spaced: Entry.spacing of the samplers that have any.
    """
    if students.is_student(model):
        original = {"original_inference_steps": original_steps, **model.scheduler}
        grid = original["original_inference_steps"]
        found = [Entry(FEW_STEP, each, None, grid, "") for each in steps if FEW_STEP in chosen]
    else:
        found = [
            Entry(name, each, float(w), original_steps, "" if name == "ddim" else spaced)
            for w in ws for name in chosen if name != FEW_STEP for each in steps
        ]  # fmt: skip
    for entry in found:
        most = entry.original_steps if entry.sampler in ("ddim", FEW_STEP) else 999
        if not 1 <= entry.steps <= most:
            raise UserError(
                f"--steps {entry.steps}: {entry.sampler} has {most} times to choose from"
            )
        if entry.sampler not in ("ddim", FEW_STEP):
            spacing.from_config(_scheduler(model, entry))
    return found


def _scheduler(model: pretrained.Pretrained, entry: Entry) -> dict:
    """The model's scheduler config, with the entry's times."""
    spaced = {"timestep_spacing": entry.spacing} if entry.spacing else {}
    return {**model.scheduler, **spaced, "original_inference_steps": entry.original_steps}


def check_known(chosen: Sequence[str]) -> None:
    """UserError for a sampler that there is not."""
    for each in chosen:
        if each not in KNOWN:
            raise UserError(f"--samplers {each} is not known; there are {', '.join(KNOWN)}")


def check(chosen: Sequence[str], are_students: Sequence[bool], names: Sequence[str]) -> None:
    """UserError for a model or a sampler without the other."""
    for each in chosen:
        if (each == FEW_STEP) not in are_students:
            kind = "few-step students" if each == FEW_STEP else "models that are no students"
            raise UserError(f"--samplers {each} is for {kind}, and {', '.join(names)} is none")
    for name, is_student in zip(names, are_students, strict=True):
        if not any((each == FEW_STEP) == is_student for each in chosen):
            fitting = FEW_STEP if is_student else ", ".join(sampler.GUIDED)
            raise UserError(
                f"--samplers {', '.join(chosen)}: {name} is made for {fitting}; add one of them"
            )


def title(entry: Entry) -> str:
    """What a picture calls it: "ddim 50, w 8" or "4 steps"."""
    if entry.sampler == FEW_STEP:
        return f"{entry.steps} step{'s' * (entry.steps > 1)}"
    return f"{entry.sampler} {entry.steps}, w {entry.w:g}"


def network_calls(entry: Entry) -> int:
    """UNet evaluations for an image; guidance makes two of each."""
    if entry.sampler == FEW_STEP:
        return entry.steps
    return sampler.guided(entry.sampler).network_calls(entry.steps)


def num_noises(entry: Entry) -> int:
    """How many noises an image takes: a starting one, and the consistency sampler's fresh ones."""
    return entry.steps if entry.sampler == FEW_STEP else 1


def build(
    model: pretrained.Pretrained, entry: Entry, dtype: str, attention: str
) -> Callable[..., Image]:
    """(unet_params, vae_params, text, null_text, noise [S, B, h, w, C]) -> images in [0, 1].

    Of the model, configs alone count.
    """
    computed, attend = pipeline.dtype(dtype), kernels.by_name(attention, apart.on_own_examples)
    shared = (
        pipeline.decode(model.vae.config, computed),
        schedule.from_config(model.scheduler),
        parameterization.prediction_from_config(model.scheduler),
    )
    if entry.sampler == FEW_STEP:
        student = pipeline.student(model.unet.config, computed, attend=attend)
        few_step = pipeline.few_step(student, *shared, entry.steps, entry.original_steps)

        def draw(unet, vae, text, null_text, noise):
            del null_text
            return few_step(unet, vae, text, noise)

        return draw
    teacher = pipeline.teacher(model.unet.config, computed, attend)
    guided = pipeline.guided(
        entry.sampler, teacher, *shared, _scheduler(model, entry), entry.steps, entry.w
    )

    def draw_guided(unet, vae, text, null_text, noise):
        return guided(unet, vae, text, null_text, noise[0])

    return draw_guided
