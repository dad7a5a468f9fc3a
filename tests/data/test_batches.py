"""Batches: a pure function of (seed, step), whatever threads make them."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from slam_jax import errors
from slam_jax.data import batches, text_inputs, tokenizer

EPOCH = 131  # Grain's shuffle is slow for a handful of examples, not for many


class Numbered:
    """Source whose picture and caption carry the example's index."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        time.sleep(0.0003 * (index % 3))  # threads finish out of order
        return {"image": np.full((2, 4, 3), index, np.uint8), "caption": str(index)}


def with_index(example: dict) -> dict:
    return {"image": example["image"] / np.float32(255), "index": np.int32(example["caption"])}


def make(seed: int = 3, size: int = EPOCH, batch_size: int = 4):
    return batches.batches(Numbered(size), batch_size=batch_size, seed=seed, transform=with_index)


def indices(dataset, steps) -> list[list[int]]:
    return [dataset[step]["index"].tolist() for step in steps]


def take(dataset, start: int, count: int, num_threads: int = 3, num_prefetch: int = 4) -> list:
    made = batches.iterate(dataset, start, num_threads=num_threads, num_prefetch=num_prefetch)
    with contextlib.closing(made) as iterator:
        return [batch["index"].tolist() for batch in itertools.islice(iterator, count)]


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


def test_order_is_a_function_of_the_seed():
    assert indices(make(seed=3), range(9)) == indices(make(seed=3), range(9))
    assert indices(make(seed=3), range(9)) != indices(make(seed=4), range(9))
    # a seed is not the next one's order, an epoch late
    late = indices(make(seed=3, batch_size=EPOCH), [1])
    assert late != indices(make(seed=4, batch_size=EPOCH), [0])


@pytest.mark.parametrize("start", [0, 1, 7, 20])
@pytest.mark.parametrize("num_threads, num_prefetch", [(3, 4), (1, 1), (0, 0)])
def test_resuming_equals_going_straight_through(start, num_threads, num_prefetch):
    straight = indices(make(), range(25))
    assert take(make(), start, 25 - start, num_threads, num_prefetch) == straight[start:]


def test_a_far_step_is_reached_at_once():
    begin = time.monotonic()
    assert take(make(), 10**9, 2) == indices(make(), [10**9, 10**9 + 1])
    assert time.monotonic() - begin < 5


def test_a_batch_is_a_dict_of_stacked_arrays():
    batch = make(size=3, batch_size=5)[0]  # more than an epoch in one batch
    assert batch["image"].shape == (5, 2, 4, 3) and batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] * 255, batch["index"])


def test_closing_ends_the_threads_however_the_loop_ends():
    take(make(), 0, 3)
    with pytest.raises(RuntimeError, match="the loop"):
        iterator = batches.iterate(make(), 0, num_threads=3, num_prefetch=4)
        with contextlib.closing(iterator):
            next(iterator)
            assert grain_threads()
            raise RuntimeError("the loop")
    assert_threads_end()


def test_an_error_in_the_source_reaches_the_caller_and_ends_the_threads():
    class Broken(Numbered):
        def __getitem__(self, index):
            raise OSError("disk gone")

    dataset = batches.batches(Broken(5), batch_size=2, seed=0, transform=with_index)
    with pytest.raises(OSError, match="disk gone") as caught:
        take(dataset, 0, 1)
    assert_threads_end()  # although the traceback still holds the iterator
    del caught


def test_an_empty_source_is_refused():
    with pytest.raises(errors.UserError, match="no examples"):
        make(size=0)


def test_decode_gives_the_range_of_the_networks():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 5, "cat": 6}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = tokenizer.Tokenizer(words, bos=1, eos=2, pad=0, length=6)
    image = np.array([[[0, 51, 255]]], np.uint8)
    example = {"image": image, "caption": "a cat"}
    out = batches.decode(text_inputs.Tokenizers(encoder, None), example)
    np.testing.assert_allclose(out["image"], [[[-1, -0.6, 1]]], rtol=0, atol=1e-6)
    assert out["image"].dtype == np.float32 and out["input_ids"].dtype == np.int32
    assert out["input_ids"].tolist() == [1, 5, 6, 2, 0, 0]
