"""What tells two networks apart, however their files are cut or named."""

import hashlib
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from slam_jax.weights import translate


def of_params(params: Mapping) -> str:
    """sha256, hexadecimal, of every parameter's name, shape and values as float32.

    The same for one file and for shards, read or still unread, with one parameter in memory at a
    time. Rounded to half precision, weights are others.
    """
    leaves = traverse_util.flatten_dict(params)
    digest = hashlib.sha256()
    for path in sorted(leaves):
        leaf = leaves[path]
        if isinstance(leaf, translate.Unread):
            leaf = leaf.read(np.float32)
        # C-ordered little-endian: what is hashed must not depend on how an array lies in memory.
        array = np.asarray(leaf).astype("<f4", order="C")
        digest.update(f"{'/'.join(path)} {array.shape}\n".encode())
        digest.update(array)
    return digest.hexdigest()
