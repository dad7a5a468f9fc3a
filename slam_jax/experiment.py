"""What the settings stand for: teacher, data, networks and loss of an experiment."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from flax import traverse_util

from slam_jax import pipeline, students
from slam_jax.data import (
    batches,
    cache,
    filters,
    image,
    pictures,
    shapes2d,
    sources,
    text_inputs,
)  # fmt: skip
from slam_jax.diffusion import parameterization, schedule, solver, subpath
from slam_jax.distill import gamma, loss, step
from slam_jax.errors import UserError
from slam_jax.nets import kernels, lora
from slam_jax.settings import Distill, Settings
from slam_jax.weights import fingerprint, hub, pretrained, translate
from slam_jax.weights import lora as lora_file

# Names in a config -> what they stand for; those with numbers after the name are called with them.
GAMMA_LAWS = {
    "uniform": lambda: gamma.uniform,
    "ones": lambda: gamma.ones,
    "mixture": gamma.mixture,
    "annealed": gamma.annealed,
}
DISTANCES = {"l2": lambda: loss.squared, "huber": loss.pseudo_huber}
POINTS = {
    "markov": subpath.told_t(subpath.sigma_markov),
    "ddim": subpath.told_t(subpath.sigma_ddim),
    "fixed": subpath.told_t(subpath.sigma_fixed),
    "matched": subpath.matched,
}
TIMES = {
    "grid": solver.start_grid,
    "all": lambda num_subpaths, num_timesteps: solver.all_times(num_timesteps),
}
COND_PROJ = {"random": students.random_cond_proj, "zero": students.zero_cond_proj}
CROPS = (("center",), ("random",), ("center", "flip"), ("random", "flip"))


def teacher(settings: Settings) -> pretrained.Pretrained:
    """The model to distil, checked, its parameters still unread: for pretrained.load."""
    found = hub.find(
        settings.teacher.model, settings.teacher.revision, settings.teacher.variant,
        settings.teacher.config,
    )  # fmt: skip
    if students.is_student(found):
        raise UserError(
            f"config.teacher.model {settings.teacher.model} is a few-step student already; give "
            "the model that it was distilled from (a student to go on from is student.start)"
        )
    return found


def _choose(choices: dict[str, Any], key: str, name: str) -> Any:
    if not isinstance(name, str) or name not in choices:
        raise UserError(f"config.{key} {name!r} is not known; there are {', '.join(choices)}")
    return choices[name]


def _build(choices: dict[str, Any], key: str, call: tuple) -> Any:
    """The choice of that name, called with the numbers that follow it."""
    name, *numbers = call or ("",)
    make = _choose(choices, key, name)
    wanted = tuple(inspect.signature(make).parameters)
    if len(numbers) != len(wanted) or not all(isinstance(n, (int, float)) for n in numbers):
        raise UserError(f"config.{key} {call} must be {(name, *wanted)} with numbers")
    return make(*map(float, numbers))


def examples(
    settings: Settings, teacher: pretrained.Pretrained, tokens: text_inputs.Tokenizers
) -> pictures.Pictures | cache.Cache:
    """What batches are made of: captioned pictures, or a cache that was made for this teacher."""
    data = settings.data
    if cache.is_cache(Path(data.source)):
        found = cache.find(Path(data.source))
        cache.check(
            found,
            size=data.size,
            vae=fingerprint.of_params(teacher.vae.params),
            tokenizers=text_inputs.fingerprints(tokens),
        )
        return found
    if data.crop not in CROPS:
        raise UserError(f"config.data.crop {data.crop} must be one of {', '.join(map(str, CROPS))}")
    crop = image.Crop(data.size, random="random" in data.crop, flip="flip" in data.crop)
    wanted = filters.parse(data.filters)
    if data.source == "shapes2d":
        source = shapes2d.Shapes2D(data.size, data.num_images, settings.seed + 1)
    else:
        source = sources.find(data.source, data.index_dir)
    return pictures.Pictures(source, wanted, crop, tokens)


def dataset(settings: Settings, found, part: tuple[int, int]) -> grain.MapDataset:
    """Batch n of the run is dataset[n], `found` being its examples; part as in batches.batches."""
    return batches.batches(
        found, num_examples=settings.data.num_images, batch_size=settings.batch_size,
        seed=settings.seed, part=part,
    )  # fmt: skip


def student(settings: Settings, teacher: pretrained.Component) -> pretrained.Component:
    """The student's config, and what is trained of its parameters: all, or a LoRA.

    Those of student.start are still unread: for translate.load.
    """
    cond_proj = _choose(COND_PROJ, "student.cond_proj", settings.student.cond_proj)
    rng, chosen = np.random.default_rng(settings.seed), settings.student
    student = students.student_of(teacher, settings.student.gamma_dim, cond_proj, rng)
    if chosen.start:
        if chosen.lora.rank:
            raise UserError(
                "config.student.start is for a full student; set student.lora.rank to 0"
            )
        return _started(chosen.start, student)
    if not chosen.lora.rank:
        return student
    return students.lora_of(teacher, student, chosen.lora.targets, chosen.lora.rank, rng)


def _started(name: str, student: pretrained.Component) -> pretrained.Component:
    """The student with the parameters of that model's UNet, its gamma layer too if it has one."""
    params = traverse_util.flatten_dict(student.params)
    start = traverse_util.flatten_dict(hub.find(name, "", "", "").unet.params)
    for path in params.keys() | start.keys():
        shapes = [tree[path].shape if path in tree else None for tree in (params, start)]
        if shapes[0] != shapes[1] and (path[-2] != "cond_proj" or shapes[1] is not None):
            raise UserError(
                f"config.student.start {name}: {'.'.join(path)} is {shapes[1]} there and "
                f"{shapes[0]} in this student; start from one of the same architecture"
            )
    return student._replace(params=traverse_util.unflatten_dict(params | start))


