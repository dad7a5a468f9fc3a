"""Stops a preparation that cannot come to anything, as soon as that can be told."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from slam_jax.data import tally
from slam_jax.data.summary import Summary
from slam_jax.data.tally import Dropped
from slam_jax.data.variants import Picture
from slam_jax.errors import UserError

_PATIENCE = 10_000  # samples in a row that may be left out


class Watch(NamedTuple):
    """What became of the samples so far; the counters grow."""

    kept: Counter[str]  # by shard of the source
    bad: Counter[tuple[str, str]]  # by shard and reason
    filtered: Counter[str]  # by reason
    max_bad_fraction: float  # of the samples that the filters let through


def start(max_bad_fraction: float, earlier: Iterable[Summary]) -> Watch:
    """A watch that has counted what earlier runs did."""
    watch = Watch(Counter(), Counter(), Counter(), max_bad_fraction)
    for summary in earlier:
        watch.kept["earlier"] += summary.kept
        for reason, shard, filtered, count in summary.dropped:
            _count(watch, reason, shard, filtered, count)
    return watch


def _count(watch: Watch, reason: str, shard: str, filtered: bool, count: int) -> None:
    if filtered:
        watch.filtered[reason] += count
    else:
        watch.bad[shard, reason] += count


def reject(watch: Watch, dropped: Dropped) -> None:
    """A picture that `watched` took for good has turned out not to be."""
    watch.kept[dropped.shard] -= 1
    _drop(watch, dropped)


def _drop(watch: Watch, dropped: Dropped) -> None:
    _count(watch, dropped.reason, dropped.shard, dropped.filtered, 1)
    if not dropped.filtered:
        _check(watch, so_far=True)


def watched(results: Iterable[Picture | Dropped], watch: Watch) -> Iterator[Picture | Dropped]:
    """The same, counted. UserError if too many cannot be used, or none of many in a row is kept."""
    in_a_row = 0
    for result in results:
        if isinstance(result, Dropped):
            _drop(watch, result)
            in_a_row += 1
            if in_a_row >= _PATIENCE:
                raise _none_left(watch, f"the last {in_a_row:,} samples")
        else:
            watch.kept[result.shard] += 1
            in_a_row = 0
        yield result


def finish(watch: Watch) -> None:
    """UserError if too many of all samples cannot be used, or none was kept."""
    _check(watch, so_far=False)
    if not watch.kept.total():
        raise _none_left(watch, "all samples")


def _check(watch: Watch, *, so_far: bool) -> None:
    tally.check(
        watch.kept.total(), watch.bad.total(), watch.bad, watch.max_bad_fraction,
        "--max_bad_fraction", so_far=so_far,
    )  # fmt: skip


def _none_left(watch: Watch, which: str) -> UserError:
    counts = Counter(watch.filtered)
    for (_, reason), count in watch.bad.items():
        counts[reason] += count
    return UserError(
        f"{which} were left out ({tally.listed(counts)} in all); loosen --filter or mend the data"
    )
