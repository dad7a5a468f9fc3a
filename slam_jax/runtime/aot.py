"""Programs compiled without being run, also for TPUs that are not there."""

import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from slam_jax.errors import UserError
from slam_jax.runtime import collectives, folder

# Of what is kept; another number makes everything be compiled anew.
_FORMAT = 1
# Without the first three libtpu asks Google's metadata server, which is not there, what machine
# this is; without the last only one process at a time may compile.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")


class Compiled(NamedTuple):
    """What XLA says of a program, for one device."""

    seconds: float  # that compiling took
    flops: float  # bodies of loops once
    traffic: float  # bytes read and written by all operations, bodies of loops once
    arguments: int  # bytes of memory
    results: int  # bytes beyond those that take the arguments' place
    temporaries: int  # bytes at most
    code: int  # bytes
    too_large: float  # bytes; not 0 where the compiler gave up since memory is not enough
    collectives: tuple[collectives.Collective, ...]

    @property
    def memory(self) -> float:
        """Bytes in all."""
        whole = self.arguments + self.results + self.temporaries + self.code
        return float(self.too_large or whole)


def together(pieces: Sequence[tuple[Compiled, int, int]], arguments: int) -> Compiled:
    """A program that runs pieces in turn, from what is said of each.

    pieces: (compiled, times that it runs, bytes that lie beside the program's arguments then).
    arguments: bytes of the program's own. Memory is that of the piece that needs most.
    """
    every = [compiled for compiled, _, _ in pieces]
    transfers = dict[tuple[str, int], collectives.Collective]()
    for compiled, times, _ in pieces:
        for kind, group, count, payload in compiled.collectives:
            before = transfers.get((kind, group), collectives.Collective(kind, group, 0, 0))
            transfers[kind, group] = before._replace(
                count=before.count + times * count, payload=before.payload + times * payload
            )
    return Compiled(
        seconds=sum(each.seconds for each in every),
        flops=sum(each.flops for each in every),
        traffic=sum(each.traffic for each in every),
        arguments=arguments,
        results=0,
        temporaries=max(each.temporaries + each.results + beside for each, _, beside in pieces),
        code=sum(each.code for each in every),
        too_large=max(each.too_large for each in every),
        collectives=tuple(sorted(transfers.values(), key=lambda each: -each.payload)),
    )


def devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice that need not be there: "v5e:16x16".

    UserError without libtpu, or if it knows no such slice.
    """
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    # Whatever accelerator is here has no part in it.
    jax.config.update("jax_platforms", "cpu")
    # Of what is compiled for them only the figures are kept.
    jax.config.update("jax_enable_compilation_cache", False)
    if not _version("libtpu"):
        raise UserError(
            f"--topology {topology} needs the package libtpu, which compiles for TPUs on any Linux "
            "machine: pip install 'slam_jax[tpu_topology]'"
        )
    # A host of TPUs has four chips, but for a slice of one.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if re.search(r":1x1(x1)?$", topology) else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **bounds).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--topology {topology!r} is no TPU slice ({reason}); such are v5e:2x2, v5e:16x16, "
            "v5p:2x2x4, v6e:8x8"
        ) from None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def compiled(
    lowered: jax.stages.Lowered, places: list[jax.Device], announce: Callable[[], None]
) -> Compiled:
    """The program for those devices, from the folder of results if it was compiled before.

    announce: called if it was not.
    """
    kept = _folder() / f"{_key(lowered, places)}.json"
    if kept.is_file():
        try:
            found = json.loads(kept.read_text())
            transfers = tuple(collectives.Collective(*each) for each in found.pop("collectives"))
            return Compiled(**found, collectives=transfers)
        except (OSError, ValueError, TypeError, KeyError):
            pass  # half a file, or another program's: it is replaced
    announce()
    result = _compile(lowered, len(places))
    try:
        folder.write_atomic(kept, json.dumps(result._asdict()).encode())
    except OSError as error:
        raise UserError(
            f"cannot write {kept.parent} ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from None
    return result


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "slam_jax" / "dry_run"


def _key(lowered: jax.stages.Lowered, places: list[jax.Device]) -> str:
    """Of all that the result depends on."""
    versions = [_version(package) for package in ("jax", "jaxlib", "libtpu")]
    where = (_FORMAT, places[0].device_kind, len(places), *map(str, places), *versions)
    return hashlib.sha256(f"{where} {lowered.as_text()}".encode()).hexdigest()


def _compile(lowered: jax.stages.Lowered, num_devices: int) -> Compiled:
    started = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if used is None:
            raise
        seconds = time.perf_counter() - started
        return Compiled(seconds, 0, 0, 0, 0, 0, 0, float(used[1]) * _UNITS[used[2]], ())
    seconds = time.perf_counter() - started
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    return Compiled(
        seconds=seconds,
        flops=cost.get("flops", 0),
        traffic=cost.get("bytes accessed", 0),
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        too_large=0,
        collectives=tuple(collectives.count(program.as_text(), num_devices)),
    )
