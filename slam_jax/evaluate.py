"""Models x samplers x steps x guidance, measured by one protocol: a table, JSON and a plot.

    python -m slam_jax.evaluate --protocol configs/eval/tiny.py --out runs/tiny_eval
    python -m slam_jax.evaluate --protocol configs/eval/coco2014_30k.py --out runs/coco \
        --model ORG/NAME --model runs/sd15/student --captions captions_val2014.json \
        --reference val2014
    python -m slam_jax.evaluate --protocol configs/eval/tiny.py --watch runs/tiny

Killed at any moment, the same command goes on where it was and ends with the same numbers. Several
hosts share the images; --out is then a folder that all of them see.
"""

import contextlib
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_flags

from slam_jax import command, experiment, pipeline, students, trained
from slam_jax.errors import UserError
from slam_jax.evaluation import (
    comparison,
    drawing,
    history,
    measure,
    prompts,
    reference,
    samplers,
    score,
    table,
)  # fmt: skip
from slam_jax.evaluation import protocol as protocols
from slam_jax.evaluation.comparison import Setup
from slam_jax.evaluation.drawing import Candidate
from slam_jax.evaluation.protocol import Comparison, Hashed, Protocol
from slam_jax.evaluation.reference import Reference
from slam_jax.evaluation.samplers import Entry
from slam_jax.runtime import bucket, checkpoint, folder, hosts, log, peers
from slam_jax.weights import hub, pretrained

_PROTOCOL = config_flags.DEFINE_config_file("protocol", None, "Python file with get_config().")
_MODEL = flags.DEFINE_multi_string(
    "model", [], "Model folder in diffusers' layout, here or gs://BUCKET/FOLDER, or ORG/NAME on "
    "the Hugging Face hub; may be repeated. Default: the protocol's.",
)  # fmt: skip
_SAMPLERS = flags.DEFINE_list(
    "samplers", None, f"Of {', '.join(samplers.KNOWN)}, the last for students."
)
_STEPS = flags.DEFINE_list("steps", None, "Such as 4,2,1.")
_W = flags.DEFINE_list(
    "w", None, "Guidance of models that are no students (guidance_scale - 1), such as 2,8."
)
_CAPTIONS = flags.DEFINE_string("captions", None, "File that the protocol's captions come from.")
_REFERENCE = flags.DEFINE_string(
    "reference", None, "Folder of real pictures, or statistics of them that this program has "
    "written; default: those in --out.",
)  # fmt: skip
_OUT = flags.DEFINE_string(
    "out", None, "Folder of the results; with --watch by default WORKDIR/evaluation."
)
_WATCH = flags.DEFINE_string(
    "watch", None, "WORKDIR of a training run: score its student at every checkpoint until the "
    "last one, and keep the best.",
)  # fmt: skip
_WATCH_ONCE = flags.DEFINE_bool("watch_once", False, "Score the checkpoints there are, and end.")
_KEEP_IMAGES = flags.DEFINE_bool("keep_images", False, "Keep every image as a PNG in --out.")
_HOSTS = command.hosts_flags()
_TIMEOUT_S = 600  # in which all hosts must have come
_POLL_S = 10.0  # between looks at a run's checkpoints


def main() -> None:
    protocol = _protocol()
    out = Path(_OUT.value or (f"{_WATCH.value}/evaluation" if _WATCH.value else ""))
    if not out.name:
        raise UserError("--out must be given (see --help)")
    hosts.start(*_HOSTS(), timeout_s=_TIMEOUT_S)
    folder.check_writable(out)
    hosts.check_shared(out)
    if _WATCH.value:
        _watch(protocol, out, bucket.reached("watch", _WATCH.value))
        return
    with contextlib.ExitStack() as stack:
        copies = [
            (name, stack.enter_context(bucket.copied("model", name))) for name in _models(protocol)
        ]
        _compare(protocol, out, copies)


def _protocol() -> Protocol:
    try:
        config = _PROTOCOL.value.to_dict()
    except (OSError, AttributeError) as error:
        raise UserError(f"--protocol: {command.one_line(error)}") from None
    protocol = protocols.from_config(config)
    score.check(protocol)
    return _asked(protocol)


