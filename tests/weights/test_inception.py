"""The FID's weights from a .pth and a .safetensors, and what is said of other files."""

import hashlib
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from flax import traverse_util

from slam_jax.errors import UserError
from slam_jax.weights import inception

sys.path.append(str(Path(__file__).parents[1]))
fidelity = importlib.import_module("fidelity")


@pytest.fixture(scope="module")
def state():
    return fidelity.untrained().state_dict()


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """The same tensors in three files."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(state, folder / "zip.pth")
    # As before torch 1.6, and without the counters of newer batch norms.
    published = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(published, folder / "published.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "inception.safetensors")
    return folder


@pytest.mark.parametrize("name", ["zip.pth", "published.pth", "inception.safetensors"])
def test_every_file_gives_the_same_parameters(state, folder, name):
    params = traverse_util.flatten_dict(inception.read(folder / name))
    assert len(params) == 94 * 5
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    for path, leaf in params.items():
        theirs = {"scale": "weight", "mean": "running_mean", "var": "running_var"}
        theirs |= {"kernel": "weight", "bias": "bias"}
        tensor = state[".".join([*path[:-1], theirs[path[-1]]])]
        tensor = tensor.permute(2, 3, 1, 0) if path[-1] == "kernel" else tensor
        assert np.array_equal(leaf, tensor.numpy()), path


def test_half_precision_is_read_as_float32(state, folder):
    torch.save({name: t.bfloat16() for name, t in state.items()}, folder / "half.pth")
    kernel = inception.read(folder / "half.pth")["Conv2d_1a_3x3"]["conv"]["kernel"]
    assert kernel.dtype == np.float32
    exact = state["Conv2d_1a_3x3.conv.weight"].permute(2, 3, 1, 0).numpy()
    assert 0 < np.abs(kernel - exact).max() < 2e-3


def test_the_digits_in_a_name_are_checked(folder):
    content = (folder / "published.pth").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    other = "0" * 8 if not sha256.startswith("0" * 8) else "1" * 8
    right, wrong = (folder / f"pt_inception-2015-12-05-{d}.pth" for d in (sha256[:8], other))
    right.write_bytes(content)
    wrong.write_bytes(content)
    inception.read(right)
    with pytest.raises(UserError, match=rf"starts with {other}, and it starts with {sha256[:8]}"):
        inception.read(wrong)


class Evil:
    """What a pickle would do if it were run: write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_does_more_than_hold_tensors_is_not_run(tmp_path):
    torch.save({"fc.bias": Evil(tmp_path / "written")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="no state dict of tensors") as caught:
        inception.read(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", ["zip.pth", "published.pth", "inception.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_a_file_that_is_cut_short_is_refused(folder, tmp_path, name, keep):
    content = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=rf"{name} is cut short") as caught:
        inception.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def torchvisions(state):
    """Its network has the same kernels and 1000 classes."""
    return {**state, "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}


OTHERS = {
    "'fc.bias' has shape [1000], not [1008]": torchvisions,
    "'fc.weight' is missing": lambda state: {k: t for k, t in state.items() if k != "fc.weight"},
    "'AuxLogits.fc.bias' is unknown": lambda state: {**state, "AuxLogits.fc.bias": torch.ones(3)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_network_is_refused(state, tmp_path, what):
    torch.save(OTHERS[what](state), tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"another network.*{re.escape(what)}; take pt_inception"):
        inception.read(tmp_path / "other.pth")


@pytest.mark.parametrize("loaded", [{"state_dict": {}, "epoch": 3}, [1, 2], torch.ones(3)])
def test_what_holds_other_than_tensors_by_name_is_refused(tmp_path, loaded):
    torch.save(loaded, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no state dict of tensors alone; take"):
        inception.read(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"cannot read .*{name}: No such file"):
        inception.read(tmp_path / name)


def test_torchscript_is_refused(tmp_path):
    with pytest.raises(UserError, match="ends neither in .pth nor in .safetensors.*not run"):
        inception.read(tmp_path / "inception-2015-12-05.pt")


def test_torchscript_by_another_name_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="TorchScript"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pth")
        with pytest.raises(UserError, match="x.pth is cut short or no state dict"):
            inception.read(tmp_path / "x.pth")


def test_without_torch_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    inception.read(folder / "inception.safetensors")
    with pytest.raises(UserError, match="needs torch: `pip install torch`, or .*weights_only=True"):
        inception.read(folder / "published.pth")
