"""The largest batch that memories of 24, 40, 80 and 141 GB hold, by XLA's plans: nothing is run.

    python benchmarks/largest_batch.py --config configs/sd15.py --images 32 64 --topology h200

plans the config's train step for one GPU (or TPU, --topology v5p:1x1x1) at each of these numbers of
images at a time; on the straight line through them lies every larger one. Not with few images,
where what takes most room is what does not grow with them, such as gradients. A prediction: cuDNN's
scratch memory, which is chosen on the GPU, is not in it.
"""

import argparse
import json
import pathlib
import runpy
import sys
from functools import partial

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np

from benchmarks import timing
from slam_jax import dry_run, settings
from slam_jax.nets import kernels, unet
from slam_jax.runtime import aot, topologies

GIGABYTES = (24, 40, 80, 141)
# Of memory, as benchmarks/gpu.sh lets XLA have; the rest is the driver's and the program's.
USABLE = 0.92


def memory(chosen: settings.Settings, images: int, topology: str) -> float:
    """Bytes that a step takes with so many images at a time."""
    chosen = chosen._replace(batch_size=images, accumulate=1)

    def announce() -> None:
        print(f"planning {images} images at a time", file=sys.stderr, flush=True)

    again = partial(dry_run.lower, chosen, topology)
    places = topologies.devices(topology, chosen.attention)
    found = aot.planned(again(), again, places, announce)
    return found.memory


def line(images: list[int], found: list[float]) -> tuple[float, float]:
    """(bytes without an image, bytes of each), through the points by least squares."""
    slope, start = np.polyfit(images, found, 1)
    return float(start), float(slope)


def largest(fixed: float, each: float, gigabytes: float) -> int:
    """How many images fit; 0 if none does."""
    return max(0, int((USABLE * 1e9 * gigabytes - fixed) // each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--images", type=timing.positive, nargs="+", default=[32, 64])
    parser.add_argument("--topology", default="h200")
    parser.add_argument(
        "--attention", choices=kernels.BY_NAME, help="unless given, the kernel for such a chip"
    )
    parser.add_argument("--remat", choices=unet.REMAT, help="unless given, the config's")
    options = parser.parse_args()
    if len({*options.images}) < 2:
        parser.error("--images must be two numbers or more, such as 32 64")
    config = runpy.run_path(options.config)["get_config"]().to_dict()
    chosen = settings.from_config(config)
    options.attention = options.attention or topologies.kernel(options.topology)
    options.remat = options.remat or chosen.student.remat
    student = chosen.student._replace(remat=options.remat)
    chosen = chosen._replace(attention=options.attention, student=student)
    with timing.refusing(parser):
        found = [memory(chosen, images, options.topology) for images in options.images]
    fixed, each = line(options.images, found)
    fits = {gigabytes: largest(fixed, each, gigabytes) for gigabytes in GIGABYTES}
    print(f"{1e-9 * fixed:.1f} GB and {1e-9 * each:.2f} GB an image; the largest batch, in GB:")
    print("  ".join(f"{gigabytes}: {images}" for gigabytes, images in fits.items()))
    print(
        json.dumps({
            "program": "largest_batch", **vars(options), "bytes": found, "bytes_fixed": fixed,
            "bytes_per_image": each, "largest": fits, **timing.surroundings(),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