def _models(protocol: Protocol) -> list[str]:
    """Those of the command line, or those of the protocol that are there."""
    if _MODEL.value:
        return _MODEL.value
    there = [name for name in protocol.comparison.models if Path(name).exists()]
    if not there:
        raise UserError("--model must be given: this protocol names none that is here")
    return there


def _compare(protocol: Protocol, out: Path, copies: Sequence[tuple[str, str]]) -> None:
    # What a user may have got wrong comes first, before any work on a device.
    inputs = _inputs(protocol, out)
    candidates = _candidates(protocol, copies)
    setup, real = _setup(protocol, out, inputs)
    _draw(setup, candidates)
    hosts.wait("drawn")
    if hosts.is_first():
        _write(setup, candidates, real)


class _Inputs(NamedTuple):
    """What the user gives beside models."""

    chosen: prompts.Chosen
    references: list[Path] | Path | None


def _inputs(protocol: Protocol, out: Path) -> _Inputs:
    chosen = prompts.choose(protocol.prompts, _path(_CAPTIONS.value))
    measure.check(protocol.features, protocol.clip, protocol.images.resize)
    given = _path(_REFERENCE.value)
    return _Inputs(chosen, reference.find(protocol.reference, protocol.images, given, out))


def _setup(protocol: Protocol, out: Path, inputs: _Inputs) -> tuple[Setup, Reference]:
    """What all rows share, on the devices; says what it is."""
    devices = Mesh(np.array(jax.local_devices()), ("data",))
    meters = measure.load(protocol.features, protocol.clip, protocol.images.resize, devices)
    batch_size = devices.size * protocol.comparison.batch_size
    real = reference.obtain(
        inputs.references, protocol, meters.features.fingerprint, meters.features_of, batch_size,
        out,
    )  # fmt: skip
    hashed = Hashed(inputs.chosen.sha256, meters.fingerprints(), real.identity)
    setup = Setup(
        out, protocol, protocols.digest(protocol, hashed), inputs.chosen, meters, devices,
        hosts.part(), _KEEP_IMAGES.value,
    )  # fmt: skip
    if hosts.is_first():
        _say_what_is_measured(setup, hashed, real)
    return setup, real


def _draw(setup: Setup, candidates: Sequence[Candidate]) -> None:
    with log.bar(0, comparison.num_calls(setup, candidates)) as progress:
        comparison.draw_all(setup, candidates, progress)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _candidates(protocol: Protocol, copies: Sequence[tuple[str, str]]) -> list[Candidate]:
    """Every model, found and checked, with what it is to draw."""
    models = [hub.find(path, "", "", "") for _, path in copies]
    kinds = [students.is_student(model) for model in models]
    names = [name for name, _ in copies]
    if _SAMPLERS.value is not None:
        samplers.check(_SAMPLERS.value, kinds, names)
    if _W.value is not None and all(kinds):
        raise UserError(f"--w {','.join(_W.value)}: students' guidance was fixed in training")
    for model in models:
        pipeline.latent_shape(model, protocol.images.size)
    found = []
    for name, model, is_student in zip(names, models, kinds, strict=True):
        entries = _entries(protocol.comparison, model, is_student)
        wanted = protocol.comparison
        found.append((name, model, wanted.dtype, wanted.attention, entries))
    return [drawing.candidate(*each) for each in found]


def _entries(wanted: Comparison, model: pretrained.Pretrained, is_student: bool) -> list[Entry]:
    return samplers.entries(
        model,
        (*wanted.teacher_samplers, samplers.FEW_STEP),
        wanted.student_steps if is_student else wanted.teacher_steps,
        wanted.w, wanted.original_steps, wanted.spacing,
    )  # fmt: skip


