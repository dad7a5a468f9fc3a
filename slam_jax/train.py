"""Wires teacher, data, loss and devices together, and runs the loop."""

import contextlib
import functools
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from slam_jax import command, evaluate, experiment, pipeline
from slam_jax.data import batches, tally, text_inputs
from slam_jax.distill import optimizer, state, step
from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint, folder, hosts, images, log, mesh
from slam_jax.settings import FREE, Settings, as_dict
from slam_jax.weights import lora as lora_file
from slam_jax.weights import pretrained, translate
from slam_jax.weights import student as student_folder

_NUM_PREFETCH = 4  # batches held ready


def train(settings: Settings, workdir: Path) -> None:
    """Trains until settings.num_steps, from the last checkpoint in workdir if there is one."""
    # What a user may have got wrong comes first, before any work on a device.
    folder.check_writable(workdir)
    done = _steps_done(settings, workdir)
    mesh.check_rules(**settings.mesh._asdict())
    if settings.eval.judge:
        evaluate.judge_params(settings)
    found = experiment.teacher(settings)
    student = experiment.student(settings, found.unet)
    tokens = text_inputs.read(found.tokenizer, found.tokenizer_2)
    examples = experiment.examples(settings, found, tokens)
    nets = experiment.nets(settings, found, student.config)
    adamw = optimizer.adamw(**settings.optimizer._asdict())
    method = experiment.method(settings.distill, found.scheduler)
    devices = mesh.make(settings.mesh.axes)
    mesh.check_batch(settings.batch_size, mesh.num_batch_shards(devices), settings.accumulate)
    dataset = experiment.dataset(settings, examples, hosts.part())
    folder.start(workdir, as_dict(settings))

    with log.bar(done, settings.num_steps) as progress:
        with log.phase(progress, "loading"):
            everywhere = mesh.replicated(devices)
            train_key, samples_key = _keys(settings.seed, everywhere)
            place = mesh.placer(devices, settings.mesh.rules)
            at_rest = pipeline.at_rest(pipeline.dtype(settings.teacher.dtype))
            teacher = pretrained.load(found, place=lambda path, x: place(path, at_rest(path, x)))
            frozen = _frozen(settings, teacher, tokens, everywhere)
            draw = _drawer(settings, teacher, frozen, tokens, nets, method, samples_key)

            first = partial(state.init, optimizer=adamw)
            like = jax.eval_shape(first, _shapes(student.params))
            layout = mesh.shardings(like, devices, settings.mesh.rules)
            checkpoints = checkpoint.manager(workdir / "checkpoints", settings.checkpoint.keep)
            if done:
                now = checkpoint.restore(checkpoints, done, like, layout)
            else:
                params = translate.load({"student": student.params}, dtype=np.float32, place=place)[
                    "student"
                ]
                now = jax.jit(first, out_shardings=layout)(params)

        steps = range(done + 1, settings.num_steps + 1)
        put = partial(mesh.put_batch, accumulate=settings.accumulate, mesh=devices)
        run = jax.jit(
            partial(
                step.train_step, nets=nets, method=method, optimizer=adamw,
                ema_rate=settings.ema_rate, num_steps=settings.num_steps,
            ),
            donate_argnums=0, out_shardings=(layout, everywhere),
        )  # fmt: skip
        if steps:
            with log.phase(progress, "compiling the step"):
                run = run.lower(now, frozen, put(dataset[done].arrays), train_key).compile()

        feed = batches.iterate(
            dataset, done,
            num_threads=settings.data.num_threads, num_workers=settings.data.num_workers,
            num_prefetch=_NUM_PREFETCH,
        )  # fmt: skip
        with (
            log.started(workdir, done, progress) as journal,
            contextlib.closing(feed),
            contextlib.closing(checkpoints),
            jax.transfer_guard("disallow"),
        ):
            unseen, counted = [], tally.EMPTY
            for number in steps:
                try:
                    batch = next(feed)
                    counted = _count(journal, settings, number, batch, counted)
                except UserError:
                    # The data's fault: what has been learnt until here is kept.
                    while unseen:
                        _record(journal, settings, *unseen.pop(0))
                    if number - 1 > done and number - 1 not in checkpoints.all_steps():
                        checkpoint.save(checkpoints, number - 1, now)
                    raise
                now, metrics = run(now, frozen, put(batch.arrays), train_key)
                unseen.append((number, metrics, tally.summary(batch.dropped, batch.num_cut)))
                last = number == settings.num_steps
                draws = last or number % settings.eval.every_steps == 0
                saves = last or number % settings.checkpoint.every_steps == 0
                # The metrics of a step are fetched when the next one is under way, except that
                # no state is used or saved before its own are known to be finite.
                while len(unseen) > (0 if draws or saves else 1):
                    _record(journal, settings, *unseen.pop(0))
                if draws:
                    with log.phase(progress, "drawing samples"):
                        _write_samples(journal, workdir, number, draw(now.target))
                # After metrics and samples: whatever precedes a checkpoint is never missing.
                if saves:
                    checkpoint.save(checkpoints, number, now)

        with log.phase(progress, "writing the student"):
            # The target, not the student: the average over steps is the better model.
            unet = student._replace(params=mesh.gather(now.target, devices))
            student = _write_student(settings, workdir, found, unet)
        with log.phase(progress, "evaluating"):
            table = evaluate.report(workdir, found, student, settings)
    print(table)


