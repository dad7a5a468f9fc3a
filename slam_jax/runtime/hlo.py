"""XLA's text of a compiled program, read, and what one device does in it.

The text is that of one device's program (compiled.as_text()). Of a kernel that is neither XLA's nor
in NVIDIA's libraries, only what it is given and gives is known.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|async_computation)="
    r"%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"(\w+)=([\dx_-]+)")
_CONTRACTING = re.compile(r"lhs_contracting_dim(?:s|ensions\")[=:][{\[]([\d,\"]*)[}\]]")
_TARGET = re.compile(r"custom_call_target=\"([^\"]*)\"")
# Of NVIDIA's libraries: what each takes and gives, by the part it has in the convolution, and how
# many products an attention makes. The last of several results is scratch memory.
_CONVOLUTIONS = {
    "__cudnn$convForward": "iko", "__cudnn$convBiasActivationForward": "iko",
    "__cudnn$convBackwardInput": "oki", "__cudnn$convBackwardFilter": "iok",
}  # fmt: skip
_ATTENTIONS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
_LIBRARIES = ("__cudnn$", "__cublas$")
# These move nothing: they name what others wrote.
_NAMING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "iota", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_CALLS = ("while", "conditional", "call")
_ENDS = ("-done", "-update")  # of what a -start began, which counts
_SLICES = {"slice", "dynamic-slice", "gather"}
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")


class Instruction(NamedTuple):
    """One line."""

    name: str
    shape: str
    operation: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names."""
        listed = _COMMENT.sub("", self.rest.partition(")")[0])
        return [each.split()[-1].removeprefix("%") for each in listed.split(", ") if each]


class Program(NamedTuple):
    """Instructions by computation, and the name of the computation that it starts with."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Program:
    """Of a whole module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            current = computations[started[1]] = []
            entry = started[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(*found.groups()))
    return Program(computations, entry)


def called(instruction: Instruction) -> list[str]:
    """The computations that it runs, each branch of a conditional among them."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [each.strip().removeprefix("%") for each in branches.split(",")]
    return names


def sizes(shape: str, main_memory: bool = False) -> tuple[int, ...]:
    """Bytes of each array in a shape, which may be a tuple, without what a layout pads.

    main_memory: only of arrays that lie there; 0 for those in a chip's faster memories.
    """
    return tuple(
        0 if main_memory and "S(" in layout else _count(dimensions) * _bits(dtype) // 8
        for dtype, dimensions, layout in _ARRAY.findall(shape)
    )


def flops(program: Program) -> int:
    """Multiplications and additions of matrix products and convolutions, bodies of loops once."""
    return sum(each.flops for each in work(program))


def traffic(program: Program) -> int:
    """Bytes of main memory that operations read and write, bodies of loops once."""
    return sum(each.traffic for each in work(program))


class Work(NamedTuple):
    """Of an operation that the program carries out, such as a fusion."""

    times: int  # in one run of the program
    flops: int  # multiplications and additions of matrix products and convolutions
    traffic: int  # bytes of main memory that it reads and writes


def work(program: Program) -> Iterator[Work]:
    """Of every operation. Padding counts nothing, and what a fusion keeps inside is no traffic."""
    waiting = [(program.entry, 1)]
    while waiting:
        name, times = waiting.pop()
        instructions = program.computations[name]
        shapes = {each.name: each.shape for each in instructions}
        for each in instructions:
            if each.operation in _CALLS:
                often = times * trips(program, each) if each.operation == "while" else times
                waiting += [(inner, often) for inner in called(each)]
            elif each.operation not in _NAMING and not each.operation.endswith(_ENDS):
                yield Work(times, _flops(each, shapes, program), _moved(each, shapes, program))


def trips(program: Program, loop: Instruction) -> int:
    """How often a loop runs: as XLA says, or by its condition, counter < constant; else 1."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = program.computations[_CONDITION.search(loop.rest)[1]]
    limits = [
        int(each.rest.partition(")")[0])
        for each in condition
        if each.operation == "constant" and re.match(r"[su]\d+\[\]", each.shape)
    ]
    counts_up = any("direction=LT" in each.rest for each in condition)
    return limits[0] if len(limits) == 1 and counts_up else 1


def _flops(instruction: Instruction, shapes: Mapping[str, str], program: Program) -> int:
    if instruction.operation in _PRODUCTS:
        operands = [shapes[name] for name in instruction.operands]
        return _PRODUCTS[instruction.operation](instruction, operands)
    total = 0
    for name in called(instruction):
        inside = program.computations[name]
        shapes = {each.name: each.shape for each in inside}
        total += sum(_flops(each, shapes, program) for each in inside)
    return total


