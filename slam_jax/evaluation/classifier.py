"""The classifier of shapes2d as an extractor: what a picture shows, and 64 features of it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from slam_jax.data import shapes2d
from slam_jax.evaluation.extractor import Extractor
from slam_jax.nets import classifier
from slam_jax.weights import fingerprint, templates, tensorfile, translate


def read(folder: str | Path, size: int) -> dict:
    """The parameters, for pictures of `size` pixels; UserError if the folder holds none."""
    file = Path(folder) / "model.safetensors"
    shapes = templates.of_classifier(shapes2d.LABEL_SIZES, size)
    return translate.to_params(tensorfile.read(file), shapes, str(file), dtype=np.float32)


def extractor(params: dict, *, place: Callable[[Any], Any] = jax.device_put) -> Extractor:
    """{"pool": [B, 64], "logits": [B, 22], those of all labels side by side}.

    place: puts the parameters on the devices where pictures will be.
    """
    net = classifier.ShapesClassifier(shapes2d.LABEL_SIZES)
    name, sha256 = "classifier of shapes2d", fingerprint.of_params(params)

    @jax.jit
    def apply(params, pixels):
        # GPUs from Ampere on otherwise keep 10 bits in products.
        with jax.default_matmul_precision("highest"):
            features, logits = net.apply({"params": params}, pixels)
        return {"pool": features, "logits": jnp.concatenate(logits, axis=-1)}

    return Extractor(name, sha256, _prepare, partial(apply, place(params)))


def _prepare(pixels: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B H W 3"]:
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def heads(logits: Float[np.ndarray, "B L"]) -> Sequence[Float[np.ndarray, "B _"]]:
    """The logits of each label."""
    return np.split(logits, np.cumsum(shapes2d.LABEL_SIZES)[:-1], axis=1)
