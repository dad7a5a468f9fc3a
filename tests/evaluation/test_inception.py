"""Inception's features of pictures, from a file to the pool, against torch-fidelity's."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slam_jax.errors import UserError
from slam_jax.evaluation import inception

sys.path.append(str(Path(__file__).parents[1]))
fidelity = importlib.import_module("fidelity")


@pytest.fixture(scope="module")
def devices():
    """Three, which divide three pictures."""
    return Mesh(np.array(jax.devices()[:3]), ("data",))


@pytest.fixture(scope="module")
def net():
    return fidelity.inception()


@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def legacy(weights, devices):
    whole = NamedSharding(devices, PartitionSpec())
    return inception.extractor(weights, "legacy", place=lambda tree: jax.device_put(tree, whole))


def test_features_are_torch_fidelitys(net, legacy, devices):
    pictures = fidelity.pictures(3, 37, 50)
    (theirs,) = net(fidelity.to_torch(pictures))
    # Neither dead nor all alike, or the comparison would say little.
    assert 0.1 < theirs.mean() < 10 and theirs.std(0).mean() > 0.1

    rows = NamedSharding(devices, PartitionSpec("data"))
    outputs = jax.device_get(legacy.apply(jax.device_put(legacy.prepare(pictures), rows)))
    assert outputs.keys() == {"pool"}
    assert outputs["pool"].shape == (3, 2048) and outputs["pool"].dtype == np.float32
    errors = np.linalg.norm(outputs["pool"] - theirs.numpy(), axis=1)
    assert (errors <= 1e-4 * np.linalg.norm(theirs.numpy(), axis=1)).all()


def test_fingerprint_tells_modes_and_weights_apart(net, weights, legacy, tmp_path):
    again, clean = (inception.extractor(weights, mode) for mode in ("legacy", "clean"))
    assert again.fingerprint == legacy.fingerprint != clean.fingerprint
    assert (legacy.name, clean.name) == ("inception, legacy", "inception, clean")
    other = net.state_dict() | {"Conv2d_1a_3x3.bn.running_mean": torch.ones(32)}
    torch.save(other, tmp_path / "other.pth")
    assert inception.extractor(tmp_path / "other.pth", "legacy").fingerprint != again.fingerprint


def test_modes_prepare_pictures_differently(weights, legacy):
    pictures = fidelity.pictures(1, 600, 500)
    clean = inception.extractor(weights, "clean").prepare(pictures)
    assert np.abs(clean - legacy.prepare(pictures)).mean() > 0.1


def test_an_unknown_mode_is_refused(weights):
    with pytest.raises(UserError, match="no mode 'legacy_pytorch'; take one of clean, legacy"):
        inception.extractor(weights, "legacy_pytorch")
