"""When too many samples are bad."""

import collections

import pytest

from slam_jax.data import tally
from slam_jax.errors import UserError


def dropped(shard, reason="damaged picture", count=1, filtered=False):
    return [tally.Dropped(reason, shard, str(i), filtered) for i in range(count)]


def check(num_good, num_bad, bad, *, so_far=True):
    tally.check(num_good, num_bad, bad, 0.01, "data.max_bad_fraction", so_far=so_far)


def test_counts_tell_bad_from_filtered():
    left_out = dropped("a", count=3) + dropped("a", filtered=True)
    counted = dict(zip(tally.COUNTED, tally.counts(4, left_out, 5).tolist(), strict=True))
    assert counted == {
        "good_samples": 4, "bad_samples": 3, "filtered_samples": 1, "cut_captions": 5,
    }  # fmt: skip


def test_bad_ones_are_counted_by_shard_and_reason():
    left_out = dropped("a", count=2) + dropped("b") + dropped("b", "aspect > 2", filtered=True)
    assert tally.of_shards(left_out) == {("a", "damaged picture"): 2, ("b", "damaged picture"): 1}


# Of a thousand 10 are allowed, 3 standard deviations are 9.5; of ten thousand 100 and 30.
@pytest.mark.parametrize(
    ("num_good", "num_bad", "so_far", "stops"),
    [
        (0, 19, True, False), (0, 20, True, True), (9871, 129, True, False),
        (9869, 131, True, True), (0, 0, False, False), (99, 1, False, False),
        (98, 1, False, True), (9899, 101, False, True),
    ],
)  # fmt: skip
def test_stops_above_the_fraction(num_good, num_bad, so_far, stops):
    bad = tally.of_shards(dropped("a", count=num_bad))
    if stops:
        told = f"{num_bad} of {num_good + num_bad:,} samples cannot be used, more than data.max_bad"
        with pytest.raises(UserError, match=told):
            check(num_good, num_bad, bad, so_far=so_far)
    else:
        check(num_good, num_bad, bad, so_far=so_far)


def test_the_worst_shards_are_named_with_their_reasons():
    bad = collections.Counter()
    for number in range(9):
        bad += tally.of_shards(dropped(f"shard-{number}", count=number + 1))
    bad += tally.of_shards(dropped("shard-3", "missing caption", 20))
    with pytest.raises(UserError) as caught:
        check(0, 65, bad)
    assert (
        "the worst shards are shard-3 (20 missing caption, 4 damaged picture); "
        "shard-8 (9 damaged picture); shard-7 (8 damaged picture); shard-6 (7 damaged picture); "
        "shard-5 (6 damaged picture): mend"
    ) in str(caught.value)


def test_a_host_that_saw_none_of_them_says_so():
    with pytest.raises(UserError, match="the worst shards are known to other hosts: mend"):
        check(0, 65, collections.Counter())
