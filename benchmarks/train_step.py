"""Time one train step: VAE and text encoding, teacher, student, target, gradient, AdamW, EMA."""

import pathlib
import sys
from functools import partial

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models, timing
from slam_jax.diffusion import solver, subpath
from slam_jax.distill import gamma, loss, optimizer, state, step

ADAMW = optimizer.adamw(8e-6, 0, 1.0, 0.0, 0.9, 0.999, 1e-8)


def method(solver_steps: int) -> loss.Method:
    """SPLAM as released, with sub-paths of `solver_steps` steps of the teacher's solver."""
    schedule, prediction = models.diffusion()
    return loss.checked(
        loss.Method(
            schedule, prediction, solver.start_grid(50, 1000), 20 * solver_steps, 20, 8.0,
            subpath.told_t(subpath.sigma_markov), loss.pseudo_huber(1e-3), gamma.uniform,
        )
    )  # fmt: skip


def arguments(size: models.Size, batch: int, parameters: dict) -> tuple:
    """(state, frozen, batch, key), the batch of one microbatch of random pixels and tokens."""
    rng = np.random.default_rng(1)
    side, width = size.image_size, size.unet["cross_attention_dim"]
    frozen = state.Frozen(
        teacher=parameters["teacher"],
        vae=parameters["vae"],
        text_encoder=parameters["text_encoder"],
        null_text=jnp.asarray(rng.standard_normal((1, 77, width), np.float32)),
    )
    examples = {
        "image": rng.integers(0, 256, (1, batch, side, side, 3), np.uint8),
        "input_ids": rng.integers(0, 700, (1, batch, 77), np.int32),
    }
    start = jax.jit(state.init, static_argnums=1)(parameters["student"], ADAMW)
    return start, frozen, examples, jax.random.key(0)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument(
        "--steps", type=timing.positive, default=1, help="solver steps of the teacher's walk"
    )
    parser.add_argument("--remat", action="store_true", help="recompute blocks going backwards")
    options = parser.parse_args()
    size = models.SIZES[options.size]
    nets = models.build(size, jnp.dtype(options.dtype), options.remat)
    function = partial(
        step.train_step, nets=models.training_nets(nets), method=method(options.steps),
        optimizer=ADAMW, ema_rate=0.95, num_steps=1000, max_grad_norm=1e3,
    )  # fmt: skip
    shapes = models.parameter_shapes(nets, size)
    timing.report("train_step", function, partial(arguments, size, options.batch), shapes, options)


if __name__ == "__main__":
    main()
