"""How much memory reading a model takes, as the system counts it: a model of 500 MB on disk."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from slam_jax.weights import pretrained, templates, tensorfile

UNET = dict(
    block_out_channels=[64, 128, 832], layers_per_block=1, cross_attention_dim=16,
    attention_head_dim=8,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
STEM = "diffusion_pytorch_model"

# The peak of the resident set, pages of mapped files included, above what was there before; and
# the size of the parameters.
CHILD = """
import sys
import jax
import numpy as np
from slam_jax.weights import pretrained

def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

folder, dtype = sys.argv[1:]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again at what is there now
before = kilobytes("VmRSS")
model = pretrained.read(folder, dtype=np.dtype(dtype))
peak = 1024 * (kilobytes("VmHWM") - before)
trees = [part.params for part in model if isinstance(part, pretrained.Component)]
print(peak, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
"""


@pytest.fixture(scope="module")
def large(tiny_folder, tmp_path_factory):
    """tiny_folder with a UNet of 500 MB."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("large") / "model")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), templates.of_unet(UNET))
    pretrained.write_component(folder / "unet", pretrained.UNET, pretrained.Component(UNET, zeros))
    assert (folder / "unet" / f"{STEM}.safetensors").stat().st_size > 500e6
    yield folder
    shutil.rmtree(folder.parent)


def split(folder, count: int) -> None:
    """The UNet's one file becomes an index and `count` shards."""
    path = folder / "unet" / f"{STEM}.safetensors"
    stored = tensorfile.read(path)
    names = sorted(stored)
    shards = {f"{STEM}-{i + 1:05}-of-{count:05}.safetensors": names[i::count] for i in range(count)}
    for shard, held in shards.items():
        tensorfile.write(path.with_name(shard), {name: np.asarray(stored[name]) for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()


def peak_and_size(folder, dtype: str) -> tuple[int, int]:
    command = [sys.executable, "-c", CHILD, str(folder), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, size = map(int, done.stdout.split())
    return peak, size


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory it takes")
@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 1), ("float32", 4)])
def test_reading_takes_little_more_than_the_model(large, dtype, shards):
    if shards > 1:
        split(large, shards)
    peak, size = peak_and_size(large, dtype)
    assert size > 500e6 * np.dtype(dtype).itemsize / 4
    assert peak <= 1.3 * size, f"{peak / size:.2f}"
