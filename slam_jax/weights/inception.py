"""The weights of the Frechet inception distance's network, as published or as safetensors.

inception-2015-12-05, which pytorch-fid and torch-fidelity publish as a state dict, a .pth. Reading
that needs torch, which is imported here alone and only then, and executes nothing of the file's
pickle; the same names and tensors in a .safetensors are read without torch.
"""

import hashlib
import importlib.util
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slam_jax.errors import UserError
from slam_jax.nets import inception
from slam_jax.weights import templates, tensorfile, translate

# Of the classifier on top, which the distance leaves out: torchvision's Inception has 1000.
_CLASSES = {"fc.weight": (1008, inception.NUM_FEATURES), "fc.bias": (1008,)}
_COUNTER = ".num_batches_tracked"  # of batch norm's training
# torch.hub's custom: the name ends in the first digits of the file's sha256.
_HASH = re.compile(r"-([0-9a-f]{8,64})\.pth$")
# What torch raises of a broken file, depending on which byte it is.
_BROKEN = (
    RuntimeError, pickle.UnpicklingError, struct.error, EOFError, ValueError, LookupError,
    TypeError, AttributeError, AssertionError,
)  # fmt: skip

_REMEDY = "take pt_inception-2015-12-05-6726825d.pth from the releases of mseitzer/pytorch-fid"
_CONVERT = (
    'python -c "import sys, torch, safetensors.torch as s; '
    's.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"'
)


def read(path: str | Path) -> dict:
    """The parameters of nets/inception.py as numpy arrays, float32.

    path: a .pth, or a .safetensors with the same names. UserError if it is missing, cut short,
    not what its name's digits promise, or of another network.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = tensorfile.read(path)
    elif path.suffix == ".pth":
        tensors = _state_dict(path)
    else:
        raise UserError(
            f"{path} ends neither in .pth nor in .safetensors; {_REMEDY} (NVIDIA's "
            "inception-2015-12-05.pt has the same weights, but is a program and is not run)"
        )
    shapes = templates.of_inception()
    _check(tensors, translate.torch_shapes(shapes) | _CLASSES, path)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in _CLASSES and not name.endswith(_COUNTER)
    }
    return translate.to_params(tensors, shapes, str(path), dtype=np.float32)


def _state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .pth; torch's weights_only lets its pickle build nothing but tensors."""
    _check_hash(path)
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"reading {path} needs torch: `pip install torch`, or where there is torch turn it "
            f"into a .safetensors, which needs none: `{_CONVERT} {path.name} inception.safetensors`"
        )
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN:
        # torch's own words go on for lines, and advise to run the pickle.
        raise UserError(f"{path} is cut short or no state dict of tensors; {_REMEDY}") from None
    if not isinstance(loaded, Mapping) or not all(map(torch.is_tensor, loaded.values())):
        raise UserError(f"{path} is no state dict of tensors alone; {_REMEDY}")
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}


def _check_hash(path: Path) -> None:
    """UserError unless the file is there and is what its name says."""
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {_REMEDY}") from None
    promised = _HASH.search(path.name)
    if promised and not sha256.startswith(promised[1]):
        raise UserError(
            f"{path} is not what it was: its name says that its sha256 starts with {promised[1]}, "
            f"and it starts with {sha256[:8]}; {_REMEDY}"
        )


def _check(tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """UserError, naming a tensor, if they are of another network."""
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            found = "is missing"
        elif name in wanted and tuple(tensors[name].shape) != wanted[name]:
            found = f"has shape {list(tensors[name].shape)}, not {list(wanted[name])}"
        elif name not in wanted and not name.endswith(_COUNTER):
            found = "is unknown"
        else:
            continue
        raise UserError(
            f"{path} is of another network than the FID's Inception: tensor {name!r} {found}; "
            f"{_REMEDY}"
        )
