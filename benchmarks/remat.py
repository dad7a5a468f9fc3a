"""What each student.remat keeps for the backward pass, and what it computes again: counted.

Of one more image in a batch, from shapes alone. What is kept are the arrays between the forward
and the backward pass, as JAX sees them; XLA may compute some of them again, and needs room beside.
"""

import argparse
import json
import pathlib
import sys
from functools import partial
from typing import Any

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import models, timing
from slam_jax import pipeline
from slam_jax.nets import unet


def counts(size: models.Size, dtype: str, remat: str) -> dict[str, int]:
    """Bytes kept and FLOPs of the student's gradient, for one image."""
    nets = models.nets(size, jnp.dtype(dtype), remat)
    one, two = (_of_batch(size, nets, batch) for batch in (1, 2))
    return {name: two[name] - one[name] for name in one}


def _of_batch(size: models.Size, nets: Any, batch: int) -> dict[str, int]:
    start = jax.eval_shape(partial(models.start, size, jnp.bfloat16), models.parameter_shapes(size))
    text = jax.eval_shape(nets.encode_text, start.text_encoder, models.tokens(size, batch))
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x = floats((batch, *pipeline.latent_shape(size.model, size.image_size)))
    t = jax.ShapeDtypeStruct((batch,), jnp.int32)
    others = (start.teacher, x, t, text, floats((batch, 1, 1, 1)))

    def total(trained: Any, base: Any, *inputs: Any) -> jax.Array:
        return jnp.sum(nets.student(nets.student_params(base, trained), *inputs))

    def backward(trained: Any, *others: Any) -> Any:
        """A function: its leaves are what it remembers."""
        return jax.vjp(lambda trained: total(trained, *others), trained)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, start.student, *others))
    return {
        "kept_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in kept),
        "gradient_flops": timing.count(jax.grad(total), start.student, *others),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=models.SIZES, default="sd15")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    least = None
    for remat in unet.REMAT:
        found = counts(models.SIZES[options.size](), options.dtype, remat)
        least = found["gradient_flops"] if least is None else least
        line = {"program": "remat", **vars(options), "remat": remat, **found}
        line["recomputed_flops"] = found["gradient_flops"] - least
        print(json.dumps(line | timing.surroundings()), flush=True)


if __name__ == "__main__":
    main()
