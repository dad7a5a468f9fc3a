"""Devices that need not be here, for which XLA plans programs: slices of TPUs, and GPUs."""

import importlib.metadata
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies as jaxs

from slam_jax.errors import UserError

# Without the first three libtpu asks Google's metadata server, which is not there, what machine
# this is; without the last only one process at a time may compile.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
_CUDA = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
# Of matrix products XLA would try Triton's kernels on the GPU and keep the faster of them and
# cuBLAS's; where there is none to try on, it takes one that need not even compile.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class _Gpu(NamedTuple):
    """What XLA's compiler asks about one."""

    kind: str  # jax.Device.device_kind
    capability: tuple[int, int]
    multiprocessors: int
    gigahertz: float
    bandwidth: float  # bytes of memory per second
    memory: int  # bytes
    cache: int  # bytes of the L2 cache


def _gpu(
    kind: str, capability: tuple[int, int], multiprocessors: int, gigahertz: float,
    gigabytes_s: float, gib: float, cache_mib: int,
) -> _Gpu:  # fmt: skip
    size = int(gib * 2**30)
    return _Gpu(
        kind, capability, multiprocessors, gigahertz, 1e9 * gigabytes_s, size, cache_mib * 2**20
    )


# NVIDIA's datasheets and the whitepapers of Ampere (GA100, GA102), Ada and Hopper.
_GPUS = {
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695, 936.0, 24.0, 6),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 1008.0, 24.0, 72),
    "l4": _gpu("NVIDIA L4", (8, 9), 58, 2.04, 300.0, 24.0, 48),
    "a100_40gb": _gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 1555.0, 40.0, 40),
    "a100_80gb": _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2039.0, 80.0, 40),
    "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 3350.0, 80.0, 50),
    "h200": _gpu("NVIDIA H200", (9, 0), 132, 1.98, 4800.0, 140.4, 50),
}
# By compute capability, of one multiprocessor (CUDA's programming guide, "Compute Capabilities"):
# threads, KiB of shared memory, and float32 units.
_MULTIPROCESSOR = {
    (8, 0): (2048, 164, 64), (8, 6): (1536, 100, 128), (8, 9): (1536, 100, 128),
    (9, 0): (2048, 228, 128),
}  # fmt: skip
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_by_one}
  threads_per_core_limit: {threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth:.0f}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.gigahertz}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{gpu.kind}"
"""


def devices(name: str, attention: str = "xla") -> list[jax.Device]:
    """Of a slice of TPUs, "v5e:16x16", or of GPUs: "h200", "h200:8", "h200:4x8" (hosts x GPUs).

    attention: as in a config, whose kernel may need a package too. UserError without the package
    that compiles for them, or if there are no such devices.
    """
    # Whatever accelerator is here has no part in it.
    jax.config.update("jax_platforms", "cpu")
    kind, _, shape = name.partition(":")
    if kind in _GPUS:
        return _gpus(name, _GPUS[kind], shape, attention)
    return _tpus(name)


def kernel(name: str) -> str:
    """What computes attention on such devices, as a config names it."""
    return "cudnn" if name.partition(":")[0] in _GPUS else "flash"


def options(platform: str) -> dict:
    """What XLA is told beside a program when it plans it for devices of that platform."""
    return _GPU_OPTIONS if platform == "gpu" else {}


def versions() -> list[str]:
    """Of all packages that compile, on which plans depend."""
    return [_version(package) for package in ("jax", "jaxlib", "libtpu", *_CUDA, *_CUDNN)]


def _version(package: str) -> str:
    """Of a package that is installed, else ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _tpus(name: str) -> list[jax.Device]:
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    if not _version("libtpu"):
        raise UserError(
            f"--topology {name} needs the package libtpu, which compiles for TPUs on any Linux "
            "machine: pip install 'slam_jax[tpu-topology]'"
        )
    # A host of TPUs has four chips, but for a slice of one.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if re.search(r":1x1(x1)?$", name) else {}
    try:
        return list(jaxs.get_topology_desc(name, platform="tpu", **bounds).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--topology {name!r} is no TPU slice ({reason}) and no GPU; such are v5e:2x2, "
            f"v5e:16x16, v5p:2x2x4, v6e:8x8, and {', '.join(_GPUS)}, rtx4090:2, h200:4x8"
        ) from None


def _gpus(name: str, gpu: _Gpu, shape: str, attention: str) -> list[jax.Device]:
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)|", shape)
    if found is None:
        raise UserError(
            f"--topology {name!r}: after the colon comes the number of GPUs, as in h200:8, or of "
            "hosts and of GPUs in each, as in h200:4x8"
        )
    _check_cuda(name, attention)
    hosts, each = (number or 1 for number in found.groups())
    found = jaxs.get_topology_desc(
        platform="cuda", target_config=_target(gpu), topology=f"1x{hosts}x{each}"
    )
    return list(found.devices)


def _check_cuda(name: str, attention: str) -> None:
    """UserError without XLA's compiler for GPUs, and cuDNN where attention is computed by it."""
    remedy = "pip install 'slam_jax[gpu-topology]'"
    plugin = next((package for package in _CUDA if _version(package)), None)
    if plugin is None:
        raise UserError(
            f"--topology {name} needs JAX's plugin for GPUs, which compiles for them on any Linux "
            f"machine: {remedy}"
        )
    wanted = _version("jaxlib")
    if _version(plugin) != wanted:
        pjrt = plugin.replace("plugin", "pjrt")
        raise UserError(
            f"--topology {name}: {plugin} {_version(plugin)} is not for jaxlib {wanted}: pip "
            f"install {plugin}=={wanted} {pjrt}=={wanted}"
        )
    if attention == "cudnn" and not any(map(_version, _CUDNN)):
        raise UserError(
            f"--topology {name} with attention='cudnn' needs the package nvidia-cudnn-cu12: "
            f"{remedy}"
        )


def _target(gpu: _Gpu) -> str:
    """As XLA's GpuTargetConfigProto, in protobuf's text."""
    threads, shared, units = _MULTIPROCESSOR[gpu.capability]
    # 1 KiB of each block's is the system's.
    return _TARGET.format(
        gpu=gpu, threads=threads, units=units, shared=2**10 * shared,
        shared_by_one=2**10 * (shared - 1),
    )  # fmt: skip