def _moved(instruction: Instruction, shapes: Mapping[str, str], program: Program) -> int:
    operands = [shapes[name] for name in instruction.operands]
    written = sum(sizes(instruction.shape, main_memory=True))
    if instruction.operation in _SLICES:
        return _part(instruction, operands[0]) + written
    if instruction.operation == "dynamic-update-slice":
        return 2 * sum(sizes(operands[1], main_memory=True))
    inside = [program.computations[name] for name in called(instruction)]
    if instruction.operation.startswith(("fusion", "async-start")) and inside:
        read = sum(_read(inside[0], place, shape) for place, shape in enumerate(operands))
        if instruction.operation == "async-start":
            written = 0  # its shape names operands, too; what it fetches goes to faster memory
        return read + written
    if instruction.operation.endswith("-start"):
        return written  # of which one half is what is read
    if _target(instruction).startswith(_LIBRARIES):
        written -= sum(sizes(instruction.shape)[1:][-1:])  # scratch
    return written + sum(sum(sizes(shape, main_memory=True)) for shape in operands)


def _read(inside: Sequence[Instruction], place: int, shape: str) -> int:
    """Bytes that a fusion reads of an operand: of one that it only slices, the slices."""
    (parameter,) = (
        each
        for each in inside
        if each.operation == "parameter" and each.rest.startswith(f"{place})")
    )
    users = [each for each in inside if parameter.name in each.operands]
    if users and all(
        each.operation in _SLICES and each.operands[0] == parameter.name for each in users
    ):
        return sum(_part(each, shape) for each in users)
    if any(
        each.operation == "dynamic-update-slice" and each.operands[0] == parameter.name
        for each in users
    ):
        return 0  # it is written in place
    return sum(sizes(shape, main_memory=True))


def _part(taken: Instruction, source: str) -> int:
    """Bytes of what is taken, if its source lies in main memory."""
    return sum(sizes(taken.shape)) if sum(sizes(source, main_memory=True)) else 0


def _target(instruction: Instruction) -> str:
    """Of a call to what XLA has not made, its name; else ""."""
    found = _TARGET.search(instruction.rest)
    return found[1] if found else ""


def _library(instruction: Instruction, operands: Sequence[str]) -> int:
    """Of a call to NVIDIA's libraries; of any other kernel it is not known what it computes."""
    name = _target(instruction)
    if name.startswith("__cublas$"):
        return _dot(instruction, operands)
    if name in _CONVOLUTIONS:
        result = _ARRAY.search(instruction.shape)[0]
        parts = dict(zip(_CONVOLUTIONS[name], (*operands[:2], result), strict=True))
        return _convolved(instruction, parts["i"], parts["k"], parts["o"])
    if name in _ATTENTIONS:
        batch, queries, heads, depth = _extents(operands[0])
        keys = _extents(operands[1])[1]
        return 2 * _ATTENTIONS[name] * batch * heads * queries * keys * depth
    return 0


def _dot(instruction: Instruction, operands: Sequence[str]) -> int:
    extents = _extents(operands[0])
    summed = _CONTRACTING.search(instruction.rest)[1].replace('"', "")
    length = math.prod(extents[int(axis)] for axis in filter(None, summed.split(",")))
    return 2 * math.prod(_extents(instruction.shape)) * length


def _convolution(instruction: Instruction, operands: Sequence[str]) -> int:
    return _convolved(instruction, *operands, instruction.shape)


_PRODUCTS = {"dot": _dot, "convolution": _convolution, "custom-call": _library}


def _convolved(instruction: Instruction, *shapes: str) -> int:
    """A product wherever a tap of the window meets an element, for each feature in and out.

    shapes: of the input, the kernel and the output.
    """
    labels = _LABELS.search(instruction.rest).groups()
    inputs, kernel, outputs = (
        dict(zip(axes, _extents(shape), strict=True))
        for axes, shape in zip(labels, shapes, strict=True)
    )
    window = dict(_WINDOW.findall(instruction.rest.partition("window={")[2].partition("}")[0]))
    pairs = math.prod(
        _meetings(inputs[axis], kernel[axis], outputs[axis], window, int(axis))
        for axis in inputs
        if axis.isdigit()
    )
    batch_groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    batch = inputs["b"] // int(batch_groups[1]) if batch_groups else outputs["b"]
    return 2 * batch * outputs["f"] * kernel["i"] * pairs


def _meetings(length: int, taps: int, places: int, window: dict[str, str], axis: int) -> int:
    """(output place, tap) pairs along an axis that fall on an element of the input."""

    def setting(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    stride, spread = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
    before = int(setting("pad", "0_0").split("_")[0])
    reach = np.arange(taps) * int(setting("rhs_dilate", "1"))
    where = np.arange(places)[:, None] * stride + reach - before
    inside = (where >= 0) & (where <= (length - 1) * spread) & (where % spread == 0)
    return int(inside.sum())


def _extents(shape: str) -> list[int]:
    return [int(each) for each in _ARRAY.search(shape)[2].split(",") if each]


def _count(dimensions: str) -> int:
    return math.prod(map(int, filter(None, dimensions.split(","))))


def _bits(dtype: str) -> int:
    """Of one element: the number in the name, but for a few."""
    if dtype in ("pred", "token"):
        return 8 if dtype == "pred" else 0
    return int(re.match(r"[a-z]+(\d+)", dtype)[1])