def _asked(protocol: Protocol) -> Protocol:
    """The protocol's own comparison, but for what the command line asks for."""
    comparison = protocol.comparison
    if _SAMPLERS.value is not None:
        samplers.check_known(_SAMPLERS.value)
        comparison = comparison._replace(teacher_samplers=tuple(_SAMPLERS.value))
    if _STEPS.value is not None:
        steps = _numbers("steps", _STEPS.value, int)
        comparison = comparison._replace(teacher_steps=steps, student_steps=steps)
    if _W.value is not None:
        comparison = comparison._replace(w=_numbers("w", _W.value, float))
    return protocol._replace(comparison=comparison)


def _numbers(flag: str, values: Sequence[str], kind: type) -> tuple:
    try:
        return tuple(kind(value) for value in values)
    except ValueError:
        raise UserError(f"--{flag} {','.join(values)} must be numbers, such as 4,2,1") from None


def _say_what_is_measured(setup: Setup, hashed: Hashed, real: Reference) -> None:
    count = len(setup.chosen.captions)
    print(
        f"protocol {_name()}, hash {setup.digest}: {count:,} captions, sha256 {hashed.prompts}; "
        f"references: {real.identity}; networks: {setup.meters.name()}"
    )
    if "fid" in setup.protocol.metrics and (warning := score.warning(real, count)):
        command.warn(warning)


def _name() -> str:
    """The protocol's, as its file is called."""
    return Path(flags.FLAGS["protocol"].config_filename).stem


def _write(setup: Setup, candidates: Sequence[Candidate], real: Reference) -> None:
    """The results, in --out and on stdout."""
    rows = comparison.rows(setup, candidates, real)
    protocol = table.Protocol(_name(), setup.digest)
    shown = table.markdown(rows, protocol)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    first = score.name(setup.protocol.metrics[0], setup.protocol)
    for name, content in {
        "results.json": table.as_json(rows, protocol, date).encode(),
        "table.md": shown.encode(),
        "quality.png": table.plot(rows, first, protocol),
        "samples.png": comparison.picture(setup, candidates),
    }.items():
        folder.write_atomic(setup.out / name, content)
    print(shown, end="")


def _watch(protocol: Protocol, out: Path, workdir: epath.Path) -> None:
    """Scores checkpoints as they come, oldest first."""
    if peers.known():
        raise UserError("--watch is for one process; start it on one host alone")
    run = trained.read_settings(workdir)
    teacher = experiment.teacher(run)
    pipeline.latent_shape(teacher, protocol.images.size)
    setup, real = _setup(protocol, out, _inputs(protocol, out))
    seen: set[int] = {line["step"] for line in history.read(out, setup.digest)}
    while True:
        for step in sorted({*checkpoint.steps(workdir / trained.CHECKPOINTS)} - seen):
            seen.add(step)
            try:
                student = trained.student(workdir, step, teacher, run)
            except UserError as error:
                command.warn(f"step {step} is left out: {error}")
                continue
            _score(setup, real, step, student)
        run = trained.read_settings(workdir)
        if _WATCH_ONCE.value or max(seen, default=0) >= run.num_steps:
            return
        time.sleep(_POLL_S)


def _score(setup: Setup, real: Reference, step: int, student: pretrained.Pretrained) -> None:
    """Adds the step's line, and keeps the student if it is the best."""
    wanted, metric = setup.protocol.comparison, setup.protocol.metrics[0]
    entries = _entries(wanted, student, is_student=True)
    candidates = [
        drawing.candidate(f"step {step}", student, wanted.dtype, wanted.attention, entries)
    ]
    _draw(setup, candidates)
    rows = comparison.rows(setup, candidates, real)
    new = history.line(step, candidates[0].identity, setup.digest, rows)
    before = history.read(setup.out, setup.digest)
    key = history.key(score.name(metric, setup.protocol), wanted.student_steps[0])
    if history.is_best(new, before, metric, key):
        pretrained.write(setup.out / "best", student)
        print(f"step {step} is the best so far, by {key}: {new[key]:.4g}")
    history.append(setup.out, new)
    protocol = table.Protocol(_name(), setup.digest)
    print(table.markdown(rows, protocol), end="", flush=True)


if __name__ == "__main__":
    command.run(main, required=("protocol",), leave=hosts.leave)
