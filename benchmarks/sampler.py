"""Time one call of the few-step sampler: tokens to text, consistency sampling, VAE decoding."""

import argparse
import pathlib
import sys
from collections.abc import Callable
from functools import partial

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import models, timing
from slam_jax import pipeline
from slam_jax.diffusion import sampler
from slam_jax.distill import step

_UNTIMED = 2


def call(
    size: models.Size, nets: step.Nets, decode: Callable, num_steps: int, key, parameters, prompts
):  # fmt: skip
    """(next key, what decode returns); the noise of every step is drawn here."""
    next_key, noise_key = jax.random.split(key)
    latent = pipeline.latent_shape(size.model, size.image_size)
    noise = jax.random.normal(noise_key, (num_steps, prompts["input_ids"].shape[0], *latent))
    text = nets.encode_text(parameters["text_encoder"], prompts)
    student = nets.student_params(parameters["teacher"], parameters["student"])
    x_0 = sampler.consistency_sample(
        partial(nets.student, student), *models.diffusion(size),
        sampler.few_step_times(num_steps), noise, text,
    )  # fmt: skip
    return next_key, decode(parameters["vae"], x_0)


def _decode(size: models.Size, options: argparse.Namespace) -> Callable:
    if options.no_decode:
        return lambda _, latent: latent
    return pipeline.decode(size.model.vae.config, jnp.dtype(options.dtype))


def _parameters(size: models.Size, options: argparse.Namespace, parameters: dict) -> dict:
    """As they are kept for sampling: nothing is trained, so nothing need be float32."""
    start = models.start(size, jnp.dtype(options.dtype), parameters)._asdict()
    if size.lora:
        return start
    keep = models.at_rest(jnp.dtype(options.dtype))
    return start | {"student": keep(start["student"]), "teacher": {}}


def _runners(
    size: models.Size, function: Callable, options: argparse.Namespace
) -> dict[str, timing.Runner]:
    prompts = models.tokens(size, options.batch)
    parameters = models.random_parameters(models.parameter_shapes(size))
    runners = {}
    for name in options.impl:
        if name == "jax":
            inputs = jax.random.key(0), _parameters(size, options, parameters), prompts
            runners[name] = timing.of_jax(function, jax.device_put(inputs))
        else:
            # Here, since a machine without torch and diffusers runs the rest.
            from benchmarks import torch_sampler

            runners[name] = torch_sampler.runner(
                size, models.start(size, jnp.float32, parameters), prompts,
                dtype=options.dtype, num_steps=options.steps, decodes=not options.no_decode,
                compile_mode=options.compile_mode if name == "torch_compile" else None,
            )  # fmt: skip
        for _ in range(_UNTIMED):
            runners[name].call()
    return runners


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument(
        "--steps", type=int, choices=range(1, 51), default=4, metavar="1-50", help="student calls"
    )
    parser.add_argument("--no_decode", action="store_true", help="latents, not images")
    options = parser.parse_args()
    size = models.SIZES[options.size]()
    functions = {
        name: partial(
            call, size, models.nets(size, jnp.dtype(options.dtype), attention=name),
            _decode(size, options), options.steps,
        )
        for name in ("xla", options.attention)
    }  # fmt: skip
    shapes = jax.eval_shape(partial(_parameters, size, options), models.parameter_shapes(size))
    key = jax.eval_shape(partial(jax.random.key, 0))
    prompts = jax.eval_shape(lambda: models.tokens(size, options.batch))
    shared = {
        "flops": timing.count(functions["xla"], key, shapes, prompts),
        "parameters": {name: models.count(tree) for name, tree in shapes.items() if tree},
    }
    runners = {} if options.dry_run else _runners(size, functions[options.attention], options)
    timing.report("sampler", options, shared, runners)


if __name__ == "__main__":
    main()
