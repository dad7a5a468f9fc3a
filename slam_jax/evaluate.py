"""The comparison that a run ends with: teacher and student at the same noise and prompts."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slam_jax import experiment, pipeline
from slam_jax.data import shapes2d, text_inputs
from slam_jax.diffusion import parameterization, schedule
from slam_jax.errors import UserError
from slam_jax.metrics import fid, prompt_accuracy
from slam_jax.nets import classifier
from slam_jax.runtime import folder, images
from slam_jax.settings import Settings
from slam_jax.weights import pretrained, templates, tensorfile, translate

TEACHER_STEPS = (50, 4, 2, 1)
STUDENT_STEPS = (4, 2, 1)
_BATCH_SIZE = 128  # images drawn at a time
_SHOWN = 8  # prompts in final.png
_REFERENCE = 4000  # real drawings behind the Frechet distance


class Judge(NamedTuple):
    """The classifier of the embedded dataset, and what it says of real drawings."""

    apply: Callable  # (images in [0, 1]) -> (features, logits)
    reference: fid.Gaussian


class Row(NamedTuple):
    """One line of the table."""

    name: str
    network_calls: int  # per image, guidance counted twice
    frechet_distance: float
    prompt_accuracy: float


def judge_params(settings: Settings) -> dict:
    """The classifier's parameters; UserError if eval.judge holds none for these images."""
    if settings.data.source != "shapes2d":
        raise UserError(f"eval.judge knows shapes2d, not {settings.data.source}; set it to ''")
    file = Path(settings.eval.judge) / "model.safetensors"
    shapes = templates.of_classifier(shapes2d.LABEL_SIZES, settings.data.size)
    return translate.to_params(tensorfile.read(file), shapes, str(file), dtype=np.float32)


def make_judge(params: dict, size: int, seed: int) -> Judge:
    """The classifier and its features of real drawings of that seed."""
    net = classifier.ShapesClassifier(shapes2d.LABEL_SIZES)
    params = jax.device_put(params)

    @jax.jit
    def apply(pixels):
        # As a picture file would hold them: 8 bits.
        return net.apply({"params": params}, jnp.round(pixels * 255.0) / 127.5 - 1.0)

    source = shapes2d.Shapes2D(size, _REFERENCE, seed)
    drawings = np.stack([source[i].image for i in range(_REFERENCE)])
    features, _ = apply(jax.device_put(drawings.astype(np.float32) / 255.0))
    return Judge(apply, fid.fit(jax.device_get(features)))


def report(
    workdir: Path,
    teacher: pretrained.Pretrained,
    student: pretrained.Pretrained,
    settings: Settings,
) -> str:
    """Writes samples/final.png and results.json; returns the table as text.

    teacher: as pretrained.find has it, its parameters unread; of the student the UNet counts.

    Without eval.judge, the name of a classifier's folder, there is nothing to measure with.
    """
    if not settings.eval.judge:
        return f"the student is in {workdir / 'student'}"
    teacher = pretrained.load(teacher)
    # Other drawings than the training's, of the same 9,216 captions.
    size, seed = settings.data.size, settings.seed + 1
    judge = make_judge(judge_params(settings), size, seed + 2)
    held_out = shapes2d.Shapes2D(size, settings.eval.num_images, seed + 1)
    captions = [held_out.scene(i)[0].caption() for i in range(len(held_out))]
    labels = np.stack([shapes2d.parse(caption).labels() for caption in captions])
    samplers = _samplers(teacher, student, settings)
    text, null_text, noise = _inputs(teacher, captions, settings)

    rows, shown = [], []
    for name, calls, sample in samplers:
        drawn = _in_batches(partial(sample, null_text), text, noise, _BATCH_SIZE)
        features, logits = jax.device_get(judge.apply(drawn))
        distance = fid.frechet_distance(fid.fit(features), judge.reference)
        rows.append(Row(name, calls, distance, prompt_accuracy.prompt_accuracy(logits, labels)))
        shown.append(jax.device_get(drawn[:_SHOWN]))

    picture = images.labelled_grid(np.stack(shown), [row.name for row in rows], captions[:_SHOWN])
    folder.write_atomic(workdir / "samples" / "final.png", images.png(picture))
    results = [row._asdict() for row in rows]
    folder.write_atomic(workdir / "results.json", json.dumps(results, indent=2).encode())
    return _table(rows, len(captions))


