"""What was left out while samples were read, and when that is too much."""

import collections
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from slam_jax.errors import UserError

_FEW = 1000  # samples, below which a fraction says nothing
_DEVIATIONS = 3  # of chance
_SHOWN = 5  # shards

# What `counts` counts.
COUNTED = ("good_samples", "bad_samples", "filtered_samples", "cut_captions")


class Dropped(NamedTuple):
    """A sample that was left out, and why."""

    reason: str
    shard: str
    key: str
    filtered: bool  # by the user's filters: nothing is wrong with it


def counts(num_good: int, dropped: Iterable[Dropped], num_cut: int) -> np.ndarray:
    """int32 [4], named by COUNTED; num_cut: captions longer than the tokenizer takes."""
    filtered = [each.filtered for each in dropped]
    return np.array([num_good, filtered.count(False), filtered.count(True), num_cut], np.int32)


def of_shards(dropped: Iterable[Dropped]) -> collections.Counter[tuple[str, str]]:
    """The bad ones by shard and reason."""
    return collections.Counter((each.shard, each.reason) for each in dropped if not each.filtered)


def check(
    num_good: int,
    num_bad: int,
    bad: collections.Counter[tuple[str, str]],
    max_bad_fraction: float,
    option: str,
    *,
    so_far: bool,
) -> None:
    """UserError with the worst shards if more than that share of the samples is bad.

    bad: by shard and reason, as far as they are known here. option: what the user calls the
    fraction. so_far: there are more samples to come. Then too many are those that cannot be so by
    chance, judged as if at least 1,000 had been read, so that one among the first is no reason to
    stop.
    """
    num_read = num_good + num_bad
    allowed = max_bad_fraction * num_read
    if so_far:
        allowed = max_bad_fraction * max(num_read, _FEW)
        allowed += _DEVIATIONS * math.sqrt(allowed)
    if num_bad <= allowed:
        return
    worst = "; ".join(f"{shard} ({listed(reasons)})" for shard, reasons in _worst_shards(bad))
    raise UserError(
        f"{num_bad:,} of {num_read:,} samples cannot be used, more than {option} "
        f"{max_bad_fraction:g} allows; the worst shards are {worst or 'known to other hosts'}: "
        "mend or leave them out, or raise the fraction"
    )


def _worst_shards(
    bad: collections.Counter[tuple[str, str]],
) -> list[tuple[str, collections.Counter[str]]]:
    """A few shards with the counts of their reasons, the worst shard first."""
    shards = collections.defaultdict(collections.Counter)
    for (shard, reason), count in bad.items():
        shards[shard][reason] += count
    return sorted(shards.items(), key=lambda item: -item[1].total())[:_SHOWN]


def listed(reasons: collections.Counter[str]) -> str:
    """The counts in words, the largest first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
