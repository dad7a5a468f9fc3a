"""Shuffled, endless batches as a pure function of (seed, step), through Grain.

A source is anything with __len__ and __getitem__(index) -> {"image": uint8 [H, W, 3],
"caption": str}. Nothing here has state: a run resumes at step n by asking for batch n.
"""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from slam_jax.data import image as images
from slam_jax.data import text_inputs
from slam_jax.errors import UserError


def decode(tokenizers: text_inputs.Tokenizers, example: dict) -> dict[str, np.ndarray]:
    """{"image": float32 [H, W, 3] in [-1, 1], "input_ids": int32 [L]}, for SDXL more.

    See text_inputs.Tokenizers. The end of a caption longer than the tokenizer's length is dropped.
    """
    pixels = images.normalize(example["image"])
    text = tokenizers.encode([example["caption"]], pixels.shape[:2])
    return {"image": pixels, **{name: rows[0] for name, rows in text.items()}}


def batches(
    source, *, batch_size: int, seed: int, transform: Callable[[dict], dict[str, np.ndarray]]
) -> grain.MapDataset:
    """Batch n is batches(...)[n], for every n: each epoch a new order, no example left out.

    transform: example -> arrays of fixed shapes, such as functools.partial(decode, tokenizers).
    A batch may span two epochs. seed in [0, 2**32).
    """
    if len(source) == 0:
        raise UserError("the data source has no examples; check the dataset's path or its filter")
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return examples.map(transform).batch(batch_size, drop_remainder=True)


def iterate(
    dataset: grain.MapDataset, start_step: int, *, num_threads: int, num_prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches start_step, start_step + 1, …, made ahead of time by threads.

    num_prefetch: batches held ready; 0 threads make each batch when asked for. The order never
    depends on either. Close the iterator (contextlib.closing) to end the threads.
    """
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetch)
    iterator = iter(dataset[start_step:].to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
