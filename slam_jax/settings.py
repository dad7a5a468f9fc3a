"""What a config may say, group by group; its names and types are checked here, all at once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from slam_jax.errors import UserError


class Teacher(NamedTuple):
    """The model to distil."""

    model: str  # a folder in diffusers' layout, ORG/NAME on the Hugging Face hub, or a single file
    revision: str  # branch, tag or commit on the hub; "" for main
    variant: str  # "fp16" for files *.fp16.safetensors, "" for the plain ones
    config: str  # of a single file only: the folder or ORG/NAME with its configs and tokenizer
    dtype: str  # in which teacher, VAE and text encoder compute: float32 or bfloat16


class Lora(NamedTuple):
    """Low-rank additions to the teacher's kernels, trained instead of all parameters."""

    rank: int  # 0 trains all parameters
    alpha: float  # what is added is multiplied by alpha / rank
    targets: tuple  # regexes of the modules, each for a whole name or for its end after a dot


class Student(NamedTuple):
    """The network that is trained; its parameters are float32 whatever the dtype."""

    dtype: str  # in which it computes: float32 or bfloat16
    remat: str  # what the backward pass computes again: none, save_products, save_convs, all
    cond_proj: str  # first guess of the layer that takes gamma: random (as released) or zero
    gamma_dim: int  # width of gamma's embedding: 256 in the released models
    lora: Lora
    start: (
        str  # model whose UNet the student starts as, such as a released student; "": the teacher
    )


class Distill(NamedTuple):
    """The loss; METHOD.md §1. Tuples are a name, then its numbers."""

    num_subpaths: int  # start times in the grid, and what few-step sampling chooses from
    times: str  # where sub-paths start: grid, or all
    length: int  # of a sub-path, in training times
    stride: int  # of the teacher's solver; length / stride steps
    w: float  # guidance weight of the teacher, 0 = conditional only (guidance_scale - 1)
    sigma: str  # noise level on the sub-path: markov (as released), ddim, fixed, matched
    gamma: tuple  # ("uniform",) ("ones",) ("mixture", p) ("annealed", p_0, p_1, until)
    distance: tuple  # ("huber", c) or ("l2",)


class Optimizer(NamedTuple):
    """AdamW."""

    learning_rate: float
    warmup_steps: int
    clip_norm: float
    weight_decay: float
    b1: float
    b2: float
    eps: float
    mu_dtype: str  # in which the first moment is kept: float32, or bfloat16, half the memory


class Data(NamedTuple):
    """Captioned images."""

    source: str  # shapes2d, a prepared cache, or what data/sources.py finds by name
    size: int  # pixels
    num_images: int  # of shapes2d; of other sources at most so many
    crop: tuple  # of ("center",), ("random",), ("center", "flip"), ("random", "flip")
    filters: tuple  # of conditions such as "short_side >= 512" (data/filters.py)
    max_bad_fraction: float  # of the samples; above it the run stops
    index_dir: str  # where the indexes of tars are written; "" for beside them
    num_threads: int  # that make batches ahead of time; 0 makes each when it is needed
    num_workers: int  # processes that do so instead, with as many threads each; 0 for none


class Eval(NamedTuple):
    """Sample grids while training goes on, and the comparison at the end."""

    every_steps: int
    prompts: tuple
    teacher_steps: int
    student_steps: int
    judge: str  # folder of the classifier of shapes2d, for the table at the end; "" for no table
    num_images: int  # of each row of the table


class Faults(NamedTuple):
    """What is done about updates that would spoil the student, and about hosts that are gone."""

    max_grad_norm: float  # before clipping; a larger one, or one that is not finite, is dropped
    max_skips: int  # updates dropped within 1,000 steps; more, and the run goes back
    max_rollbacks: int  # to the last checkpoint and on with other data; after so many it stops
    timeout_s: int  # hosts wait so long for each other; a later one ends the job


class Checkpoint(NamedTuple):
    """Saved states."""

    every_steps: int
    keep: int  # the last ones
    keep_every: int  # and all whose step is a multiple of it; 0 for none


class Log(NamedTuple):
    """Lines of metrics.jsonl, TensorBoard and Weights & Biases."""

    every_steps: int
    wandb_project: str  # of Weights & Biases; "" to send nothing there


