"""What the makers say their chips can do at most."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Chip(NamedTuple):
    """Peaks of one chip. GB here are 10^9 bytes, GiB 2^30."""

    name: str
    flops: float  # per second, of matrix products of 16-bit floats, without sparsity
    flops_float32: float  # the same of float32 at JAX's default precision: TF32, one pass on TPUs
    memory: float  # bytes of HBM
    memory_bandwidth: float  # bytes per second
    link: float  # bytes per second that the chip sends to others of its slice or machine
    source: str


def _tpu(name: str, teraflops: float, gib: float, gb_s: float, link_gb_s: float, page: str) -> Chip:
    source = f"docs.cloud.google.com/tpu/docs/{page}"
    peak = 1e12 * teraflops
    return Chip(name, peak, peak, gib * 2.0**30, 1e9 * gb_s, 1e9 * link_gb_s, source)


def _gpu(
    name: str, teraflops: float, gb: float, gb_s: float, link_gb_s: float, source: str
) -> Chip:
    return Chip(
        name, 1e12 * teraflops, 0.5e12 * teraflops, 1e9 * gb, 1e9 * gb_s, 1e9 * link_gb_s, source
    )


# By jax.Device.device_kind. The links' bandwidth is one way: half of "bidirectional". Google's
# page of v4 has no such number; 6 links of 50 GB/s are the paper's (arXiv 2304.01433). Cards
# without NVLink send over PCIe 4.0 x16, 32 GB/s; GeForce's peaks are those with sums in float32.
_CHIPS = (
    (r"TPU v4", _tpu("TPU v4", 275.0, 32.0, 1200.0, 300.0, "v4, arXiv 2304.01433")),
    (r"TPU v5 lite|TPU v5e", _tpu("TPU v5e", 197.0, 16.0, 819.0, 200.0, "v5e")),
    (r"TPU v5p?", _tpu("TPU v5p", 459.0, 95.0, 2765.0, 600.0, "v5p")),
    (r"TPU v6 lite|TPU v6e", _tpu("TPU v6e", 918.0, 32.0, 1638.0, 400.0, "v6e")),
    (r".*A100.*40GB", _gpu("A100 40GB", 312.0, 40.0, 1555.0, 300.0, "NVIDIA A100 datasheet, 2021")),
    (r".*A100.*80GB", _gpu("A100 80GB", 312.0, 80.0, 2039.0, 300.0, "NVIDIA A100 datasheet, 2021")),
    (r".*H100.*HBM3", _gpu("H100 SXM", 989.4, 80.0, 3350.0, 450.0, "NVIDIA H100 datasheet, 2023")),
    (r".*RTX 3090", _gpu("RTX 3090", 71.0, 24.0, 936.0, 32.0, "NVIDIA GA102 whitepaper, 2021")),
    (r".*RTX 4090", _gpu("RTX 4090", 165.2, 24.0, 1008.0, 32.0, "NVIDIA Ada whitepaper, 2023")),
    (r"NVIDIA L4", _gpu("L4", 121.0, 24.0, 300.0, 32.0, "NVIDIA L4 datasheet, 2023")),
    (r".*H200.*", _gpu("H200 SXM", 989.4, 141.0, 4800.0, 450.0, "NVIDIA H200 datasheet, 2024")),
)


def find(devices: Sequence) -> Chip | None:
    """What one of those devices of JAX's is; None if it is not in the table, as no CPU is.

    Where several devices are one chip, as the two cores of a TPU v4 may be, each is its share.
    """
    for pattern, chip in _CHIPS:
        if re.fullmatch(pattern, devices[0].device_kind):
            return _share(chip, 1 / _num_sharing(devices))
    return None


def named(name: str) -> Chip:
    """The chip whose name here that is; KeyError if there is none."""
    return {chip.name: chip for _, chip in _CHIPS}[name]


def _num_sharing(devices: Sequence) -> int:
    if devices[0].platform != "tpu":
        return 1
    return len(devices) // len({(device.process_index, *device.coords) for device in devices})


def _share(chip: Chip, part: float) -> Chip:
    numbers = {name: value for name, value in chip._asdict().items() if isinstance(value, float)}
    return chip._replace(**{name: part * value for name, value in numbers.items()})
