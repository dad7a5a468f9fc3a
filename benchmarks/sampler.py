"""Time one call of the few-step sampler: tokens to text, consistency sampling, VAE decoding."""

import pathlib
import sys
from functools import partial

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models, timing
from slam_jax.diffusion import sampler


def call(nets: models.Models, size: models.Size, num_steps: int, key, parameters, prompts):
    """(next key, images [B, H, W, 3]); the noise of every step is drawn here."""
    next_key, noise_key = jax.random.split(key)
    shape = (num_steps, prompts["input_ids"].shape[0], *models.latent_shape(size))
    text = models.encode_text(nets)(parameters["text_encoder"], prompts)
    x_0 = sampler.consistency_sample(
        partial(models.student(nets), parameters["student"]), *models.diffusion(),
        sampler.few_step_times(num_steps), jax.random.normal(noise_key, shape), text,
    )  # fmt: skip
    return next_key, models.decode(nets)(parameters["vae"], x_0)


def arguments(batch: int, parameters: dict) -> tuple:
    """(key, parameters, random token ids)."""
    input_ids = np.random.default_rng(1).integers(0, 700, (batch, 77), np.int32)
    return jax.random.key(0), parameters, {"input_ids": input_ids}


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument(
        "--steps", type=int, choices=range(1, 51), default=4, metavar="1-50", help="student calls"
    )
    options = parser.parse_args()
    size = models.SIZES[options.size]
    nets = models.build(size, jnp.dtype(options.dtype), remat=False)
    shapes = models.parameter_shapes(nets, size)
    del shapes["teacher"]
    function = partial(call, nets, size, options.steps)
    timing.report("sampler", function, partial(arguments, options.batch), shapes, options)


if __name__ == "__main__":
    main()
