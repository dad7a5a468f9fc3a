"""What decides a number beside the model that is measured, and a hash of all of it.

Two numbers can be compared if their hashes are the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.errors import UserError
from slam_jax.evaluation import inception
from slam_jax.nets import kernels
from slam_jax.settings import as_dict, read

PROMPT_SOURCES = ("shapes2d", "coco", "lines")
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
NETWORKS = ("classifier", "inception")
REFERENCE_SOURCES = ("shapes2d", "pictures")
SPACINGS = ("", "leading", "linspace", "trailing")
CROPS = ("middle", "none")
METRICS = (
    "fid",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "prompt_accuracy",
    "clip",
    "hps",
)
_SHOWN_DIGITS = 12  # of a hash


class Prompts(NamedTuple):
    """Of what is drawn (prompts.py)."""

    source: str  # shapes2d; coco, an annotations JSON; or lines, a file with a caption a line
    count: int  # how many are chosen, one for each image
    seed: int  # of the choice
    file_sha256: str  # of the file that --captions names; "" where it is not known beforehand
    sha256: str  # of the chosen captions, in order; "" where it is not known beforehand


class Images(NamedTuple):
    """How large images are drawn and measured."""

    size: int  # pixels, as the model draws them
    resize: int  # pixels, as the features see them; references too
    filter: str  # Pillow's, with which both get there


class Features(NamedTuple):
    """Where the two sets of images are compared."""

    network: str  # classifier, the one of shapes2d; or inception
    mode: str  # of inception: clean or legacy; "" for the classifier
    weights: str  # the classifier's folder, or Inception's file


class Clip(NamedTuple):
    """How well an image fits its caption."""

    model: str  # a CLIP as transformers writes it, folder or ORG/NAME on the hub; "" for none
    prefix: str  # before every caption
    hps: str  # folder of an HPSv2 checkpoint in the same layout; "" for none


class Reference(NamedTuple):
    """The real images."""

    source: str  # shapes2d, or pictures, a folder
    count: int  # 0 for however many there are
    seed: int  # of shapes2d's drawings
    crop: str  # middle, the largest square; or none, for pictures that are square already
    sha256: str  # of the pictures; "" where it is not known beforehand
    file: str  # their statistics, .npz; made of --reference FOLDER once


class Comparison(NamedTuple):
    """What is measured where the command line does not say; no part of the hash."""

    models: tuple  # those of them that are there
    teacher_samplers: tuple
    teacher_steps: tuple
    student_steps: tuple
    w: tuple  # guidance of models that are no students (guidance_scale - 1)
    original_steps: int  # grid on which the times of a teacher's ddim lie
    spacing: str  # timestep_spacing of other samplers: trailing, linspace, leading; "": the model's
    batch_size: int  # images at a time, on each device
    dtype: str  # in which models compute
    attention: str  # how UNets' is computed: xla, flash (a kernel for TPUs), cudnn (NVIDIA GPUs)


class Protocol(NamedTuple):
    """A whole protocol."""

    seed: int  # noise of image i depends on it and i alone
    metrics: tuple  # of METRICS; the first decides which model is the best
    kid_subset: int  # images in each of the subsets behind the kernel distance
    bootstrap: int  # resamples behind the Frechet distance's interval; 0 for none
    prompts: Prompts
    images: Images
    features: Features
    clip: Clip
    reference: Reference
    comparison: Comparison


class Hashed(NamedTuple):
    """What is known of a protocol once captions, references and networks are there."""

    prompts: str  # sha256 of the chosen captions
    networks: tuple[str, ...]  # fingerprints of what measures
    reference: str  # what the reference statistics were made of


def from_config(config: Mapping[str, Any]) -> Protocol:
    """Every key, none missing, none unknown, each of its type and possible; else UserError."""
    protocol = read(Protocol, config, "protocol")
    prompts, images, features, _, reference, comparison = protocol[4:]
    _one_of("prompts.source", prompts.source, PROMPT_SOURCES)
    _one_of("images.filter", images.filter, FILTERS)
    _one_of("features.network", features.network, NETWORKS)
    modes = tuple(inception.MODES) if features.network == "inception" else ("",)
    _one_of("features.mode", features.mode, modes)
    _one_of("reference.source", reference.source, REFERENCE_SOURCES)
    _one_of("reference.crop", reference.crop, CROPS)
    _one_of("comparison.spacing", comparison.spacing, SPACINGS)
    _one_of("comparison.attention", comparison.attention, tuple(kernels.BY_NAME))
    for metric in protocol.metrics or ("",):
        _one_of("metrics", metric, METRICS)
    _at_least(2, "prompts.count", prompts.count)
    _at_least(2, "kid_subset", protocol.kid_subset)
    for name, value in images._replace(filter=1)._asdict().items():
        _at_least(1, f"images.{name}", value)
    steps = (*comparison.teacher_steps, *comparison.student_steps)
    for step in (comparison.batch_size, comparison.original_steps, *steps):
        _at_least(1, "comparison's batch_size, original_steps and steps", step)
    others = {
        "seed": protocol.seed, "bootstrap": protocol.bootstrap,
        "prompts.seed": prompts.seed, "reference.seed": reference.seed,
        "reference.count": reference.count,
    }  # fmt: skip
    for name, value in others.items():
        _at_least(0, name, value)
    if protocol.seed >= 2**32:
        raise UserError(f"protocol.seed={protocol.seed} must be less than 2**32")
    return _consistent(protocol)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        listed = ", ".join(repr(each) for each in known)
        raise UserError(f"protocol.{name} {value!r} is not known; there are {listed}")


def _at_least(least: int, name: str, value: int) -> None:
    if type(value) is not int or value < least:
        raise UserError(f"protocol.{name} {value!r} must be an integer of at least {least}")


def _consistent(protocol: Protocol) -> Protocol:
    """Metrics need what they are made of."""
    for metric, key in (("clip", "model"), ("hps", "hps")):
        if (metric in protocol.metrics) != bool(protocol.clip._asdict()[key]):
            raise UserError(
                f"protocol.metrics {protocol.metrics} and protocol.clip.{key} "
                f"{protocol.clip._asdict()[key]!r}: give {metric} and its network, or neither"
            )
    if "prompt_accuracy" in protocol.metrics and (
        protocol.features.network != "classifier" or protocol.prompts.source != "shapes2d"
    ):
        raise UserError(
            "protocol.metrics asks for prompt_accuracy, which the classifier knows of captions of "
            "shapes2d alone; leave it out"
        )
    if protocol.reference.source == "shapes2d" and protocol.reference.count < 2:
        raise UserError("protocol.reference.count must be at least 2: shapes2d has no end")
    return protocol


def digest(protocol: Protocol, hashed: Hashed) -> str:
    """Hexadecimal; depends on all that changes a number, and on no path."""
    images, reference = protocol.images, protocol.reference
    told = {
        "seed": protocol.seed,
        "metrics": protocol.metrics,
        "kid_subset": protocol.kid_subset,
        "bootstrap": protocol.bootstrap,
        "images": as_dict(images),
        "features": (protocol.features.network, protocol.features.mode),
        "crop": reference.crop if reference.source == "pictures" else "",
        **as_dict(hashed),
    }
    return of_json(told)[:_SHOWN_DIGITS]


def of_json(value: Any) -> str:
    """sha256, hexadecimal, of what is made of dicts, sequences, strings and numbers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
