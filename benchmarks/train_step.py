"""Time one train step: VAE and text encoding, teacher, student, target, gradient, AdamW, EMA."""

import argparse
import pathlib
import sys
from functools import partial

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import models, recipe, timing
from slam_jax import pipeline
from slam_jax.distill import loss, step
from slam_jax.nets import unet
from slam_jax.runtime import apart, mesh

# Steps before the clock runs. All implementations draw the same in them, and print their losses.
_UNTIMED = 2


def _jax(
    nets: step.Nets, chosen: loss.Method, inputs: tuple, num_devices: int
) -> timing.Runner:  # fmt: skip
    """Examples spread over the devices, all else copied to each of them."""
    devices = mesh.make((("data", num_devices),), jax.devices()[:num_devices])
    everywhere, spread = mesh.replicated(devices), mesh.batch_sharding(devices)
    placed = jax.device_put(inputs, (everywhere, everywhere, spread, everywhere))
    program = recipe.train_step(nets, chosen, apart.over_devices(devices, rules=()))
    runner = timing.of_jax(program, placed)
    losses = [float(jax.device_get(runner.call()["loss"])) for _ in range(_UNTIMED)]
    return runner._replace(figures=runner.figures | {"first_losses": losses})


def _torch(
    size: models.Size, chosen: loss.Method, options: argparse.Namespace, parameters: dict,
    examples: dict, null_text, *, compiled: bool,
) -> timing.Runner:  # fmt: skip
    # Here, since a machine without torch and diffusers runs the rest.
    from benchmarks import torch_step

    stepper = torch_step.build(
        size, models.start(size, jnp.float32, parameters), null_text, dtype=options.dtype,
        solver_steps=options.steps, remat=options.remat != "none",
        compile_mode=options.compile_mode if compiled else None,
    )  # fmt: skip
    x_0 = jnp.zeros((options.batch, *pipeline.latent_shape(size.model, size.image_size)))
    first = [jax.device_get(recipe.draws(number, x_0, chosen)) for number in range(_UNTIMED)]
    return torch_step.runner(stepper, examples, first)


def _flops(size: models.Size, chosen: loss.Method, options: argparse.Namespace) -> int:
    """Of the algorithm: nothing is recomputed, whatever the options say."""
    dtype = jnp.dtype(options.dtype)
    nets = models.nets(size, dtype)
    examples = models.examples(size, options.batch, options.cached)
    arguments = partial(recipe.arguments, size, nets, dtype, examples)
    shapes = jax.eval_shape(arguments, models.parameter_shapes(size))
    return timing.count(recipe.train_step(nets, chosen), *shapes)


def _runners(
    size: models.Size, chosen: loss.Method, options: argparse.Namespace
) -> dict[str, timing.Runner]:
    dtype = jnp.dtype(options.dtype)
    nets = models.nets(size, dtype, options.remat, options.attention)
    parameters = models.random_parameters(models.parameter_shapes(size))
    examples = models.examples(size, options.batch, options.cached)
    runners = {}
    for name in options.impl:
        if name == "jax":
            inputs = recipe.arguments(size, nets, dtype, examples, parameters)
            runners[name] = _jax(nets, chosen, inputs, options.devices)
        else:
            runners[name] = _torch(
                size, chosen, options, parameters, examples, models.null_text(size, nets),
                compiled=name == "torch_compile",
            )  # fmt: skip
    return runners


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument(
        "--steps", type=timing.positive, default=1, help="solver steps of the teacher's walk"
    )
    parser.add_argument(
        "--remat", choices=unet.REMAT, default="none", help="computed again going backwards"
    )
    parser.add_argument(
        "--devices", type=timing.positive, default=1, help="JAX's, which share the batch"
    )
    parser.add_argument("--cached", action="store_true", help="latents as a cache holds them")
    options = parser.parse_args()
    if options.devices > jax.device_count() or options.batch % options.devices:
        parser.error(
            f"--devices {options.devices} must divide --batch {options.batch} and be at most the "
            f"{jax.device_count()} that are here (on a CPU: JAX_NUM_CPU_DEVICES)"
        )
    size = models.SIZES[options.size]()
    chosen = recipe.method(size, options.steps)
    shared = {
        "flops": _flops(size, chosen, options),
        "parameters": models.counts(size),
    }
    runners = {} if options.dry_run else _runners(size, chosen, options)
    timing.report("train_step", options, shared, runners)


if __name__ == "__main__":
    main()
