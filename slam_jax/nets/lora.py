"""LoRA (Hu et al. 2021, arXiv 2106.09685) as pure functions of parameter trees.

A LoRA is a tree like the network's own. Where that has a module's kernel W [..., in, out] this
has the kernels of two modules below it, `lora_down` [..., in, rank] and `lora_up` [1..., rank,
out], and the network is run with W + scale * down up; scale is alpha / rank. Dots `...` are the
window of a convolution, which is all in lora_down, as PEFT and kohya have it.

Nothing is added to the network itself: merging costs rank * in * out multiplications a layer,
little beside the layer's own work on a picture, and whatever runs a UNet runs the result.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from slam_jax.errors import UserError

DOWN, UP = "lora_down", "lora_up"
_NAMES_SHOWN = 4


def init(rng: np.random.Generator, shapes: Mapping, targets: Sequence[str], rank: int) -> dict:
    """A float32 LoRA that changes nothing yet, for the modules that `targets` choose.

    shapes: the network's parameters, or their shapes. targets: regexes, each for a module's whole
    name or for its end after a dot: "to_q", "mid_block.*to_k". As in PEFT, down is
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and up is zero.
    """
    tree = {}
    kernels = _kernels(shapes)
    for path in _chosen(kernels, targets):
        *window, fan_in, fan_out = kernels[path].shape
        bound = math.prod((*window, fan_in)) ** -0.5
        down = rng.uniform(-bound, bound, (*window, fan_in, rank)).astype(np.float32)
        tree[*path, DOWN, "kernel"] = down
        tree[*path, UP, "kernel"] = np.zeros((*(1 for _ in window), rank, fan_out), np.float32)
    return traverse_util.unflatten_dict(tree)


def merge(base: Mapping, lora: Mapping, scale: float) -> dict:
    """`base` with the LoRA in its kernels, and with whatever else `lora` holds, in its place.

    Added in float32, then of the base's dtype. jax or numpy arrays; `base` is left as it is.
    """
    params = traverse_util.flatten_dict(base)
    leaves = traverse_util.flatten_dict(lora)
    for path, leaf in leaves.items():
        module, tail = path[:-2], path[-2:]
        if tail == (DOWN, "kernel"):
            kernel = params[*module, "kernel"]
            added = scale * (leaf @ leaves[*module, UP, "kernel"])
            params[*module, "kernel"] = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
        elif tail != (UP, "kernel"):
            params[path] = leaf
    return traverse_util.unflatten_dict(params)


def _kernels(shapes: Mapping) -> dict[tuple[str, ...], Any]:
    """Path of a module -> its kernel."""
    leaves = traverse_util.flatten_dict(shapes)
    return {path[:-1]: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}


def _chosen(kernels: Mapping[tuple[str, ...], Any], targets: Sequence[str]) -> list[tuple]:
    """Paths of the modules that the regexes match, in the network's order."""
    names = {path: ".".join(path) for path in kernels}
    matched = set()
    for target in targets:
        try:
            regex = re.compile(target)
        except re.error as error:
            raise UserError(f"LoRA target {target!r} is not a regex: {error}") from None
        found = {
            path
            for path, name in names.items()
            if any(regex.fullmatch(name, start) for start in _starts(name))
        }
        if not found:
            some = ", ".join(list(names.values())[:: -(-len(names) // _NAMES_SHOWN)])
            raise UserError(f"LoRA target {target!r} matches no module; there are {some}, ...")
        matched |= found
    return [path for path in names if path in matched]


def _starts(name: str) -> list[int]:
    """Where the name and, after a dot, its parts begin."""
    return [0, *(dot.end() for dot in re.finditer(r"\.", name))]
