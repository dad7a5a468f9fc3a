"""Whether points of the sub-path teach what its noisy end teaches (GAMMA.md §5), on assets/tiny_sd.

    python benchmarks/gamma_gradients.py --length 100 --stride 20

For each form of the point, at the start and after steps of training with gamma ~ U(0, 1]: the loss
at each gamma, and the cosine between its gradient and that of gamma = 1. Prints a line of JSON for
each.
"""

import argparse
import json
import pathlib
import sys

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import optax

from benchmarks import laboratory

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
# (sigma, first guess of the layer that takes gamma)
FORMS = (
    ("markov", "random"), ("markov", "zero"), ("ddim", "zero"), ("fixed", "zero"),
    ("matched", "zero"),
)  # fmt: skip
_NUM_EXAMPLES = 256


def _cosines(gradient, params, found: laboratory.Examples) -> tuple[list[float], list[float]]:
    """Losses and cosines, one for each of GAMMAS, of the mean gradient over the examples."""
    losses, mean_gradients = [], []
    for gamma in GAMMAS:
        total = None
        for first in range(0, _NUM_EXAMPLES, laboratory.BATCH_SIZE):
            rows = slice(first, first + laboratory.BATCH_SIZE)
            ends, text = jax.tree.map(lambda x, rows=rows: jax.device_put(x[rows]), tuple(found))
            at = jnp.full((laboratory.BATCH_SIZE, 1, 1, 1), gamma)
            now = gradient(params, params, ends, text, at)
            total = now if total is None else jax.tree.map(jnp.add, total, now)
        losses.append(float(total[0]) * laboratory.BATCH_SIZE / _NUM_EXAMPLES)
        mean_gradients.append(total[1])
    end = mean_gradients[-1]
    lengths = [float(optax.tree.norm(each)) for each in mean_gradients]
    products = [float(optax.tree.vdot(each, end)) for each in mean_gradients]
    # Without a gradient there is no direction.
    return losses, [
        product / (length * lengths[-1]) if length > 1e-6 * lengths[-1] else float("nan")
        for product, length in zip(products, lengths, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=20, help="of a sub-path")
    parser.add_argument("--stride", type=int, default=20, help="of the teacher's solver")
    parser.add_argument("--steps", type=int, default=100, help="of training; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lab = laboratory.enter()
    walk = {"length": options.length, "stride": options.stride}
    teacher = laboratory.method(lab, **walk)
    held = laboratory.examples(lab, teacher, 7000 + options.seed, _NUM_EXAMPLES)
    count = options.steps * laboratory.BATCH_SIZE
    seen = laboratory.examples(lab, teacher, options.seed, count) if count else None
    for sigma, cond_proj in FORMS:
        method = laboratory.method(lab, **walk, sigma=sigma, gamma=("uniform",))
        gradient = jax.jit(
            jax.value_and_grad(laboratory.mean_loss(laboratory.network(lab), method))
        )
        students = {0: laboratory.start(lab, cond_proj, options.seed)}
        if seen is not None:
            fresh = laboratory.start(lab, cond_proj, options.seed)
            students[options.steps], _ = laboratory.train(
                lab, method, fresh, seen, seed=options.seed, num_steps=options.steps, ema_rate=0.95
            )
        for steps, params in students.items():
            losses, cosines = _cosines(gradient, params, held)
            line = {
                "program": "gamma_gradients", **walk, "sigma": sigma, "cond_proj": cond_proj,
                "steps": steps, "seed": options.seed, "gammas": GAMMAS, "losses": losses,
                "cosines": cosines,
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
