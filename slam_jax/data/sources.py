"""Random-access sources of captioned images: __len__ and __getitem__ -> {"image", "caption"}."""

import dataclasses
import functools
import json
from pathlib import Path

from slam_jax.data import image
from slam_jax.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LAYOUT = "give each picture a caption in NAME.txt beside it, or all in FOLDER/metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Every picture of a folder and those below it, in the order of their names.

    Captions lie in a .txt beside each picture, or in metadata.jsonl, a line of
    {"file_name": …, "text": …} each, as Hugging Face's image folders have it.
    size: pixels. num_images: at most so many, the first ones.
    """

    path: Path
    size: int
    num_images: int

    def __post_init__(self):
        if not self.path.is_dir():
            raise UserError(f"data.source={str(self.path)!r} is no folder, nor shapes2d; {_LAYOUT}")
        if not self._examples:
            raise UserError(f"data.source={str(self.path)!r} holds no {', '.join(_SUFFIXES)} file")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 [size, size, 3], "caption": str}."""
        path, caption = self._examples[index]
        return {"image": image.read(path, self.size), "caption": caption}

    @functools.cached_property
    def _examples(self) -> list[tuple[Path, str]]:
        metadata = self.path / "metadata.jsonl"
        if metadata.exists():
            return _listed(metadata)[: self.num_images]
        found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        return [(path, _caption_beside(path)) for path in found[: self.num_images]]


def _caption_beside(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} has no readable caption ({error}); {_LAYOUT}") from None


def _listed(metadata: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of every line; UserError naming the line that is not of that form."""
    examples = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            path, caption = metadata.parent / entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{metadata} line {number} is not {{'file_name': …, 'text': …}} "
                f"({type(error).__name__}: {error}); correct it"
            ) from None
        if not path.is_file():
            raise UserError(f"{metadata} line {number} names {path}, which is not there; remove it")
        examples.append((path, caption))
    return examples
