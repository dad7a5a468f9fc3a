"""Batches: a pure function of (seed, step), whatever hosts, processes and threads make them."""

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import psutil
import pytest

from slam_jax import errors
from slam_jax.data import batches, sample

EPOCH = 131  # Grain's shuffle is slow for a handful of examples, not for many
ROOT = pathlib.Path(__file__).parents[2]


class Numbered:
    """Examples that carry their index and the seed of their crop; those in `bad` are bad."""

    def __init__(self, size: int = EPOCH, bad=(), filtered=()):
        self.size, self.bad, self.filtered = size, bad, filtered

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, seed: tuple[int, ...]) -> sample.Example:
        time.sleep(0.0003 * (index % 3))  # threads finish out of order
        if index in self.bad or index in self.filtered:
            where = f"shard-{index % 2}", str(index)
            raise errors.BadSample("of no use", *where, filtered=index in self.filtered)
        arrays = {"index": np.int32(index), "seed": np.array(seed)}
        return sample.Example(arrays, cut=index % 10 == 0)


def make(examples=None, seed: int = 3, batch_size: int = 4, part=(0, 1), num_examples=10**9):
    return batches.batches(
        Numbered() if examples is None else examples,
        num_examples=num_examples, batch_size=batch_size, seed=seed, part=part,
    )  # fmt: skip


def indices(dataset, steps) -> list[list[int]]:
    return [dataset[step].arrays["index"].tolist() for step in steps]


def iterate(dataset, start: int, num_threads: int = 3, num_workers: int = 0):
    return contextlib.closing(
        batches.iterate(
            dataset, start, num_threads=num_threads, num_workers=num_workers, num_prefetch=4
        )
    )


def take(dataset, start: int, count: int, **options) -> list:
    with iterate(dataset, start, **options) as iterator:
        return [batch.arrays["index"].tolist() for batch in itertools.islice(iterator, count)]


def grain_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("grain")]


def assert_threads_end() -> None:
    deadline = time.monotonic() + 10
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()


