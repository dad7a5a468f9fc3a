"""Pickles, which can run anything when read, are refused wherever a file is named."""

import ast
import pathlib

import numpy as np
import pytest

from slam_jax import sample
from slam_jax.errors import UserError
from slam_jax.evaluation import store
from slam_jax.weights import folder, hub, lora, tensorfile

ROOT = pathlib.Path(__file__).parents[1]
# Calls that run what a file says, and the argument that forbids it.
LOADERS = {
    ("pickle", "load"): None, ("pickle", "loads"): None, ("pickle", "Unpickler"): None,
    ("dill", "load"): None, ("joblib", "load"): None, ("cloudpickle", "load"): None,
    ("cloudpickle", "loads"): None, ("marshal", "loads"): None, ("shelve", "open"): None,
    ("yaml", "load"): None, ("yaml", "unsafe_load"): None, ("pandas", "read_pickle"): None,
    ("torch", "load"): ("weights_only", "True"),
    ("format", "read_array"): ("allow_pickle", "False"),
}  # fmt: skip


def loads_pickles(text: str) -> list[int]:
    """The lines that do."""
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Attribute(attr=name, value=owner)):
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                if given.get("allow_pickle", "False") != "False":
                    found.append(node.lineno)
                last = ast.unparse(owner).rpartition(".")[2]
                if (last, name) not in LOADERS:
                    continue
                if LOADERS[last, name] not in given.items():
                    found.append(node.lineno)
    return found


def test_no_code_loads_a_pickle():
    folders = ("slam_jax", "benchmarks", "examples")
    paths = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    found = [f"{p}:{line}" for p in paths for line in loads_pickles(p.read_text("utf-8"))]
    assert not found, found


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("pickle.load(file)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("yaml.load(text)", True),
        ("json.load(file)", False),
    ],
)
def test_the_check_tells_loaders_apart(text, bad):
    assert bool(loads_pickles(text)) == bad


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


READERS = {
    "model.ckpt": lambda path: hub.find(str(path), "", "", ""),
    "model.safetensors": tensorfile.read,
    "lora.bin": lora._modules,
    "diffusion_pytorch_model.bin": lambda path: folder.find_tensors(
        path.parent, "diffusion_pytorch_model", None
    ),
    "noise.npy": lambda path: sample._read_noise(str(path), (1, 1, 4)),
    "rows.npz": store.load,
}


@pytest.mark.parametrize("name", READERS)
def test_a_malicious_pickle_is_refused_and_not_run(name, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "given" / name
    path.parent.mkdir()
    evil = np.array([Touch(victim)], object)
    with open(path, "wb") as file:
        if path.suffix == ".npz":
            np.savez(file, evil=evil)
        elif path.suffix == ".npy":
            np.save(file, evil)
        else:
            evil.dump(file)
    with pytest.raises(ValueError) as refused:
        READERS[name](path)
    assert not victim.exists()
    assert isinstance(refused.value, UserError) or name == "rows.npz"
    # And that it is malicious:
    if path.suffix not in (".npz", ".npy"):
        np.load(path, allow_pickle=True)
        assert victim.exists()