def _samplers(teacher, student, settings: Settings) -> Iterator[tuple[str, int, Callable]]:
    """(name, network calls, (null_text, text, noise) -> images in [0, 1]) for each row."""
    levels = schedule.from_config(teacher.scheduler)
    prediction = parameterization.prediction_from_config(teacher.scheduler)
    frozen_dtype = pipeline.dtype(settings.teacher.dtype)
    decode = pipeline.decode(teacher.vae.config, frozen_dtype)
    shared = (decode, levels, prediction)
    vae_params = _here(teacher.vae.params)

    net, params = pipeline.teacher(teacher.unet.config, frozen_dtype), teacher.unet.params
    params = _here(params)
    for steps in TEACHER_STEPS:
        ddim = pipeline.ddim(net, *shared, steps, settings.distill.num_subpaths, settings.distill.w)
        run = partial(_teacher_rows, jax.jit(ddim), params, vae_params)
        yield f"teacher, DDIM {steps}", 2 * steps, run

    student_dtype = pipeline.dtype(settings.student.dtype)
    net, params = pipeline.student(student.unet.config, student_dtype, False), student.unet.params
    params = _here(params)
    for steps in STUDENT_STEPS:
        few_step = pipeline.few_step(net, *shared, steps, settings.distill.num_subpaths)
        run = partial(_student_rows, jax.jit(few_step), params, vae_params, steps)
        yield f"student, {steps} step{'s' * (steps > 1)}", steps, run


def _here(params: Any) -> Any:
    """The parameters whole on one device, wherever training spread them."""
    return jax.device_put(params, jax.local_devices()[0])


def _teacher_rows(ddim, params, vae_params, null_text, text, noise):
    return ddim(params, vae_params, text, null_text, noise[0])


def _student_rows(few_step, params, vae_params, steps, null_text, text, noise):
    del null_text
    return few_step(params, vae_params, text, noise[:steps])


def _inputs(teacher, captions: list[str], settings: Settings) -> tuple[Any, Any, Any]:
    """Text of the captions and of the empty prompt, and noise [steps, N, h, w, C] for all rows."""
    tokens = text_inputs.read(teacher.tokenizer, teacher.tokenizer_2)
    image_size = experiment.image_size(settings)
    params, captions_encoded, empty = _here(
        (
            pipeline.text_params(teacher),
            tokens.encode(captions, image_size),
            tokens.encode([""], image_size),
        )
    )
    dtype = pipeline.dtype(settings.teacher.dtype)
    text = jax.jit(pipeline.encode_text(teacher, dtype))(params, captions_encoded)
    null_text = jax.jit(pipeline.encode_null_text(teacher, dtype))(params, empty)
    shape = pipeline.latent_shape(teacher, settings.data.size)
    key = jax.random.key(settings.seed + 1)
    noise = jax.random.normal(key, (max(STUDENT_STEPS), len(captions), *shape))
    return text, null_text, noise


def _in_batches(sample: Callable, text, noise, batch_size: int) -> jax.Array:
    """The samples of all prompts, made batch_size at a time."""

    def draw(start: int) -> jax.Array:
        chosen = slice(start, start + batch_size)
        return sample(jax.tree.map(lambda rows: rows[chosen], text), noise[:, chosen])

    return jnp.concatenate([draw(start) for start in range(0, noise.shape[1], batch_size)])


def _table(rows: list[Row], num_prompts: int) -> str:
    lines = [
        f"{num_prompts} prompts, the same noise in every row",
        f"{'':18} {'UNet calls':>10} {'Frechet':>9} {'prompt accuracy':>16}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:18} {row.network_calls:>10} {row.frechet_distance:>9.3f} "
            f"{row.prompt_accuracy:>16.1%}"
        )
    return "\n".join(lines)
