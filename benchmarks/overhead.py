"""Time what the training loop adds to a step: input, dispatch, fetching metrics, logging.

slam_jax.loop runs as in training, from a cache of latents on disk, with a step that takes and
returns as many arrays as the model's, each of one number: its arithmetic takes next to nothing, so
what is left is the host's. On an accelerator the host does this while the device computes; only
where it takes longer than the device does it show. It is no figure of a GPU or TPU: the share is of
the least time that a step of the model can take there. With --device_ms the step also keeps a
thread busy for so long, as a device that computes would be: what a step takes beyond that shows.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from functools import partial
from typing import Any

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks import models, recipe, roofline, synthetic, timing
from configs import sd15
from slam_jax import experiment, loop, pipeline, settings
from slam_jax.distill import state
from slam_jax.runtime import checkpoint, log, mesh, weights_and_biases
from slam_jax.settings import Settings

_WARM_UP = 20


def _settings(options: argparse.Namespace) -> Settings:
    """Of configs/sd15.py, ending before the first picture and checkpoint."""
    config = sd15.get_config().to_dict()
    config |= {"batch_size": options.batch, "num_steps": _WARM_UP + options.repeat + 1}
    config["data"] |= {"num_threads": min(16, os.cpu_count())}
    config["eval"] |= {"every_steps": 10**9, "prompts": ("",)}
    config["checkpoint"] |= {"every_steps": 10**9}
    return settings.from_config(config)


def _small_step(
    now: state.TrainState, frozen: Any, batch: dict, key: jax.Array, turns: jax.Array
) -> tuple:
    """Every array is changed, or JAX would not pass it to the device at all.

    turns: of a loop that is in the way of the next step, as a device's work would be.
    """
    after = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), now)
    worked = _loop(turns, now.step.astype(jnp.float32))
    after = after.replace(step=after.step + (0 * worked).astype(jnp.int32))
    seen = sum(leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves((frozen, batch)))
    loss = jax.random.uniform(key) + 0 * seen
    metrics = {name: loss for name in ("loss", "grad_norm", "update_norm")}
    return after, metrics | {"skipped": 0 * loss}


def _loop(turns: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, turns, lambda _, x: jnp.sin(x), x)


def _turns(milliseconds: float) -> np.int32:
    """Of a loop that takes so long here."""
    loop, many = jax.jit(_loop), np.int32(10**6)
    loop(many, np.float32(1)).block_until_ready()
    started = time.perf_counter()
    loop(many, np.float32(1)).block_until_ready()
    return np.int32(milliseconds * many / (1e3 * (time.perf_counter() - started)))


def _arguments(size: models.Size, batch: int) -> tuple:
    """(state, frozen, key), a number in the place of every array."""
    nets = models.nets(size, jnp.bfloat16)
    examples = models.examples(size, batch, cached=True)
    whole = partial(recipe.arguments, size, nets, jnp.dtype("bfloat16"), examples)
    now, frozen, _, _ = jax.eval_shape(whole, models.parameter_shapes(size))
    one = partial(jax.tree.map, lambda leaf: np.zeros((), leaf.dtype))
    return *jax.device_put((one(now), one(frozen))), jax.random.key(0)


def measure(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds between one step's start and the next's, and their parts."""
    size, chosen = models.SIZES[options.size](), _settings(options)
    devices = mesh.make(chosen.mesh.axes, jax.devices()[:1])
    side, _, _ = pipeline.latent_shape(size.model, size.image_size)
    cached = synthetic.latents(folder / "cache", 4 * options.batch, side, per_shard=options.batch)
    now, frozen, key = _arguments(size, options.batch)
    put = partial(mesh.put_batch, accumulate=1, mesh=devices)
    step = jax.jit(_small_step, donate_argnums=0)
    turns = jax.device_put(_turns(options.device_ms))
    starts, ends = [], []

    def timed(now: state.TrainState, arrays: dict) -> tuple:
        starts.append(time.perf_counter())
        result = step(now, frozen, put(arrays), key, turns)
        ends.append(time.perf_counter())
        return result

    with log.bar(0, chosen.num_steps) as progress:
        checkpoints = checkpoint.manager(folder / "checkpoints", keep=1, keep_every=0)
        with checkpoint.closing(checkpoints, partial(log.say, progress)):
            run = loop.Run(
                chosen, folder, experiment.dataset(chosen, cached, (0, 1)), timed,
                mesh.total(devices), _draw, checkpoints, _nothing, weights_and_biases.nowhere,
                progress,
            )  # fmt: skip
            loop.to_the_end(run, lambda _: now, 0)
    arrays = len(jax.tree.leaves((now, frozen)))
    return {"arrays": arrays, **_figures(np.array(starts), np.array(ends))}


def _figures(starts: np.ndarray, ends: np.ndarray) -> dict[str, float]:
    """Of the steps after the warm-up. The last, which draws and saves, does not count."""
    whole = 1e3 * np.diff(starts)[_WARM_UP:]
    dispatch = 1e3 * (ends - starts)[_WARM_UP:-1]
    return {
        "ms": round(float(np.mean(whole)), 3),
        "ms_median": round(float(np.median(whole)), 3),
        "ms_q1": round(float(np.quantile(whole, 0.25)), 3),
        "ms_q3": round(float(np.quantile(whole, 0.75)), 3),
        "ms_put_and_dispatch": round(float(np.mean(dispatch)), 3),
        "ms_input_and_logging": round(float(np.mean(whole - dispatch)), 3),
    }


def _draw(target: Any) -> np.ndarray:
    """In the place of the samples after the last step."""
    del target
    return np.zeros((1, 2, 8, 8, 3), np.float32)


def _nothing() -> None:
    """In the place of the copy to a bucket."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=models.SIZES, default="sd15")
    parser.add_argument("--batch", type=timing.positive, default=16, help="images per step")
    parser.add_argument("--repeat", type=timing.positive, default=300, help="steps that count")
    parser.add_argument(
        "--device_ms", type=float, default=0, help="how long a device computes a step meanwhile"
    )
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(pathlib.Path(folder), options)
    chip = roofline.MEASURED
    least = 1e3 * options.batch * roofline.counts(models.SIZES[options.size]()).cached / chip.flops
    line = {
        "program": "overhead", **vars(options), **figures, "limit_of": chip.name,
        "limit_ms": round(least, 2), "share_of_limit": round(figures["ms"] / least, 4),
        "cpus": os.cpu_count(), **timing.surroundings(),
    }  # fmt: skip
    if options.device_ms:
        line["share_shown"] = round(figures["ms"] / options.device_ms - 1, 4)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
