"""The Frechet inception distance's network as an extractor."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from slam_jax.errors import UserError
from slam_jax.evaluation.extractor import Extractor
from slam_jax.metrics import inception_input
from slam_jax.nets import inception
from slam_jax.weights import fingerprint
from slam_jax.weights import inception as weights

# How pictures become 299 x 299.
MODES = {"clean": inception_input.clean, "legacy": inception_input.legacy}

# To be raised when the same pictures and weights come to give other features.
_VERSION = 1


def extractor(
    path: str | Path, mode: str, *, place: Callable[[Any], Any] = jax.device_put
) -> Extractor:
    """{"pool": [B, 2048]} of uint8 RGB pictures of any size; weights from `path`.

    mode: clean, as clean-fid; or legacy, as torch-fidelity (metrics/inception_input.py). place:
    puts the parameters on the devices where pictures will be. UserError for what is not there or
    not supported.
    """
    if mode not in MODES:
        raise UserError(f"Inception has no mode {mode!r}; take one of {', '.join(MODES)}")
    params = weights.read(path)
    stated = f"inception {_VERSION} {mode} {fingerprint.of_params(params)}"
    return Extractor(
        name=f"inception, {mode}",
        fingerprint=hashlib.sha256(stated.encode()).hexdigest(),
        prepare=MODES[mode],
        apply=partial(jax.jit(_features), place(params)),
    )


def _features(params, pixels) -> dict[str, jax.Array]:
    return {"pool": inception.Inception().apply({"params": params}, pixels)}
