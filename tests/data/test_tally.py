"""When too many samples are bad."""

import collections

import pytest

from slam_jax.data import tally
from slam_jax.errors import UserError


def dropped(shard, reason="damaged picture", count=1, filtered=False):
    return [tally.Dropped(reason, shard, str(i), filtered) for i in range(count)]


def test_counts_what_was_read_and_what_was_left_out():
    counted = tally.add(tally.EMPTY, 4, dropped("a") + dropped("b", "aspect > 2", 2, filtered=True))
    counted = tally.add(counted, 3, dropped("a") + dropped("b"))
    assert counted.num_read == 4 + 1 + 2 + 3 + 1 + 1
    assert counted.bad == {("a", "damaged picture"): 2, ("b", "damaged picture"): 1}
    assert counted.filtered == {"aspect > 2": 2}
    assert (0, collections.Counter(), collections.Counter()) == tally.EMPTY


def test_a_log_line_tells_bad_from_filtered():
    left_out = dropped("a", count=3) + dropped("a", filtered=True)
    assert tally.summary(left_out, 5) == {
        "bad_samples": 3, "filtered_samples": 1, "cut_captions": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_kept", "num_bad", "stops"),
    [(0, 10, False), (0, 11, True), (1980, 20, False), (1979, 21, True), (10**6, 500, False)],
)
def test_stops_above_the_fraction_of_at_least_a_thousand(num_kept, num_bad, stops):
    counted = tally.add(tally.EMPTY, num_kept, dropped("a", count=num_bad))
    if stops:
        with pytest.raises(UserError, match=f"{num_bad} of {num_kept + num_bad} samples are bad"):
            tally.check(counted, 0.01)
    else:
        tally.check(counted, 0.01)


def test_filtered_samples_are_not_bad():
    tally.check(tally.add(tally.EMPTY, 0, dropped("a", count=999, filtered=True)), 0.0)


def test_the_worst_shards_are_named_with_their_reasons():
    counted = tally.EMPTY
    for number in range(9):
        counted = tally.add(counted, 0, dropped(f"shard-{number}", count=number + 1))
    counted = tally.add(counted, 0, dropped("shard-3", "missing caption", 20))
    with pytest.raises(UserError) as caught:
        tally.check(counted, 0.01)
    assert (
        "the worst shards are shard-3 (20 missing caption, 4 damaged picture); "
        "shard-8 (9 damaged picture); shard-7 (8 damaged picture); shard-6 (7 damaged picture); "
        "shard-5 (6 damaged picture): mend"
    ) in str(caught.value)
