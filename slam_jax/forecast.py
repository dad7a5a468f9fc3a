"""What a train step costs on a chip, from counts alone: a prediction, and at best.

The roofline (Williams et al. 2009): a step takes no less than its arithmetic at the chip's peak,
than its memory traffic, and than what its devices send each other, each at full bandwidth and
all at the same time. Closer to what can be: every operation by itself, one after the other.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slam_jax.runtime import aot, chips

_HOUR = 3600.0


class Counts(NamedTuple):
    """Of a train step, before any chip is thought of."""

    num_devices: int
    batch_size: int
    microbatches: int  # one after the other within a step
    num_steps: int
    in_float32: bool  # what the networks compute in
    flops_of: Mapping[str, int]  # by part, for one image, as traced
    flops: int  # of a step over all devices, as traced, loops unrolled
    flops_once: int  # the same with each loop's body once, which is how XLA counts
    parameters: Mapping[str, int]  # by part of the state
    bytes_of: Mapping[str, tuple[int, int]]  # by part: in all, and on one device
    changing: int  # bytes on one device that a step reads and writes once: student to optimizer


class Roofline(NamedTuple):
    """Seconds that a step takes at the least for each reason."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """Of a whole step."""
        return max(self)

    @property
    def bound(self) -> str:
        """What takes that long."""
        return max(self._asdict(), key=self._asdict().__getitem__)


def roofline(counts: Counts, compiled: aot.Compiled, chip: chips.Chip) -> Roofline:
    """On devices that are each one chip."""
    peak = chip.flops_float32 if counts.in_float32 else chip.flops
    sent = sum(each.sent for each in compiled.collectives)
    return Roofline(
        compute=counts.flops / counts.num_devices / peak,
        memory=traffic(counts, compiled) / chip.memory_bandwidth,
        interconnect=sent / chip.link,
    )


def one_by_one(counts: Counts, compiled: aot.Compiled, chip: chips.Chip) -> float:
    """Seconds of a step whose operations each wait for the one before, as a chip's mostly do.

    Each takes its arithmetic at the chip's peak or its memory traffic at full bandwidth, whichever
    takes longer. Kernels of which XLA does not know what they compute add what is missing.
    """
    peak = chip.flops_float32 if counts.in_float32 else chip.flops
    known = sum(each.times * each.flops for each in compiled.work)
    unknown = max(0, counts.flops / counts.num_devices - known)
    return unknown / peak + sum(
        each.times * max(each.flops / peak, each.traffic / chip.memory_bandwidth)
        for each in compiled.work
    )


def traffic(counts: Counts, compiled: aot.Compiled) -> float:
    """Bytes of memory that a step reads and writes on a device, microbatches counted.

    The loop over them was counted once; outside of it are the reading and writing of the state.
    """
    once = min(compiled.traffic, 2 * counts.changing)
    return once + counts.microbatches * (compiled.traffic - once)


def text(counts: Counts, compiled: aot.Compiled, chip: chips.Chip | None) -> str:
    """The tables, for a terminal."""
    sections = [
        _state(counts), _flops(counts, compiled), _memory(compiled, chip), _sent(compiled),
        _time(counts, compiled, chip),
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections)


def _state(counts: Counts) -> list[str]:
    rows = [
        [name, _count(counts.parameters[name]), _bytes(whole), _bytes(own)]
        for name, (whole, own) in counts.bytes_of.items()
    ]
    columns = zip(*counts.bytes_of.values(), strict=True)
    total = [sum(counts.parameters.values()), *map(sum, columns)]
    rows.append(["all", _count(total[0]), _bytes(total[1]), _bytes(total[2])])
    return _table(["state", "numbers", "bytes in all", "per device"], rows)


def _flops(counts: Counts, compiled: aot.Compiled) -> list[str]:
    rows = [[name, _flop(value)] for name, value in counts.flops_of.items()]
    rows.append(["whole step / image", _flop(counts.flops / counts.batch_size)])
    lines = _table(["FLOPs per image, traced", ""], rows)
    if compiled.flops:
        xla = compiled.flops * counts.num_devices
        lines.append(
            f"counted in the compiled step, loops once: {_flop(xla)} on all devices, "
            f"{xla / counts.flops_once:.3f} of {_flop(counts.flops_once)} as traced so"
        )
    return lines


def _memory(compiled: aot.Compiled, chip: chips.Chip | None) -> list[str]:
    if compiled.too_large:
        rows = [["the compiler gave up at", _bytes(compiled.too_large)]]
    else:
        rows = [
            ["arguments", _bytes(compiled.arguments)],
            ["results beside them", _bytes(compiled.results)],
            ["temporaries", _bytes(compiled.temporaries)],
            ["program", _bytes(compiled.code) if compiled.code else "not made"],
            ["all", _bytes(compiled.memory)],
        ]
    lines = _table(["memory per device, compiled", ""], rows)
    if chip is None:
        return [*lines, "whether that fits is not known: no chip of that name in the table"]
    left = chip.memory - compiled.memory
    if left >= 0 and not compiled.too_large:
        of_it = "are left" if compiled.code else "are left for the program"
        return [*lines, f"fits into {_bytes(chip.memory)} of {chip.name}: {_bytes(left)} {of_it}"]
    return [
        *lines,
        f"DOES NOT FIT into {_bytes(chip.memory)} of {chip.name}: {_bytes(-left)} too much; "
        "raise accumulate, set student.remat, or cut the state with an fsdp axis in mesh",
    ]


def _sent(compiled: aot.Compiled) -> list[str]:
    if compiled.too_large:
        return ["collectives: not known, since nothing was compiled"]
    rows = [
        [each.kind, str(each.group), str(each.count), _bytes(each.payload), _bytes(each.sent)]
        for each in compiled.collectives
    ]
    total = sum(each.sent for each in compiled.collectives)
    rows.append(["all", "", str(sum(each.count for each in compiled.collectives)), "",
                 _bytes(total)])  # fmt: skip
    return _table(["collectives per step", "among", "count", "arrays", "sent per device"], rows)


def _time(counts: Counts, compiled: aot.Compiled, chip: chips.Chip | None) -> list[str]:
    if chip is None or compiled.too_large:
        return ["time: not predicted" + " (this chip is not in the table)" * (chip is None)]
    limits = roofline(counts, compiled, chip)
    hours = limits.step * counts.num_steps / _HOUR
    rows = [
        ["compute", _seconds(limits.compute)],
        ["memory traffic", _seconds(limits.memory)],
        ["interconnect", _seconds(limits.interconnect)],
        ["step", f"{_seconds(limits.step)}, bound by {limits.bound}"],
        ["images per second", f"{counts.batch_size / limits.step:.1f}"],
        *_one_by_one(counts, compiled, chip),
        [f"{counts.num_steps} steps", f"{hours:.2f} h, {hours * counts.num_devices:.1f} device-h"],
    ]
    return [
        *_table(["roofline: PREDICTION, at best", ""], rows),
        f"peaks of {chip.name}: {_flop(chip.flops)}/s, {_bytes(chip.memory_bandwidth)}/s memory, "
        f"{_bytes(chip.link)}/s sent ({chip.source})",
        "no measurement: real steps take longer, by what share is not known from here",
    ]


def _one_by_one(counts: Counts, compiled: aot.Compiled, chip: chips.Chip) -> list[list[str]]:
    if not compiled.work:
        return []
    seconds = one_by_one(counts, compiled, chip)
    return [[
        f"{compiled.operations} operations, one by one",
        f"{_seconds(seconds)}, {counts.batch_size / seconds:.1f} images per second",
    ]]  # fmt: skip


def as_json(counts: Counts, compiled: aot.Compiled, chip: chips.Chip | None) -> dict:
    """The same numbers, unrounded."""
    line = {
        **counts._asdict(), "bytes_of": {
            name: {"all": whole, "per_device": own}
            for name, (whole, own) in counts.bytes_of.items()
        },
        **{f"xla_{name}": value for name, value in compiled._asdict().items() if name != "work"},
        "xla_collectives": [
            {**each._asdict(), "sent": each.sent} for each in compiled.collectives
        ],
        "memory": compiled.memory, "chip": chip and chip._asdict(),
    }  # fmt: skip
    if chip is not None:
        line["fits"] = not compiled.too_large and compiled.memory <= chip.memory
        if not compiled.too_large:
            limits = roofline(counts, compiled, chip)
            hours = limits.step * counts.num_steps / _HOUR
            line |= {
                "predicted_s": limits._asdict(), "predicted_step_s": limits.step,
                "predicted_bound": limits.bound, "predicted_hours": hours,
                "predicted_one_by_one_s": one_by_one(counts, compiled, chip),
                "predicted_device_hours": hours * counts.num_devices,
            }  # fmt: skip
    return line


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _scaled(value: int | float, units: Sequence[str]) -> str:
    for unit in units:
        if abs(value) < 1000 or unit == units[-1]:
            return f"{value:.4g} {unit}".strip()
        value /= 1000
    raise AssertionError("units are never empty")


def _bytes(value: int | float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _flop(value: int | float) -> str:
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _count(value: int) -> str:
    return f"{value:,}"


def _seconds(value: int | float) -> str:
    return f"{value:.4g} s"
