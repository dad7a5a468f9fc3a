"""What a report of a bug should tell: versions, devices, memory and the config's hash.

python -m slam_jax.env
python -m slam_jax.env --config configs/tiny.py --config.distill.w=3
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator

import jax
from absl import flags
from ml_collections import config_flags

from slam_jax import command, settings
from slam_jax.errors import UserError
from slam_jax.runtime import folder

_CONFIG = config_flags.DEFINE_config_file("config", None, "Of the run in question.")
_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy",
    "ml_collections", "safetensors", "tokenizers",
)  # fmt: skip
# Of the environment; no value of any other is printed, since some are secret.
_VARIABLES = ("JAX_", "XLA_", "TPU_", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "SLURM_N")


def main() -> None:
    print(f"slam_jax {_version('slam_jax')}, revision {folder.revision()}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    for line in (*_devices(), _memory(), *_environment()):
        print(line)
    if _CONFIG.value is not None:
        print(_config())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    """Each kind once; the reason where JAX finds none."""
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield f"devices: none, {command.one_line(error)}"
        return
    kinds = {}
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        size = "" if limit is None else f", {limit / 1e9:.1f} GB each"
        name = f"{device.platform} ({device.device_kind}{size})"
        kinds[name] = kinds.get(name, 0) + 1
    for name, count in kinds.items():
        yield f"devices: {count} x {name}"


def _memory() -> str:
    total, free = (
        os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") / 1e9
        for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    )
    return f"memory: {total:.1f} GB, {free:.1f} GB unused; {os.cpu_count()} cores"


def _environment() -> Iterator[str]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            yield f"{name}={value}"


def _config() -> str:
    """The file, what was overridden, and a hash of all values: the same where they are."""
    flag = flags.FLAGS["config"]
    try:
        values = settings.as_dict(settings.from_config(_CONFIG.value.to_dict()))
    except (OSError, AttributeError) as error:
        raise UserError(f"--config: {command.one_line(error)}") from None
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    given = "".join(f" {name}={value!r}" for name, value in flag.override_values.items())
    return f"config {flag.config_filename}{given}, hash {digest}"


if __name__ == "__main__":
    command.run(main, required=())
