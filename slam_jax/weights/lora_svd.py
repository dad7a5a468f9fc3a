"""A LoRA out of a fully trained student: of what training changed, the best that rank r can hold.

A LoRA adds to kernels only; changed biases and norms are left out, with one exception. What a
student learnt for gamma = 1 is, once folded, a change in the bias of time_embedding.linear_1. That
layer's input are the sinusoids of t, and a fixed combination of their slowest is 1 for every t: so
this change of a bias is one of the kernel, of rank 1, that every tool can load.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from slam_jax.errors import UserError
from slam_jax.nets import embeddings, lora, unet
from slam_jax.weights import names, pretrained, tensorfile

_KERNEL = ("time_embedding", "linear_1", "kernel")
_BIAS = ("time_embedding", "linear_1", "bias")
_NUM_TIMESTEPS = 1000
# Of the sinusoids' singular values, relative to the largest: below, float32 holds noise.
_CUTOFF = 1e-7

_Path = tuple[str, ...]
_Halves = tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]]


def extract(
    teacher: pretrained.Component, student: pretrained.Component, rank: int,
    told: tensorfile.Told = tensorfile.untold,
) -> tuple[dict, dict[str, float]]:  # fmt: skip
    """(additions, as weights/lora.py has them; tensor -> share of its squared change that is kept).

    Two UNets with the same tensors, so gamma must have been folded into the student's: else
    UserError. Tensors that did not change are in neither result. All layers get the same rank, as
    some readers of LoRA files assume. told: of each tensor that is done.
    """
    if rank < 1:
        raise UserError(f"LoRA rank {rank} must be at least 1")
    changes = _changes(teacher.params, student.params)
    bias = changes.get(_BIAS)
    if bias is not None:
        fan_in = teacher.params["time_embedding"]["linear_1"]["kernel"].shape[0]
        changes.setdefault(_KERNEL, np.zeros((fan_in, bias.size), np.float32))
    additions, kept = {}, dict.fromkeys(changes, 0.0)
    for path, change in changes.items():
        if path == _KERNEL and bias is not None:
            (down, up), kept[path] = _largest(change, rank - 1)
            ones, kept[_BIAS] = _ones_of_sinusoids(unet.from_config(teacher.config))
            additions |= _layer(path, change, np.column_stack([down, ones]), np.vstack([up, bias]))
        elif path[-1] == "kernel":
            (down, up), kept[path] = _largest(change, rank)
            additions |= _layer(path, change, down, up)
        told(change.size)
    shares = {names.torch_name(path): share for path, share in kept.items()}
    return traverse_util.unflatten_dict(additions), shares


def _layer(path: _Path, change: np.ndarray, down: np.ndarray, up: np.ndarray) -> dict:
    """Path -> kernel of both halves of an addition to the kernel at `path`."""
    window = (1,) * (change.ndim - 2)
    return {
        (*path[:-1], lora.DOWN, "kernel"): down.reshape(*change.shape[:-1], -1),
        (*path[:-1], lora.UP, "kernel"): up.reshape(*window, *up.shape),
    }


def _changes(before: Mapping, after: Mapping) -> dict[_Path, np.ndarray]:
    """The difference of every tensor that has changed."""
    old, new = traverse_util.flatten_dict(before), traverse_util.flatten_dict(after)
    for path in old.keys() | new.keys():
        shapes = [tree[path].shape if path in tree else None for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{'.'.join(path)} has shape {shapes[0]} in the teacher, {shapes[1]} in the "
                "student; give its own teacher, and a student with gamma folded"
            )
    changes = {path: np.float32(new[path]) - np.float32(old[path]) for path in old}
    return {path: change for path, change in changes.items() if change.any()}


def _largest(change: np.ndarray, rank: int) -> tuple[_Halves, float]:
    """The best approximation of that rank (Eckart & Young 1936), and the share that it keeps."""
    matrix = change.reshape(-1, change.shape[-1]).astype(np.float64)
    if matrix.shape[0] < matrix.shape[1]:
        (down, up), share = _largest(matrix.T, rank)
        return (up.T, down.T), share
    # The right singular vectors, ten times as fast as by a singular value decomposition.
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    squares, vectors = squares[::-1], vectors[:, ::-1][:, :rank]
    lost = squares[rank:].sum() / max(squares.sum(), np.finfo(np.float64).tiny)
    vectors = np.pad(vectors, ((0, 0), (0, rank - vectors.shape[1])))
    return (np.float32(matrix @ vectors), np.float32(vectors.T)), float(1.0 - lost)


def _ones_of_sinusoids(net: unet.UNet2DConditionModel) -> tuple[Float[np.ndarray, "F"], float]:
    """Factors that sum the sinusoids of any t to 1, and 1 less the mean squared error of that."""
    num_frequencies = net.block_out_channels[0] // 2
    times = jnp.arange(_NUM_TIMESTEPS)
    angles = np.asarray(embeddings.sinusoid_angles(times, num_frequencies, net.freq_shift))
    parts = (np.sin(angles), np.cos(angles))
    sinusoids = np.concatenate(parts[::-1] if net.flip_sin_to_cos else parts, axis=-1)
    factors = np.linalg.lstsq(sinusoids.astype(np.float64), np.ones(len(times)), rcond=_CUTOFF)[0]
    error = np.mean((sinusoids @ factors - 1.0) ** 2)
    return np.float32(factors), float(1.0 - error)
