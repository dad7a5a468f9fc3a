"""Measure what a device reaches at most: products of large matrices, and copies in memory."""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import timing

_PRODUCTS = 8  # in one call, so that its start does not count


def _best(function: Callable, *inputs: jax.Array) -> float:
    """Seconds of the fastest of some calls."""
    compiled = jax.jit(function).lower(*inputs).compile()
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def matrix_rate(side: int, dtype: str) -> float:
    """FLOP/s of square products."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))

    def products(a, b):
        # Scaled, so that numbers neither vanish nor overflow.
        step = partial(jnp.matmul, preferred_element_type=jnp.dtype(dtype))
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: step(x, b) * side**-0.5, a)

    return _PRODUCTS * 2 * side**3 / _best(products, a, b)


def copy_rate(num_bytes: int) -> float:
    """Bytes read and written per second."""
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    return 2 * x.nbytes / _best(lambda x: x + 1, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=timing.positive, default=8192, help="of the matrices")
    parser.add_argument("--mb", type=timing.positive, default=4000, help="that are copied")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    line = {
        "program": "peak", **vars(options),
        "tflops_per_s": round(1e-12 * matrix_rate(options.side, options.dtype), 3),
        "gb_per_s": round(1e-9 * copy_rate(options.mb * 10**6), 2),
        **timing.surroundings(),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
