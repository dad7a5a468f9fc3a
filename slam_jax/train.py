"""Wires teacher, data, loss and devices together, and runs the loop."""

import functools
from functools import partial
from pathlib import Path

import jax
import numpy as np

from slam_jax import command, experiment, loop, pipeline, program, run_report
from slam_jax.data import text_inputs
from slam_jax.distill import state
from slam_jax.errors import UserError
from slam_jax.evaluation import final
from slam_jax.runtime import bucket, checkpoint, folder, hosts, log, mesh, weights_and_biases
from slam_jax.settings import FREE, Settings, as_dict
from slam_jax.weights import lora as lora_file
from slam_jax.weights import pretrained, translate
from slam_jax.weights import student as student_folder


def train(settings: Settings, where: bucket.Mirror) -> None:
    """Trains until settings.num_steps, from the last checkpoint if there is one."""
    workdir = where.local
    # What a user may have got wrong comes first, before any work on a device.
    folder.check_writable(workdir)
    done = _steps_done(settings, where)
    mesh.check_rules(**settings.mesh._asdict())
    weights_and_biases.check(settings.log.wandb_project)
    if settings.eval.judge:
        final.check(settings)
    found = experiment.teacher(settings)
    tokens = text_inputs.read(found.tokenizer, found.tokenizer_2)
    examples = experiment.examples(settings, found, tokens)
    parts = program.parts(settings, found)
    hosts.check_shared(where.checkpoints.parent)
    devices = mesh.make(settings.mesh.axes)
    mesh.check_batch(settings.batch_size, mesh.num_batch_shards(devices), settings.accumulate)
    dataset = experiment.dataset(settings, examples, hosts.part())
    built = program.build(settings, parts, devices)
    if hosts.is_first():
        folder.start(workdir, as_dict(settings))

    with (
        log.bar(done, settings.num_steps) as progress,
        weights_and_biases.opened(
            settings.log.wandb_project, workdir, as_dict(settings), partial(log.say, progress)
        ) as track,
    ):
        with log.phase(progress, "loading"):
            train_key, samples_key = _keys(settings.seed, built.replicated)
            place = mesh.placer(devices, settings.mesh.rules)
            at_rest = pipeline.at_rest(pipeline.dtype(settings.teacher.dtype))
            teacher = pretrained.load(found, place=lambda path, x: place(path, at_rest(path, x)))
            frozen = _frozen(settings, teacher, tokens, built.replicated)
            draw = _drawer(settings, teacher, frozen, tokens, parts, built, samples_key)
            checkpoints = checkpoint.manager(
                where.checkpoints, settings.checkpoint.keep, settings.checkpoint.keep_every
            )

        put = partial(mesh.put_batch, accumulate=settings.accumulate, mesh=devices)
        train_step = built.step
        if done < settings.num_steps:
            with log.phase(progress, "compiling the step"):
                batch = put(dataset[done].arrays)
                train_step = built.lower(built.like, frozen, batch, train_key).compile()

        def restored(saved: int) -> state.TrainState:
            if saved:
                return checkpoint.restore(checkpoints, saved, built.like)
            unread = {"student": parts.student.params}
            params = translate.load(unread, dtype=np.float32, place=place)["student"]
            return jax.jit(built.first, out_shardings=built.layout)(params)

        with checkpoint.closing(checkpoints, partial(log.say, progress)):
            run = loop.Run(
                settings, workdir, dataset,
                step=lambda now, arrays: train_step(now, frozen, put(arrays), train_key),
                total=mesh.total(devices), draw=draw, checkpoints=checkpoints, push=where.push,
                track=track, progress=progress,
            )  # fmt: skip
            now = loop.to_the_end(run, restored, done)

        with log.phase(progress, "writing the student"):
            # The target, not the student: the average over steps is the better model.
            unet = parts.student._replace(params=mesh.gather(now.target, devices))
            if not hosts.is_first():
                return
            student = _write_student(settings, workdir, found, unet)
            where.push()
        with log.phase(progress, "evaluating"):
            table = final.report(workdir, found, student, settings)
            run_report.write(workdir)
    print(table.replace(str(workdir), where.name))