def shipped(
    settings: Settings, teacher: pretrained.Component, trained: pretrained.Component
) -> tuple[pretrained.Component, dict | None]:
    """The UNet to ship for what was trained; and, of a LoRA run, the additions in it."""
    if not settings.student.lora.rank:
        return trained, None
    additions = lora_file.baked(trained.params, lora_scale(settings))
    base = teacher._replace(params=translate.load(teacher.params, dtype=np.float32))
    return lora_file.merged(base, additions), additions


def nets(
    settings: Settings, teacher: pretrained.Pretrained, student_config: dict,
    on_own_examples: Callable[[Callable], Callable],
) -> step.Nets:  # fmt: skip
    """The networks in their dtypes; UserError if the images do not suit the VAE.

    on_own_examples: as kernels.by_name takes it.
    """
    frozen_dtype = pipeline.dtype(settings.teacher.dtype)
    pipeline.latent_shape(teacher, settings.data.size)
    _choose(kernels.BY_NAME, "attention", settings.attention)
    attend = kernels.by_name(settings.attention, on_own_examples)
    student_net, student_params = pipeline.student, step.all_trained
    if settings.student.lora.rank:
        student_net = pipeline.lora_student
        student_params = partial(lora.merge, scale=lora_scale(settings))
    return step.Nets(
        student=student_net(
            student_config,
            pipeline.dtype(settings.student.dtype),
            settings.student.remat,
            attend,
        ),
        student_params=student_params,
        teacher=pipeline.teacher(teacher.unet.config, frozen_dtype, attend),
        encode_image=pipeline.encode_image(teacher.vae.config, frozen_dtype),
        encode_text=pipeline.encode_text(teacher, frozen_dtype),
    )


def method(distill: Distill, scheduler: dict) -> loss.Method:
    """The loss, on the schedule of the teacher's scheduler_config.json."""
    levels = schedule.from_config(scheduler)
    times = _choose(TIMES, "distill.times", distill.times)
    return loss.checked(
        loss.Method(
            schedule=levels,
            prediction=parameterization.prediction_from_config(scheduler),
            times=times(distill.num_subpaths, levels.alpha.size),
            length=distill.length,
            stride=distill.stride,
            w=distill.w,
            point=_choose(POINTS, "distill.sigma", distill.sigma),
            distance=_build(DISTANCES, "distill.distance", distill.distance),
            gamma_law=_build(GAMMA_LAWS, "distill.gamma", distill.gamma),
        )
    )


def lora_scale(settings: Settings) -> float:
    """What the product of a LoRA's matrices is multiplied by."""
    return settings.student.lora.alpha / settings.student.lora.rank


def image_size(settings: Settings) -> tuple[int, int]:
    """Height and width of the training images."""
    return settings.data.size, settings.data.size
