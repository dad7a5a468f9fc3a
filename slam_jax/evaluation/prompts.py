"""Which captions are drawn: chosen by rule from a seed, so that no list need be passed around.

Order among a file's entries is that of sha256("SEED NAME"), the NAME being COCO's image id or the
caption itself: the same in every language and version, and the first 5,000 of 30,000 are the
choice of 5,000.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from slam_jax.data import captions, shapes2d
from slam_jax.errors import BadSample, UserError
from slam_jax.evaluation import protocol
from slam_jax.evaluation.protocol import Prompts


class Chosen(NamedTuple):
    """Captions; image i shows the i-th."""

    captions: list[str]
    labels: Int32[np.ndarray, "N K"] | None  # what shapes2d's captions say
    sha256: str


def choose(wanted: Prompts, path: Path | None) -> Chosen:
    """The captions; path is that of the file that they come from, None for shapes2d.

    UserError: no file or another one than the protocol's, too few captions, other captions.
    """
    if wanted.source == "shapes2d":
        if path is not None:
            raise UserError(f"--captions {path}: this protocol's captions are shapes2d's own")
        return _of_shapes2d(wanted)
    if path is None:
        kind = {"coco": "COCO's annotations, such as captions_val2014.json", "lines":
                "a text file with a caption a line"}  # fmt: skip
        raise UserError(f"--captions must be given: {kind[wanted.source]}")
    content = _read(path, wanted.file_sha256)
    named = _of_coco(path, content) if wanted.source == "coco" else _of_lines(path, content)
    if len(named) < wanted.count:
        raise UserError(
            f"--captions {path} holds {len(named):,} different entries, and the protocol draws "
            f"{wanted.count:,}; give the whole file"
        )
    order = sorted(named, key=lambda name: _place(wanted.seed, name))
    return _checked([named[name] for name in order[: wanted.count]], None, wanted, str(path))


def _of_shapes2d(wanted: Prompts) -> Chosen:
    source = shapes2d.Shapes2D(32, wanted.count, wanted.seed)
    found = [source.scene(number)[0].caption() for number in range(wanted.count)]
    labels = np.stack([shapes2d.parse(caption).labels() for caption in found])
    return _checked(found, labels, wanted, "shapes2d")


def _checked(
    found: list[str], labels: Int32[np.ndarray, "N K"] | None, wanted: Prompts, source: str
) -> Chosen:
    sha256 = protocol.of_json(found)
    if wanted.sha256 not in ("", sha256):
        raise UserError(
            f"the captions chosen from {source} have sha256 {sha256}, the protocol's "
            f"{wanted.sha256}; numbers of other captions cannot be compared: take the original "
            "file, or set --protocol.prompts.sha256='' for a protocol of your own"
        )
    return Chosen(found, labels, sha256)


def _read(path: Path, expected: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --captions {path}: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if expected not in ("", found):
        raise UserError(
            f"--captions {path} has sha256 {found}, and the protocol wants {expected}; download "
            "it again"
        )
    return content


def _of_coco(path: Path, content: bytes) -> dict[Any, str]:
    """Image id -> its caption of the lowest id."""
    try:
        whole = json.loads(content)
        ids = {image["id"] for image in whole["images"]}
        lowest: dict[int, tuple[int, str]] = {}
        for each in whole["annotations"]:
            one = (each["id"], captions.checked(each["caption"]))
            lowest[each["image_id"]] = min(lowest.get(each["image_id"], one), one)
    except (ValueError, KeyError, TypeError, BadSample) as error:
        raise UserError(
            f"--captions {path} is no captions file of COCO ({type(error).__name__}: {error}); "
            "give captions_val2014.json or the like"
        ) from None
    if lacking := sorted(ids - lowest.keys()):
        raise UserError(
            f"--captions {path}: {len(lacking):,} of {len(ids):,} images have no caption, such as "
            f"image {lacking[0]}; give the captions file, not that of objects"
        )
    return {image: lowest[image][1] for image in ids}


def _of_lines(path: Path, content: bytes) -> dict[Any, str]:
    """Every caption once."""
    try:
        lines: Iterable[str] = captions.decoded(content).splitlines()
    except BadSample as bad:
        raise UserError(f"--captions {path}: {bad.reason}; write UTF-8") from None
    return {line.strip(): line.strip() for line in lines if line.strip()}


def _place(seed: int, name: Any) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