def _steps_done(settings: Settings, where: bucket.Mirror) -> int:
    """The step to go on from; 0 for a new run. UserError if the settings do not fit the run's."""
    if checkpoint.latest(where.checkpoints) is not None:
        folder.check_same(where.local, as_dict(settings), FREE)
    # Before the log is opened, which then goes on from the step that is found.
    done = checkpoint.newest(where.checkpoints, command.warn) or 0
    if done > settings.num_steps:
        raise UserError(
            f"{where.name} has been trained for {done} steps, more than num_steps "
            f"{settings.num_steps}; raise it or choose another --workdir"
        )
    return done


def _keys(seed: int, everywhere) -> tuple[jax.Array, jax.Array]:
    """The keys of training and of the sample grids."""
    make = jax.jit(lambda: jax.random.split(jax.random.key(seed)), out_shardings=everywhere)
    return tuple(make())


def _frozen(
    settings: Settings, teacher: pretrained.Pretrained, tokens: text_inputs.Tokenizers, everywhere
) -> state.Frozen:
    empty = jax.device_put(tokens.encode([""], experiment.image_size(settings)), everywhere)
    encode = pipeline.encode_null_text(teacher, pipeline.dtype(settings.teacher.dtype))
    text_encoder = pipeline.text_params(teacher)
    # SDXL's zeros depend on no argument, so that nothing else would tell where they lie.
    null_text = jax.jit(encode, out_shardings=everywhere)(text_encoder, empty)
    return state.Frozen(teacher.unet.params, teacher.vae.params, text_encoder, null_text)


def _drawer(
    settings: Settings, teacher, frozen, tokens, parts: program.Parts, built: program.Program,
    samples_key,
):  # fmt: skip
    """target parameters -> images [prompts, 2, H, W, 3], the teacher's and the student's.

    All hosts draw all of them: what each needs lies on every device.
    """
    everywhere = partial(jax.jit, out_shardings=built.replicated)
    num_steps = settings.eval.student_steps
    text = everywhere(parts.nets.encode_text)(frozen.text_encoder, _prompts(settings, tokens))
    latent_shape = pipeline.latent_shape(teacher, settings.data.size)
    shape = (num_steps, len(settings.eval.prompts), *latent_shape)
    noise = everywhere(lambda key: jax.random.normal(key, shape))(samples_key)

    decode = pipeline.decode(teacher.vae.config, pipeline.dtype(settings.teacher.dtype))
    shared = (decode, parts.method.schedule, parts.method.prediction)
    starts, teacher_steps = settings.distill.num_subpaths, settings.eval.teacher_steps
    few_step = pipeline.few_step(parts.nets.student, *shared, num_steps, starts)
    ddim = pipeline.ddim(parts.nets.teacher, *shared, teacher_steps, starts, parts.method.w)

    @everywhere
    def teacher_images(teacher_params, vae, text, null_text, noise) -> jax.Array:
        return ddim(teacher_params, vae, text, null_text, noise[0])

    @everywhere
    def student_images(teacher_params, target, vae, text, noise) -> jax.Array:
        return few_step(parts.nets.student_params(teacher_params, target), vae, text, noise)

    @functools.cache
    def teacher_drawn() -> np.ndarray:
        drawn = teacher_images(frozen.teacher, frozen.vae, text, frozen.null_text, noise)
        return jax.device_get(drawn)

    def draw(target) -> np.ndarray:
        drawn = jax.device_get(student_images(frozen.teacher, target, frozen.vae, text, noise))
        return np.stack([teacher_drawn(), drawn], axis=1)

    return draw


def _prompts(settings: Settings, tokens: text_inputs.Tokenizers) -> dict[str, np.ndarray]:
    """The sample grids', encoded; says what does not fit."""
    prompts = list(settings.eval.prompts)
    if hosts.is_first():
        command.warn_of_cut(prompts, tokens.cut(prompts), tokens.first.length)
    return tokens.encode(prompts, experiment.image_size(settings))


def _write_student(settings: Settings, workdir: Path, teacher, trained) -> pretrained.Pretrained:
    """Writes and returns student/, for a LoRA as a plain UNet; and the LoRA itself beside it."""
    unet, additions = experiment.shipped(settings, teacher.unet, trained)
    if additions is not None:
        lora_file.write(workdir / "student_lora", additions)
    num_subpaths = settings.distill.num_subpaths
    student = student_folder.student(teacher, unet, original_inference_steps=num_subpaths)
    pretrained.write(workdir / "student", student)
    return student
