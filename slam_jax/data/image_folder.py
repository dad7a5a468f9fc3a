"""Folders of picture files with captions beside them."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from slam_jax.data import captions
from slam_jax.data.sample import Sample
from slam_jax.errors import BadSample, UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Pictures of a folder, and what metadata.jsonl tells of each, if there is one."""

    path: str
    names: tuple[str, ...]  # from the folder
    lines: tuple[Mapping[str, Any], ...]  # none, or one a picture

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """BadSample, saying where it lies."""
        name = self.names[index]
        path, key = os.path.join(self.path, name), captions.printable(name)
        try:
            fields = self.lines[index] if self.lines else {}
            caption = captions.checked(fields["text"]) if self.lines else _caption_beside(path)
            return Sample(_content(path, "missing image"), caption, self.path, key, fields)
        except BadSample as bad:
            raise BadSample(bad.reason, self.path, key) from None


def opened(path: str) -> ImageFolder:
    """Every picture of the folder and those below it, in the order of their names.

    Captions lie in a .txt beside each picture, or in metadata.jsonl, a line of
    {"file_name": …, "text": …} each, as Hugging Face's image folders have it. UserError if there
    are no pictures, or for a line that is not of that form.
    """
    metadata = os.path.join(path, _METADATA)
    if os.path.exists(metadata):
        lines = tuple(_listed(metadata))
        names = tuple(line["file_name"] for line in lines)
    else:
        names, lines = tuple(_found(path)), ()
    if not names:
        raise UserError(
            f"source {path!r} holds no {', '.join(_SUFFIXES)} file, and no .tar or .parquet at its "
            "top; give another folder or a pattern such as '/data/*/*.tar', and decompress "
            "compressed tars"
        )
    return ImageFolder(path, names, lines)


def _found(top: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"source {top!r}: cannot read {error.filename}: {error.strerror}")

    names = []
    for folder, _, files in os.walk(top, onerror=refuse):
        below = os.path.relpath(folder, top) if folder != top else ""
        pictures = (name for name in files if name.lower().endswith(_SUFFIXES))
        names += [os.path.join(below, name) for name in pictures]
    return sorted(names)


def _listed(metadata: str) -> list[Mapping[str, Any]]:
    """UserError naming the line that is not of that form, or if the file is no text."""
    try:
        with open(metadata, encoding="utf-8-sig") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {metadata} ({error}); save it as UTF-8") from None
    return [_entry(metadata, *numbered) for numbered in enumerate(lines, 1) if numbered[1].strip()]


def _entry(metadata: str, number: int, line: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
        name, _ = entry["file_name"], entry["text"]
        if not isinstance(name, str):
            raise TypeError("file_name is no string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{metadata} line {number} is not {{'file_name': …, 'text': …}} "
            f"({type(error).__name__}: {error}); correct it"
        ) from None
    return entry


def _caption_beside(picture: str) -> str:
    return captions.decoded(_content(os.path.splitext(picture)[0] + ".txt", "missing caption"))


def _content(path: str, if_missing: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadSample(if_missing) from None
    except (OSError, ValueError):
        raise BadSample("unreadable file") from None
