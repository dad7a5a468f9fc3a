"""Which samplers there are, for which models they are made, and what they cost."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.typing import DTypeLike

from slam_jax import pipeline, students
from slam_jax.diffusion import parameterization, schedule
from slam_jax.errors import UserError
from slam_jax.weights import pretrained

FEW_STEP = "few_step"
# Of models that are no students, and are guided; with the name that tables have.
GUIDED = {"ddim": "DDIM"}


class Entry(NamedTuple):
    """One way of drawing with a model."""

    sampler: str
    steps: int
    w: float | None  # None for students, whose guidance was fixed in training
    original_steps: int  # grid on which its times lie


def entries(
    model: pretrained.Pretrained, samplers: Sequence[str], steps: Sequence[int],
    ws: Sequence[float], original_steps: int,
) -> list[Entry]:  # fmt: skip
    """Every combination of those samplers that are made for the model."""
    if students.is_student(model):
        original = {"original_inference_steps": original_steps, **model.scheduler}
        grid = original["original_inference_steps"]
        found = [Entry(FEW_STEP, each, None, grid) for each in steps if FEW_STEP in samplers]
    else:
        chosen = [sampler for sampler in samplers if sampler != FEW_STEP]
        found = [
            Entry(sampler, each, w, original_steps)
            for w in ws for sampler in chosen for each in steps
        ]  # fmt: skip
    for entry in found:
        if not 1 <= entry.steps <= entry.original_steps:
            raise UserError(
                f"--steps {entry.steps}: there are {entry.original_steps} times to choose from"
            )
    return found


def check(samplers: Sequence[str], are_students: Sequence[bool], names: Sequence[str]) -> None:
    """UserError for a sampler that is not known, or a model or a sampler without the other."""
    known = (*GUIDED, FEW_STEP)
    for sampler in samplers:
        if sampler not in known:
            raise UserError(f"--samplers {sampler} is not known; there are {', '.join(known)}")
        if (sampler == FEW_STEP) not in are_students:
            kind = "few-step students" if sampler == FEW_STEP else "models that are no students"
            raise UserError(f"--samplers {sampler} is for {kind}, and {', '.join(names)} is none")
    for name, is_student in zip(names, are_students, strict=True):
        if not any((sampler == FEW_STEP) == is_student for sampler in samplers):
            fitting = FEW_STEP if is_student else ", ".join(GUIDED)
            raise UserError(
                f"--samplers {', '.join(samplers)}: {name} is made for {fitting}; add one of them"
            )


def title(entry: Entry) -> str:
    """What a table calls it: "DDIM 50, w 8" or "4 steps"."""
    if entry.sampler == FEW_STEP:
        return f"{entry.steps} step{'s' * (entry.steps > 1)}"
    return f"{GUIDED[entry.sampler]} {entry.steps}, w {entry.w:g}"


def network_calls(entry: Entry) -> int:
    """UNet evaluations for an image; guidance makes two of each."""
    return entry.steps if entry.sampler == FEW_STEP else 2 * entry.steps


def num_noises(entry: Entry) -> int:
    """How many noises an image takes: a starting one, and the consistency sampler's fresh ones."""
    return entry.steps if entry.sampler == FEW_STEP else 1


def build(model: pretrained.Pretrained, entry: Entry, dtype: DTypeLike) -> Callable:
    """(unet_params, vae_params, text, null_text, noise [S, B, h, w, C]) -> images in [0, 1]."""
    shared = (
        pipeline.decode(model.vae.config, dtype),
        schedule.from_config(model.scheduler),
        parameterization.prediction_from_config(model.scheduler),
        entry.steps, entry.original_steps,
    )  # fmt: skip
    if entry.sampler == FEW_STEP:
        few_step = pipeline.few_step(pipeline.student(model.unet.config, dtype, False), *shared)

        def draw(unet, vae, text, null_text, noise):
            del null_text
            return few_step(unet, vae, text, noise)

        return draw
    guided = pipeline.ddim(pipeline.teacher(model.unet.config, dtype), *shared, entry.w)

    def draw_guided(unet, vae, text, null_text, noise):
        return guided(unet, vae, text, null_text, noise[0])

    return draw_guided
