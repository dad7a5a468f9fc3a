"""Programs compiled without being run, and planned for devices that are not there."""

import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from slam_jax.errors import UserError
from slam_jax.runtime import collectives, folder, hlo, topologies

# Of what is kept; another number makes everything be compiled anew.
_FORMAT = 4
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")
# Names of the files that XLA writes, and of ours.
_OPTIMIZED = "after_optimizations"
_PLAN = "-buffer-assignment"
_FAILURE = "failure.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*):$", re.MULTILINE)
_POLL_S = 0.5


class Compiled(NamedTuple):
    """What XLA says of a program, for one device."""

    seconds: float  # that compiling took
    flops: float  # bodies of loops once
    traffic: float  # bytes of memory that operations read and write, bodies of loops once
    arguments: int  # bytes of memory
    results: int  # bytes beyond those that take the arguments' place
    temporaries: int  # bytes at most
    code: int  # bytes; 0 where none was made
    too_large: float  # bytes; not 0 where the compiler gave up since memory is not enough
    collectives: tuple[collectives.Collective, ...]
    operations: int = 0  # one after the other, loops unrolled
    work: tuple[hlo.Work, ...] = ()  # of these; what has no products is one entry

    @property
    def memory(self) -> float:
        """Bytes in all."""
        whole = self.arguments + self.results + self.temporaries + self.code
        return float(self.too_large or whole)


def compiled(
    lowered: jax.stages.Lowered, places: list[jax.Device], announce: Callable[[], None]
) -> Compiled:
    """The program for devices that are here, from the folder of results if it was there before.

    announce: called if it was not.
    """
    return _kept(lowered, places, announce, partial(_compile, lowered, len(places)))


def planned(
    lowered: jax.stages.Lowered,
    again: Callable[[], jax.stages.Lowered],
    places: list[jax.Device],
    announce: Callable[[], None],
) -> Compiled:
    """The same for devices that are not here, without machine code, which takes longest to make.

    again: makes the same `lowered` in another process, which is ended as soon as XLA has settled
    what is computed in what order and where every array lies.
    """
    return _kept(lowered, places, announce, partial(_plan, again, places))


def _kept(
    lowered: jax.stages.Lowered,
    places: list[jax.Device],
    announce: Callable[[], None],
    make: Callable[[], Compiled],
) -> Compiled:
    kept = _folder() / f"{_key(lowered, places)}.json"
    if kept.is_file():
        try:
            found = json.loads(kept.read_text())
            found["collectives"] = tuple(
                collectives.Collective(*each) for each in found["collectives"]
            )
            found["work"] = tuple(hlo.Work(*each) for each in found["work"])
            return Compiled(**found)
        except (OSError, ValueError, TypeError, KeyError):
            pass  # half a file, or another program's: it is replaced
    announce()
    result = make()
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
    where = (_FORMAT, places[0].device_kind, len(places), *map(str, places))
    told = f"{where} {topologies.versions()} {lowered.as_text()}"
    return hashlib.sha256(told.encode()).hexdigest()


def _compile(lowered: jax.stages.Lowered, num_devices: int) -> Compiled:
    started = time.perf_counter()
    try:
        found = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(str(error), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    cost, memory = found.cost_analysis() or {}, found.memory_analysis()
    program = hlo.parse(found.as_text())
    operations, work = _work(program)
    return Compiled(
        seconds=seconds,
        flops=cost.get("flops", 0),
        traffic=hlo.traffic(program),
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        too_large=0,
        collectives=tuple(collectives.count(program, num_devices)),
        operations=operations,
        work=work,
    )


def _work(program: hlo.Program) -> tuple[int, tuple[hlo.Work, ...]]:
    """How many operations there are, and theirs."""
    found = list(hlo.work(program))
    moved = sum(each.times * each.traffic for each in found if not each.flops)
    products = (each for each in found if each.flops)
    return sum(each.times for each in found), (hlo.Work(1, 0, moved), *products)


def _refused(message: str, seconds: float) -> Compiled:
    """Of a compiler that gave up for want of memory; any other failure is raised."""
    used = _USED.search(message)
    if used is None:
        raise RuntimeError(message)
    return Compiled(seconds, 0, 0, 0, 0, 0, 0, float(used[1]) * _UNITS[used[2]], ())


def _plan(again: Callable[[], jax.stages.Lowered], places: list[jax.Device]) -> Compiled:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        # A new process: XLA, once begun, cannot be stopped.
        process = multiprocessing.get_context("spawn").Process(
            target=_write_plan,
            args=(again, place, topologies.options(places[0].platform)),
            daemon=True,
        )
        process.start()
        # XLA writes its files in turn: when the next one is there, those before are whole.
        while process.is_alive() and not list(Path(place).glob(f"*{_PLAN}-values.txt")):
            process.join(_POLL_S)
        process.kill()
        process.join()
        seconds = time.perf_counter() - started
        failure = Path(place) / _FAILURE
        if failure.exists():
            return _refused(failure.read_text(), seconds)
        texts = [
            each.read_text()
            for name in (f"*{_OPTIMIZED}.txt", f"*{_OPTIMIZED}{_PLAN}.txt")
            for each in Path(place).glob(name)
        ]
    if len(texts) != 2:
        raise RuntimeError(f"compiling ended with status {process.exitcode} and without a plan")
    return _read_plan(*texts, seconds, len(places))


def _write_plan(again: Callable[[], jax.stages.Lowered], place: str, options: dict) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A program that JAX has kept would not be planned.
    jax.config.update("jax_enable_compilation_cache", False)
    options = {"xla_dump_to": place, "xla_dump_hlo_as_text": True, **options}
    try:
        again().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        (Path(place) / _FAILURE).write_text(str(error))


def _end_with_parent() -> None:
    """Thread: a parent that is killed cannot end what it started."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _read_plan(text: str, buffers: str, seconds: float, num_devices: int) -> Compiled:
    """From XLA's text of the program, and that of where each array lies."""
    program = hlo.parse(text)
    operations, work = _work(program)
    found = {kind: 0 for kind in ("parameter", "maybe-live-out", "preallocated-temp", "constant")}
    for size, said in _ALLOCATION.findall(buffers):
        kind = next((kind for kind in found if kind in said), None)
        if kind and "color" not in said:  # others lie in the chip's faster memories
            found[kind] += int(size)
    return Compiled(
        seconds=seconds,
        flops=hlo.flops(program),
        traffic=hlo.traffic(program),
        arguments=found["parameter"],
        results=found["maybe-live-out"],
        temporaries=found["preallocated-temp"] + found["constant"],
        code=0,
        too_large=0,
        collectives=tuple(collectives.count(program, num_devices)),
        operations=operations,
        work=work,
    )
