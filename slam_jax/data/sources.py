"""Sources of captioned pictures (sample.py), by name."""

import dataclasses
import functools
import json
from pathlib import Path

from slam_jax.data.sample import Sample
from slam_jax.errors import BadSample, UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LAYOUT = "give each picture a caption in NAME.txt beside it, or all in FOLDER/metadata.jsonl"


def find(name: str, index_dir: str = ""):
    """The source of that name; UserError if there is none."""
    return ImageFolder(Path(name))


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Every picture of a folder and those below it, in the order of their names.

    Captions lie in a .txt beside each picture, or in metadata.jsonl, a line of
    {"file_name": …, "text": …} each, as Hugging Face's image folders have it.
    """

    path: Path

    def __post_init__(self):
        if not self.path.is_dir():
            raise UserError(f"data.source={str(self.path)!r} is no folder, nor shapes2d; {_LAYOUT}")
        if not self._examples:
            raise UserError(f"data.source={str(self.path)!r} holds no {', '.join(_SUFFIXES)} file")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Sample:
        path, fields = self._examples[index]
        shard, key = str(self.path), str(path.relative_to(self.path))
        try:
            if "text" not in fields:
                fields = {"text": path.with_suffix(".txt").read_text(encoding="utf-8").strip()}
            return Sample(path.read_bytes(), fields["text"], shard, key, fields)
        except FileNotFoundError:
            raise BadSample("missing caption", shard, key) from None
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8", shard, key) from None

    @functools.cached_property
    def _examples(self) -> list[tuple[Path, dict]]:
        metadata = self.path / "metadata.jsonl"
        if metadata.exists():
            return _listed(metadata)
        found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        return [(path, {}) for path in found]


def _listed(metadata: Path) -> list[tuple[Path, dict]]:
    """(picture, its line) of every line; UserError naming the line that is not of that form."""
    examples = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            path, _ = metadata.parent / entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{metadata} line {number} is not {{'file_name': …, 'text': …}} "
                f"({type(error).__name__}: {error}); correct it"
            ) from None
        if not path.is_file():
            raise UserError(f"{metadata} line {number} names {path}, which is not there; remove it")
        examples.append((path, entry))
    return examples
