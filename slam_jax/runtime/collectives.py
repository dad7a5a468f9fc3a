"""What devices send each other in a compiled program; loops count as often as they run."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from slam_jax.runtime import hlo
from slam_jax.runtime.hlo import Instruction

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_PERMUTE = "collective-permute"

# Of device groups: as a list, as an iota, and by axes of a mesh, whole or a factor of one.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


class Collective(NamedTuple):
    """All collectives of one kind among groups of one size, in one run of the program."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute
    group: int  # devices that take part in each
    count: int
    payload: int  # bytes: of the whole array, as gathered or before it is scattered

    @property
    def sent(self) -> float:
        """Bytes that a device sends, with the ring algorithms, which send the fewest."""
        match self.kind:
            case "all-reduce":
                return 2 * self.payload * (self.group - 1) / self.group
            case "collective-permute":
                return float(self.payload)
            case _:
                return self.payload * (self.group - 1) / self.group


def count(program: hlo.Program, num_devices: int) -> list[Collective]:
    """Collectives of the program by kind and group, those that move most first.

    A loop of which the text does not tell how often it runs counts once.
    """
    totals: dict[tuple[str, int], tuple[int, int]] = {}
    seen = set()
    for times, name, instruction in _walk(program, program.entry, 1):
        # On TPUs one collective may be written several times, among the operations that hide it.
        if channel := _CHANNEL.search(instruction.rest):
            same = channel[1], instruction.operation, hlo.sizes(instruction.shape)
            if same in seen:
                continue
            seen.add(same)
        kind, group, payload = _measure(name, instruction, num_devices)
        if group > 1:
            number, size = totals.get((kind, group), (0, 0))
            totals[kind, group] = (number + times, size + times * payload)
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda each: -each.sent)


def _walk(program: hlo.Program, name: str, times: int) -> Iterator[tuple[int, str, Instruction]]:
    """(how often it runs, its computation, the instruction) of every collective."""
    for instruction in program.computations[name]:
        if instruction.operation.removesuffix("-start") in _KINDS:
            yield times, name, instruction
            continue  # what it calls is its reduction
        if instruction.operation.endswith(("-done", "-update")):
            continue  # its -start was counted
        inner = times
        if instruction.operation == "while":
            inner *= hlo.trips(program, instruction)
        for each in hlo.called(instruction):
            yield from _walk(program, each, inner)


def _measure(name: str, instruction: Instruction, num_devices: int) -> tuple[str, int, int]:
    """Kind, devices in a group, and bytes of the whole array."""
    kind = instruction.operation.removesuffix("-start")
    sizes = hlo.sizes(instruction.shape)
    if instruction.operation.endswith("-start") and kind != "all-reduce":
        # Operands, results, and for some a few words that tell when it is done.
        sizes = sizes[: len(sizes) // 4 * 4 // 2 or len(sizes)] if kind == _PERMUTE else sizes
        sizes = sizes[len(sizes) // 2 :]
    size = sum(sizes)
    if kind == _PERMUTE:
        pairs = [pair.split(",") for pair in _PAIRS.search(instruction.rest)[1].split("},{")]
        moved = sum(source.strip("{}") != target.strip("{}") for source, target in pairs)
        return kind, 2, size * moved // num_devices
    group = _group(instruction.rest, num_devices)
    if kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and "all-reduce-scatter" in name:
        kind = "reduce-scatter"  # on TPUs: of the sum each device keeps a part
    return kind, group, size


def _group(rest: str, num_devices: int) -> int:
    """How many devices take part together."""
    if listed := _LISTED.search(rest):
        return len(listed[1].split(","))
    if iota := _IOTA.search(rest):
        return int(iota[1])
    if grid := _MESH.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", grid[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", grid[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise ValueError(f"groups of devices are written in a way not known: {rest}")
    return num_devices