def _steps_done(settings: Settings, workdir: Path) -> int:
    """The step to go on from; 0 for a new run. UserError if the settings do not fit the run's."""
    done = checkpoint.latest(workdir / "checkpoints")
    if done is None:
        return 0
    folder.check_same(workdir, as_dict(settings), FREE)
    if done > settings.num_steps:
        raise UserError(
            f"{workdir} has been trained for {done} steps, more than num_steps "
            f"{settings.num_steps}; raise it or choose another --workdir"
        )
    return done


def _keys(seed: int, everywhere) -> tuple[jax.Array, jax.Array]:
    """The keys of training and of the sample grids."""
    make = jax.jit(lambda: jax.random.split(jax.random.key(seed)), out_shardings=everywhere)
    return tuple(make())


def _shapes(params: Mapping) -> Mapping:
    """What jax.eval_shape takes for parameters, read or unread, that will be float32."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), params)


def _frozen(
    settings: Settings, teacher: pretrained.Pretrained, tokens: text_inputs.Tokenizers, everywhere
) -> state.Frozen:
    empty = jax.device_put(tokens.encode([""], experiment.image_size(settings)), everywhere)
    encode = pipeline.encode_null_text(teacher, pipeline.dtype(settings.teacher.dtype))
    text_encoder = pipeline.text_params(teacher)
    # SDXL's zeros depend on no argument, so that nothing else would tell where they lie.
    null_text = jax.jit(encode, out_shardings=everywhere)(text_encoder, empty)
    return state.Frozen(teacher.unet.params, teacher.vae.params, text_encoder, null_text)


def _drawer(settings: Settings, teacher, frozen, tokens, nets, method, samples_key):
    """target parameters -> images [prompts, 2, H, W, 3], the teacher's and the student's."""
    prompts, num_steps = list(settings.eval.prompts), settings.eval.student_steps
    command.warn_of_cut(prompts, tokens.cut(prompts), tokens.first.length)
    encoded = tokens.encode(prompts, experiment.image_size(settings))
    text = jax.jit(nets.encode_text)(frozen.text_encoder, encoded)
    shape = pipeline.latent_shape(teacher, settings.data.size)
    noise = jax.random.normal(samples_key, (num_steps, len(prompts), *shape))
    x_T = noise[0]

    decode = pipeline.decode(teacher.vae.config, pipeline.dtype(settings.teacher.dtype))
    shared = (decode, method.schedule, method.prediction)
    original_steps = settings.distill.num_subpaths
    few_step = pipeline.few_step(nets.student, *shared, num_steps, original_steps)
    ddim = jax.jit(
        pipeline.ddim(nets.teacher, *shared, settings.eval.teacher_steps, original_steps, method.w)
    )

    @functools.cache
    def teacher_images() -> np.ndarray:
        drawn = ddim(frozen.teacher, frozen.vae, text, frozen.null_text, x_T)
        return jax.device_get(drawn)

    @jax.jit
    def student_images(teacher_params, target, vae, text, noise) -> jax.Array:
        return few_step(nets.student_params(teacher_params, target), vae, text, noise)

    def draw(target) -> np.ndarray:
        drawn = jax.device_get(student_images(frozen.teacher, target, frozen.vae, text, noise))
        return np.stack([teacher_images(), drawn], axis=1)

    return draw


def _count(
    journal: log.Log, settings: Settings, number: int, batch: batches.Batch, counted: tally.Tally
) -> tally.Tally:
    """Lists the batch's bad samples; UserError if with them there are too many."""
    bad = [dropped._asdict() for dropped in batch.dropped if not dropped.filtered]
    log.bad_samples(journal, number, bad)
    counted = tally.add(counted, len(batch.arrays["input_ids"]), batch.dropped)
    tally.check(counted, settings.data.max_bad_fraction)
    return counted


def _record(
    journal: log.Log, settings: Settings, number: int, metrics: dict, counts: dict[str, int]
) -> None:
    """Fetches a step's metrics, shows them, and writes a line if one is due.

    counts: of the samples left out of its batch; a line has their sums since the one before.
    """
    journal.counts.update(counts)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise FloatingPointError(
                f"step {number}: {name} is {values[name]}; the last good checkpoint is kept: "
                "lower optimizer.learning_rate, or look at the data, and run again"
            )
    rate = log.advance(journal.progress, settings.batch_size, values["loss"])
    if number % settings.log.every_steps == 0:
        log.write(journal, number, {**values, "images_per_second": rate, **journal.counts})
        journal.counts.clear()


def _write_samples(journal: log.Log, workdir: Path, number: int, drawn: np.ndarray) -> None:
    pixels = images.grid(drawn)
    folder.write_atomic(workdir / "samples" / f"step_{number:06d}.png", images.png(pixels))
    log.picture(journal, number, "teacher and student", pixels)


def _write_student(settings: Settings, workdir: Path, teacher, trained) -> pretrained.Pretrained:
    """Writes and returns student/, for a LoRA as a plain UNet; and the LoRA itself beside it."""
    unet, additions = experiment.shipped(settings, teacher.unet, trained)
    if additions is not None:
        lora_file.write(workdir / "student_lora", additions)
    num_subpaths = settings.distill.num_subpaths
    student = student_folder.student(teacher, unet, original_inference_steps=num_subpaths)
    pretrained.write(workdir / "student", student)
    return student
