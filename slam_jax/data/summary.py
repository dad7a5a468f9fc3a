"""What became of the samples of one shard: a small JSON beside it, from which reports are made.

It is written before the shard takes its place, so a shard that is there has one.
"""

import base64
import bisect
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from slam_jax.data.manifest import Shard
from slam_jax.data.tally import Dropped
from slam_jax.data.variants import Picture

# Bounds of the histograms' bars: the short side in pixels, and the long side over it.
_SHORT_SIDES = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048)
_ASPECTS = (1.05, 1.25, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
_MOST_EXAMPLES = 20  # of what was left out
_THUMBNAIL = 64  # pixels
MOST_THUMBNAILS = 16

_WHY_DAMAGED = (OSError, ValueError, KeyError, TypeError)


class Note(NamedTuple):
    """What is told of a picture that was kept."""

    height: int  # of the original, in pixels
    width: int
    num_tokens: int
    cut: bool


class Summary(NamedTuple):
    """One shard's, or by `total` that of many."""

    kept: int  # pictures
    cut: int  # how many of them have captions that did not fit
    # How many were left out: (reason, the source's shard, whether by the filters, how many).
    dropped: list[tuple[str, str, bool, int]]
    examples: list[tuple[str, str, str]]  # (reason, shard, key) of the first of them
    short_side: dict[str, int]  # how many of those kept, by label
    aspect: dict[str, int]
    tokens: dict[str, int]
    thumbnails: list[str]  # JPEG files in base64, of the first ones kept


def note(picture: Picture) -> Note:
    height, width = (int(side) for side in picture.time_ids[0, :2])
    return Note(height, width, picture.num_tokens, picture.cut)


def of(notes: Sequence[Note], dropped: Sequence[Dropped], thumbnails: Sequence[str]) -> Summary:
    """The summary of pictures that were kept and samples that were not."""
    counts = Counter((each.reason, each.shard, each.filtered) for each in dropped)
    short_sides = [bisect.bisect_right(_SHORT_SIDES, min(n.height, n.width)) for n in notes]
    aspects = [
        bisect.bisect_right(_ASPECTS, max(n.height, n.width) / min(n.height, n.width))
        for n in notes
    ]
    tokens = Counter(n.num_tokens for n in notes)
    return Summary(
        len(notes), sum(n.cut for n in notes),
        [(*what, count) for what, count in sorted(counts.items())],
        [(each.reason, each.shard, each.key) for each in dropped[:_MOST_EXAMPLES]],
        _histogram(short_sides, _SHORT_SIDES), _histogram(aspects, _ASPECTS),
        {str(length): tokens[length] for length in sorted(tokens)}, list(thumbnails),
    )  # fmt: skip


def _histogram(places: list[int], bounds: Sequence[int | float]) -> dict[str, int]:
    """How many lie in each place, by label; every label is there."""
    middle = [f"{low:g}-{high:g}" for low, high in zip(bounds, bounds[1:], strict=False)]
    labels = [f"< {bounds[0]:g}", *middle, f">= {bounds[-1]:g}"]
    counts = Counter(places)
    return {label: counts[place] for place, label in enumerate(labels)}


def total(summaries: Iterable[Summary], most_thumbnails: int) -> Summary:
    """That of all together; of thumbnails every shard's first, then every shard's second, …"""
    kept, cut = 0, 0
    dropped, histograms = Counter(), [Counter(), Counter(), Counter()]
    examples, thumbnails = [], []
    for each in summaries:
        kept, cut = kept + each.kept, cut + each.cut
        for reason, shard, filtered, count in each.dropped:
            dropped[reason, shard, filtered] += count
        for histogram, more in zip(
            histograms, (each.short_side, each.aspect, each.tokens), strict=True
        ):
            # Not the operator +=, which drops labels of which there are none.
            histogram.update(more)
        examples = (examples + each.examples)[:_MOST_EXAMPLES]
        thumbnails.extend(enumerate(each.thumbnails))
    chosen = sorted(thumbnails, key=lambda numbered: numbered[0])[:most_thumbnails]
    short_side, aspect, tokens = histograms
    return Summary(
        kept, cut, [(*what, count) for what, count in sorted(dropped.items())], examples,
        dict(short_side), dict(aspect), {key: tokens[key] for key in sorted(tokens, key=int)},
        [thumbnail for _, thumbnail in chosen],
    )  # fmt: skip


def reasons(summary: Summary, *, filtered: bool) -> dict[str, int]:
    """How many samples were left out by the filters, or could not be used, by reason."""
    counts = Counter()
    for reason, _, by_filters, count in summary.dropped:
        counts[reason] += count * (by_filters == filtered)
    return {reason: count for reason, count in sorted(counts.items()) if count}


def thumbnail(pixels: UInt8[np.ndarray, "size size 3"]) -> str:
    """A small JPEG file in base64."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def path_of(shard: Path) -> Path:
    return shard.with_suffix(".json")


def dump(summary: Summary, shard: Shard) -> bytes:
    tree = {"shard": shard._asdict(), **summary._asdict()}
    return (json.dumps(tree) + "\n").encode()


def read(path: Path) -> tuple[Summary, Shard] | None:
    """What lies beside the shard at `path`; None unless both are there and the shard is as long."""
    try:
        tree: dict[str, Any] = json.loads(path_of(path).read_bytes())
        shard = Shard(**tree.pop("shard"))
        summary = Summary(**tree)
        whole = path.stat().st_size == shard.num_bytes
    except _WHY_DAMAGED:
        return None
    return (summary, shard) if whole else None
