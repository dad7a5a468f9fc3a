"""What was left out while samples were read, and when that is too much."""

import collections
from collections.abc import Iterable
from typing import NamedTuple

from slam_jax.errors import UserError

_FEW = 1000  # samples, below which a fraction says nothing
_SHOWN = 5  # shards


class Dropped(NamedTuple):
    """A sample that was left out, and why."""

    reason: str
    shard: str
    key: str
    filtered: bool  # by the user's filters: nothing is wrong with it


class Tally(NamedTuple):
    """Counts of samples."""

    num_read: int  # left out or not
    bad: collections.Counter[tuple[str, str]]  # by shard and reason
    filtered: collections.Counter[str]  # by reason


EMPTY = Tally(0, collections.Counter(), collections.Counter())


def add(tally: Tally, num_kept: int, dropped: Iterable[Dropped]) -> Tally:
    """The tally with those samples in it."""
    dropped = list(dropped)
    return Tally(
        tally.num_read + num_kept + len(dropped),
        tally.bad + collections.Counter((d.shard, d.reason) for d in dropped if not d.filtered),
        tally.filtered + collections.Counter(d.reason for d in dropped if d.filtered),
    )


def summary(dropped: Iterable[Dropped], num_cut: int) -> dict[str, int]:
    """What a log tells of a batch; num_cut: captions longer than the tokenizer takes."""
    filtered = [each.filtered for each in dropped]
    return {
        "bad_samples": filtered.count(False),
        "filtered_samples": filtered.count(True),
        "cut_captions": num_cut,
    }


def check(tally: Tally, max_bad_fraction: float) -> None:
    """UserError with the worst shards if more than that share of the samples is bad.

    Judged as if at least 1,000 had been read, so that one bad sample among the first is no reason
    to stop.
    """
    num_bad = tally.bad.total()
    if num_bad <= max_bad_fraction * max(tally.num_read, _FEW):
        return
    told = "; ".join(
        f"{shard} ({', '.join(f'{count} {reason}' for reason, count in reasons.most_common())})"
        for shard, reasons in worst_shards(tally.bad, _SHOWN)
    )
    raise UserError(
        f"{num_bad} of {tally.num_read} samples are bad, more than data.max_bad_fraction "
        f"{max_bad_fraction:g} allows; the worst shards are {told}: mend or leave them out, or "
        "raise the fraction"
    )


def worst_shards(
    bad: collections.Counter[tuple[str, str]], most: int
) -> list[tuple[str, collections.Counter[str]]]:
    """At most so many shards with the counts of their reasons, the worst shard first.

    bad: by shard and reason.
    """
    shards = collections.defaultdict(collections.Counter)
    for (shard, reason), count in bad.items():
        shards[shard][reason] += count
    return sorted(shards.items(), key=lambda item: -item[1].total())[:most]