class Mesh(NamedTuple):
    """How the devices are arranged, and how arrays lie on them (runtime/mesh.py)."""

    axes: tuple  # of (name, size), -1 for the rest
    rules: tuple  # of (regex, axis of each dimension)


class Settings(NamedTuple):
    """A whole experiment."""

    seed: int
    num_steps: int
    batch_size: int  # over all devices and microbatches
    accumulate: int  # microbatches per update
    ema_rate: float  # of the target, per update
    attention: str  # how it is computed: xla, flash (a kernel for TPUs), cudnn (for NVIDIA GPUs)
    teacher: Teacher
    student: Student
    distill: Distill
    optimizer: Optimizer
    data: Data
    eval: Eval
    checkpoint: Checkpoint
    faults: Faults
    log: Log
    mesh: Mesh


# May differ when a run is resumed: they do not touch what is learnt, but for rounding.
FREE = (
    "num_steps", "attention", "eval", "checkpoint", "faults", "log", "data.max_bad_fraction",
    "data.index_dir", "data.num_threads", "data.num_workers",
)  # fmt: skip

_AT_LEAST_ONE = (
    "num_steps", "batch_size", "accumulate", "distill.num_subpaths", "data.num_images",
    "eval.every_steps", "eval.teacher_steps", "eval.student_steps", "eval.num_images",
    "checkpoint.every_steps", "checkpoint.keep", "faults.timeout_s", "log.every_steps",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "seed", "student.lora.rank", "data.num_threads", "data.num_workers", "faults.max_skips",
    "faults.max_rollbacks", "checkpoint.keep_every",
)  # fmt: skip
_STRINGS = ("eval.prompts", "student.lora.targets", "data.crop", "data.filters")


def from_config(config: Mapping[str, Any]) -> Settings:
    """Every key of the config, none missing, none unknown, each of its type; else UserError."""
    settings = read(Settings, config, "config")
    leaves = as_dict(settings)
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            value = _value(leaves, name)
            if value < least:
                raise UserError(f"config.{name}={value} must be at least {least}")
    for name in _STRINGS:
        value = _value(leaves, name)
        if not all(is_text(each) for each in value):
            raise UserError(f"config.{name}={value!r} must be strings, in UTF-8")
    if settings.seed >= 2**32:
        raise UserError(f"config.seed={settings.seed} must be less than 2**32")
    lora = settings.student.lora
    if lora.alpha <= 0:
        raise UserError(f"config.student.lora.alpha={lora.alpha} must be positive, such as rank")
    if lora.rank and not lora.targets:
        raise UserError("config.student.lora.targets is empty; name modules, or set rank to 0")
    if not 0 <= settings.ema_rate < 1:
        raise UserError(f"config.ema_rate={settings.ema_rate} must lie in [0, 1)")
    if not 0 <= settings.data.max_bad_fraction < 1:
        raise UserError(
            f"config.data.max_bad_fraction={settings.data.max_bad_fraction} must lie in [0, 1)"
        )
    return settings


def is_text(value: Any) -> bool:
    """A string without half characters, as which a shell's bytes come that are not UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


def _value(leaves: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        leaves = leaves[part]
    return leaves


def read(group: type, values: Mapping[str, Any], name: str) -> Any:
    """The NamedTuple `group`, and those in it, from every key of `values`; else UserError.

    name: what the user calls it, for messages.
    """
    known = group.__annotations__
    for key in values:
        if key not in known:
            raise UserError(f"{name}.{key} is not known; there are {', '.join(known)}")
    for key in known:
        if key not in values:
            raise UserError(f"{name}.{key} is missing; the config must give every value")
    return group(**{key: _checked(known[key], values[key], f"{name}.{key}") for key in known})


def _checked(kind: type, value: Any, name: str) -> Any:
    if _is_group(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}={value!r} must be a group of {', '.join(kind._fields)}")
        return read(kind, value, name)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and type(value) is list:
        return tuple(value)
    if type(value) is not kind:
        raise UserError(f"{name}={value!r} must be of type {kind.__name__}")
    return value


def _is_group(kind: type) -> bool:
    return issubclass(kind, tuple) and kind is not tuple


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings as nested dicts, for config.json."""
    return {
        key: as_dict(value) if _is_group(type(value)) else value
        for key, value in settings._asdict().items()
    }
