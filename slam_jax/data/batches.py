"""Shuffled, endless batches as a pure function of (seed, step), through Grain.

Examples are anything with __len__ and example(index, seed) -> Example that raises BadSample for
one that cannot be used: pictures.Pictures or cache.Cache. Nothing here has state: a run resumes
at step n by asking for batch n, on any number of hosts.
"""

import collections
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import resource_tracker
from typing import NamedTuple

import grain
import numpy as np

from slam_jax.data.sample import Example
from slam_jax.data.tally import Dropped
from slam_jax.errors import BadSample, UserError

_PATIENCE = 2000  # samples in a row that may be unusable


class Batch(NamedTuple):
    """One host's rows of a batch, and what happened while they were read."""

    arrays: dict[str, np.ndarray]
    dropped: tuple[Dropped, ...]
    num_cut: int  # captions longer than the tokenizer takes


def batches(
    examples, *, num_examples: int, batch_size: int, seed: int, part: tuple[int, int] = (0, 1)
) -> grain.MapDataset:
    """Batch n is batches(...)[n], for every n: each epoch a new order, no example left out.

    num_examples: at most so many, the first ones. part: (which host this is, how many there are);
    each gets equally many consecutive rows of the same global batch of `batch_size`. A batch may
    span two epochs. seed in [0, 2**32).
    """
    host, num_hosts = part
    total = min(num_examples, len(examples))
    if total == 0:
        raise UserError("the data source has no examples; check the dataset's path or its filter")
    if batch_size % num_hosts:
        raise UserError(f"batch_size {batch_size} does not split over {num_hosts} hosts")
    rows = batch_size // num_hosts

    def read(step: int, indices: np.ndarray) -> Batch:
        first = host * rows
        position = step * batch_size + first
        mine = enumerate(indices[first : first + rows], start=position)
        return _stack([load(examples, total, int(index), (seed, row)) for row, index in mine])

    order = grain.MapDataset.range(total).seed(seed).shuffle().repeat()
    return order.batch(batch_size).map_with_index(read)


def load(examples, total: int, index: int, seed: tuple[int, ...]) -> tuple[Example, list[Dropped]]:
    """The example, or the next good one among the first `total`; and those passed over.

    A function of its arguments alone. UserError where there is none good among many.
    """
    dropped = []
    for ahead in range(min(total, _PATIENCE)):
        try:
            return examples.example((index + ahead) % total, seed), dropped
        except BadSample as bad:
            dropped.append(Dropped(bad.reason, bad.shard, bad.key, bad.filtered))
    counts = collections.Counter(each.reason for each in dropped).most_common()
    raise UserError(
        f"none of {len(dropped)} samples in a row can be used: "
        f"{', '.join(f'{count} {reason}' for reason, count in counts)}; the last was "
        f"{dropped[-1].shard}: {dropped[-1].key}. Loosen data.filters or mend the data"
    )


def _stack(loaded: list[tuple[Example, list[Dropped]]]) -> Batch:
    arrays = [example.arrays for example, _ in loaded]
    return Batch(
        {name: np.stack([each[name] for each in arrays]) for name in arrays[0]},
        tuple(each for _, dropped in loaded for each in dropped),
        sum(example.cut for example, _ in loaded),
    )


def iterate(
    dataset: grain.MapDataset, start_step: int, *,
    num_threads: int, num_workers: int, num_prefetch: int,
) -> Iterator[Batch]:  # fmt: skip
    """Batches start_step, start_step + 1, …, made ahead of time.

    num_threads of this process, or of each of num_workers other ones, read whole batches side by
    side and hold num_prefetch ready; 0 threads make each when asked for. The order never depends
    on any of them. Close the iterator (contextlib.closing) to end threads and processes.
    """
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetch)
    ordered = dataset[start_step:].to_iter_dataset(ahead)
    if num_workers:
        ordered = ordered.mp_prefetch(
            grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=num_prefetch),
            worker_init_fn=partial(_end_with, os.getpid()),
        )
    iterator = iter(ordered)
    try:
        # The first one asked for starts the workers.
        with _children_deaf_to_ctrl_c() if num_workers else contextlib.nullcontext():
            first = list(itertools.islice(iterator, 1))
        yield from first
        yield from iterator
    finally:
        iterator.close()


@contextlib.contextmanager
def _children_deaf_to_ctrl_c() -> Iterator[None]:
    """A terminal tells all processes of it; this one decides what it means.

    Threads and processes inherit what is blocked where they are started.
    """
    resource_tracker.ensure_running()  # which unblocks it when the first process starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(parent: int, _worker: int, _num_workers: int) -> None:
    """Ends this process soon after its parent, which a SIGKILL gives no time to do so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