def test_every_epoch_has_every_example_once_in_a_new_order():
    epochs = np.concatenate(indices(make(), range(EPOCH))).reshape(4, EPOCH)
    assert all(sorted(epoch) == list(range(EPOCH)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_the_shuffle_is_global():
    """Neighbours in the files lie anywhere in the epoch: no buffer is that long."""
    order = np.concatenate(indices(make(Numbered(1000), batch_size=500), range(2)))
    steps = np.abs(np.diff(np.argsort(order)))
    assert 280 < steps.mean() < 390  # a third of the epoch: two places at random


def test_order_is_a_function_of_the_seed():
    assert indices(make(seed=3), range(9)) == indices(make(seed=3), range(9))
    assert indices(make(seed=3), range(9)) != indices(make(seed=4), range(9))
    # a seed is not the next one's order, an epoch late
    late = indices(make(seed=3, batch_size=EPOCH), [1])
    assert late != indices(make(seed=4, batch_size=EPOCH), [0])


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_hold_consecutive_rows_of_the_same_batches(num_hosts):
    examples = Numbered(bad={5, 6, 77}, filtered={9})
    whole = make(examples, batch_size=8)
    parts = [make(examples, batch_size=8, part=(host, num_hosts)) for host in range(num_hosts)]
    for step in (0, 1, 16, 33, 10**6):
        shares = [part[step] for part in parts]
        for name, rows in whole[step].arrays.items():
            np.testing.assert_array_equal(
                np.concatenate([share.arrays[name] for share in shares]), rows
            )
        assert sum((share.dropped for share in shares), ()) == whole[step].dropped
        assert sum(share.num_cut for share in shares) == whole[step].num_cut


def test_crops_have_seeds_of_their_own_in_every_epoch():
    seeds = [tuple(row) for step in range(EPOCH) for row in make()[step].arrays["seed"].tolist()]
    assert seeds == [(3, position) for position in range(4 * EPOCH)]


@pytest.mark.parametrize("start", [0, 1, 7, 20])
@pytest.mark.parametrize("num_threads", [3, 1, 0])
def test_resuming_equals_going_straight_through(start, num_threads):
    straight = indices(make(), range(25))
    assert take(make(), start, 25 - start, num_threads=num_threads) == straight[start:]


def test_a_far_step_is_reached_at_once():
    begin = time.monotonic()
    assert take(make(), 10**9, 2) == indices(make(), [10**9, 10**9 + 1])
    assert time.monotonic() - begin < 5


def test_a_batch_may_hold_more_than_an_epoch():
    batch = make(Numbered(3), batch_size=7)[0]
    assert sorted(np.bincount(batch.arrays["index"])) == [2, 2, 3]


def test_only_the_first_num_examples_are_taken():
    examples = Numbered(bad={9})  # whose place number 0 takes, not 10
    taken = np.concatenate(indices(make(examples, num_examples=10), range(20)))
    assert np.bincount(taken).tolist() == [16, *[8] * 8]


def test_a_bad_sample_is_replaced_by_the_next_good_one():
    bad, filtered = {4, 5, 130}, {6}
    clean, holed = make(), make(Numbered(bad=bad, filtered=filtered))
    replacement = {4: 7, 5: 7, 6: 7, 130: 0}
    seen = []
    for step in range(EPOCH):
        expected = [replacement.get(i, i) for i in clean[step].arrays["index"].tolist()]
        assert holed[step].arrays["index"].tolist() == expected
        seen += [int(dropped.key) for dropped in holed[step].dropped]
        assert all(
            dropped == ("of no use", f"shard-{int(dropped.key) % 2}", dropped.key,
                        int(dropped.key) in filtered)
            for dropped in holed[step].dropped
        )  # fmt: skip
    # In each of the four epochs: 4 5 6 for 4, 5 6 for 5, 6 for 6.
    assert sorted(seen) == sorted(4 * [4, 5, 6, 5, 6, 6, 130])


def test_cut_captions_are_counted():
    step = make(batch_size=EPOCH)[0]
    assert step.num_cut == 14


def test_where_nothing_is_left_it_stops_at_once_with_the_counts():
    begin = time.monotonic()
    with pytest.raises(errors.UserError, match="none of 131 samples in a row .* 131 of no use"):
        take(make(Numbered(filtered=range(EPOCH))), 0, 1)
    with pytest.raises(errors.UserError, match="none of 2000 samples.*shard-.*data.filters"):
        take(make(Numbered(10**12, filtered=range(10**12))), 0, 1, num_threads=0)
    assert time.monotonic() - begin < 10


def test_closing_ends_the_threads_however_the_loop_ends():
    take(make(), 0, 3)
    with pytest.raises(RuntimeError, match="the loop"), iterate(make(), 0) as iterator:
        next(iterator)
        assert grain_threads()
        raise RuntimeError("the loop")
    assert_threads_end()


def test_an_error_in_the_source_reaches_the_caller_and_ends_the_threads():
    class Broken(Numbered):
        def example(self, index, seed):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        take(make(Broken()), 0, 1)
    assert_threads_end()  # although the traceback still holds the iterator
    del caught


def test_an_empty_source_is_refused():
    with pytest.raises(errors.UserError, match="no examples"):
        make(Numbered(0))


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(errors.UserError, match="batch_size 6 does not split over 4 hosts"):
        make(batch_size=6, part=(0, 4))


PROCESSES = """
import json, pathlib, sys
from absl import flags
from slam_jax.data import batches, filters, image, pictures, shapes2d, text_inputs

if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    host, num_hosts, start, num_workers = map(int, sys.argv[1:5])
    tokens = text_inputs.read(pathlib.Path("assets/tiny_sd/tokenizer"), None)
    crop = image.Crop(32, random=True, flip=True)
    wanted = filters.parse(["short_side <= 31" if num_workers == 9 else "short_side >= 32"])
    found = pictures.Pictures(shapes2d.Shapes2D(32, 50, 0), wanted, crop, tokens)
    dataset = batches.batches(
        found, num_examples=50, batch_size=8, seed=1, part=(host, num_hosts)
    )
    made = batches.iterate(
        dataset, start, num_threads=2, num_workers=num_workers % 7, num_prefetch=2
    )
    for step in range(start, 10**9 if num_workers == 8 else 6):
        arrays = next(made).arrays
        rows = [arrays[name].astype(int).tolist() for name in sorted(arrays)]
        print(json.dumps([step, *rows]), flush=True)
    made.close()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "hosts.py"
    path.write_text(PROCESSES)
    return path


def run(program, *arguments: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_processes_on_any_number_of_hosts_make_the_same_batches(program):
    """Real processes with worker processes of their own, one of them resumed at step 3."""
    cases = [(0, 1, 0, 0), (0, 2, 0, 1), (1, 2, 0, 2), (1, 4, 3, 0)]
    running = [run(program, *case) for case in cases]
    made = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        made.append({step: arrays for step, *arrays in map(json.loads, out.splitlines())})
    whole, first, second, quarter = made
    for step, arrays in whole.items():
        for name, rows in enumerate(arrays):
            assert first[step][name] + second[step][name] == rows
            assert step < 3 or quarter[step][name] == rows[2:4]


def test_an_error_in_a_worker_process_reaches_the_caller(program):
    process = run(program, 0, 1, 0, 9)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "UserError: none of 50 samples in a row can be used: 50 short_side > 31" in err


def test_worker_processes_end_with_a_killed_parent(program):
    process = run(program, 0, 1, 0, 8)  # one worker, and more batches than it will see
    process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("spawn_main" in " ".join(child.cmdline()) for child in children)
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_grain_seeds_are_not_ours_to_shift():
    """The order is Grain's for this seed: a new version of it must not reorder old runs."""
    order = grain.MapDataset.range(10).seed(0).shuffle()
    assert [int(order[i]) for i in range(10)] == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3]
