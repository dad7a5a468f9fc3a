"""The package without what its tests are made with: torch, TensorFlow, diffusers, transformers.

`make minimal` does the same in an environment where they, and what is optional, are not installed.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
# Imports every module of the package, then draws a picture as a user does.
PROGRAM = """
import importlib, pathlib, runpy, sys
BLOCKED = ("torch", "torchvision", "tensorflow", "diffusers", "transformers", "peft", "accelerate")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocker())
package = pathlib.Path("slam_jax")
for path in sorted(package.rglob("*.py")):
    if path.stem not in (
        "__main__", "__init__", "main", "sample", "export", "prepare", "evaluate", "serve"
    ):
        importlib.import_module(".".join(path.with_suffix("").parts))
sys.argv = ["sample", "--prompt=a red circle above a blue square", f"--out={sys.argv[1]}"]
runpy.run_module("slam_jax.sample", run_name="__main__")
"""


def test_sampling_needs_no_other_framework(tmp_path):
    drawn = tmp_path / "drawn.png"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(drawn)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(drawn)).shape[-1] == 3
