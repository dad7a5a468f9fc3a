"""The rows of a comparison as a table for people, as JSON, and as a plot. Writes no file."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

_DIGITS = 4  # of a number whose error is not known
_WIDE = 5  # times the smallest: values that differ by more are spread by their logarithm
_DPI = 150
_MARKERS = "osD^vP*X"


class Score(NamedTuple):
    """A number and how far it may be off, as far as that is known."""

    value: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None  # of 95 %


class Row(NamedTuple):
    """One model drawing with one sampler."""

    model: str
    sampler: str
    steps: int
    guidance: float | None  # w, None where the network takes none
    network_calls: int  # per image, guidance counted twice
    seconds: float | None  # per image, None where none was drawn
    images: int
    scores: Mapping[str, Score]


class Protocol(NamedTuple):
    """By what the numbers were made: nothing else may be compared with them."""

    name: str
    digest: str  # of all that it fixes

    @property
    def tag(self) -> str:
        """What stands beside every number."""
        return f"{self.name}@{self.digest[:8]}"


def markdown(rows: Sequence[Row], protocol: Protocol) -> str:
    """The table, its columns of even width, and what its errors are. Ends with a newline."""
    head, shown = cells(rows)
    whole = [
        [cell.replace("|", "\\|") for cell in line]
        for line in ([*head, "protocol"], *([*line, protocol.tag] for line in shown))
    ]
    # Of two at least, or there is no ruler with a colon.
    widths = [max(2, *map(len, column)) for column in zip(*whole, strict=True)]
    # All but the names are numbers, to the right.
    numbers = [2 <= place < len(widths) - 1 for place in range(len(widths))]
    ruler = ["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numbers, strict=True)]
    lines = [
        "| " + " | ".join(map(_aligned, line, widths, numbers)) + " |"
        for line in (whole[0], ruler, *whole[1:])
    ]
    return "\n".join([*lines, "", _legend(rows, protocol)]) + "\n"


def metrics(rows: Sequence[Row]) -> list[str]:
    """The names of all scores, in the order they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _conditions(row: Row) -> list[str]:
    return [
        row.model,
        row.sampler,
        str(row.steps),
        "" if row.guidance is None else f"{row.guidance:g}",
        str(row.network_calls),
        "" if row.seconds is None else f"{row.seconds:.3g}",
        str(row.images),
    ]


def _score(score: Score) -> str:
    """With as many digits as its error leaves."""
    value, error, interval = score
    if error is None and interval is None:
        return f"{value:.{_DIGITS}g}"
    size = (interval[1] - interval[0]) / 4 if error is None else error
    decimals = _decimals(size, value)
    text = f"{value:.{decimals}f}"
    if error is not None:
        text += f" ± {error:.{decimals}f}"
    if interval is not None:
        text += f" [{interval[0]:.{decimals}f}, {interval[1]:.{decimals}f}]"
    return text


def _decimals(error: float, value: float) -> int:
    """Behind the point, for two digits of the error; of an exact value for a few of its own."""
    if not (math.isfinite(error) and math.isfinite(value)):
        return 0
    digits, shown = (2, error) if error > 0 else (_DIGITS, abs(value))
    return max(0, digits - 1 - math.floor(math.log10(shown))) if shown > 0 else 0


def _aligned(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _legend(rows: Sequence[Row], protocol: Protocol) -> str:
    scores = [score for row in rows for score in row.scores.values()]
    notes = [f"Protocol {protocol.name}, hash {protocol.digest}"]
    if any(score.standard_error is not None for score in scores):
        notes.append("± one standard error")
    if any(score.interval is not None for score in scores):
        notes.append("[95 % interval]")
    return "; ".join(notes) + "."


def as_json(rows: Sequence[Row], protocol: Protocol, date: str) -> str:
    """{"protocol", "hash", "date", "rows"}; a number that is not finite becomes null."""
    entries = [row._asdict() | {"protocol": protocol.tag} for row in rows]
    whole = {"protocol": protocol.name, "hash": protocol.digest, "date": date, "rows": entries}
    return json.dumps(_plain(whole), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> tuple[list[Row], Protocol]:
    """The inverse of as_json; a score that is null is left out. ValueError for another file's."""
    try:
        whole = json.loads(text)
        rows = []
        for entry in whole["rows"]:
            scores = {
                name: Score(each["value"], each["standard_error"], each["interval"])
                for name, each in entry["scores"].items()
                if each["value"] is not None
            }
            values = {field: entry[field] for field in Row._fields}
            rows.append(Row(**values | {"scores": scores}))
        return rows, Protocol(whole["protocol"], whole["hash"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no results of an evaluation: {error}") from None


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table's head and its lines, without the protocol's tag."""
    names = metrics(rows)
    head = ["model", "sampler", "steps", "w", "network calls", "s / image", "images", *names]
    lines = [
        _conditions(row)
        + [_score(row.scores[name]) if name in row.scores else "" for name in names]
        for row in rows
    ]
    return head, lines


def _plain(value: Any) -> Any:
    """As JSON has it."""
    match value:
        case Score():
            return _plain(value._asdict())
        case Mapping():
            return {name: _plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case float():
            return float(value) if math.isfinite(value) else None
    return value


def plot(rows: Sequence[Row], metric: str, protocol: Protocol) -> bytes:
    """A PNG of that score against steps and against seconds per image."""
    buffer = io.BytesIO()
    figure(rows, metric, protocol).savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def figure(rows: Sequence[Row], metric: str, protocol: Protocol) -> Figure:
    """A line for each model, sampler and w; bars are 95 % intervals, or two standard errors.

    Rows without the score, or with one that is not finite, are left out.
    """
    drawing = Figure(figsize=(10, 5), layout="constrained")
    by_steps, by_time = drawing.subplots(1, 2, sharey=True)
    # Numbered among all lines, so that each looks alike in the plots of all metrics.
    for number, (label, members) in enumerate(_lines(rows)):
        line = _measured(members, metric)
        look = dict(label=label, color=f"C{number % 10}", marker=_MARKERS[number % len(_MARKERS)])
        timed = [row for row in line if row.seconds is not None]
        if line:
            _draw(by_steps, [float(row.steps) for row in line], line, metric, look)
            _draw(by_time, [row.seconds for row in timed], timed, metric, look)

    rows = _measured(rows, metric)
    steps = sorted({row.steps for row in rows})
    seconds = [row.seconds for row in rows if row.seconds is not None]
    by_steps.set(xscale="log" if _wide(steps) else "linear")
    by_steps.set_xticks(steps, map(str, steps))
    by_steps.minorticks_off()
    if _wide(seconds):
        by_time.set(xscale="log")
        _write_out(by_time.xaxis)
    if _wide([end for row in rows for end in _bar(row.scores[metric])]):
        by_steps.set(yscale="log")
        _write_out(by_steps.yaxis)
    by_steps.set(xlabel="steps", ylabel=metric)
    by_time.set(xlabel="seconds per image")
    drawing.suptitle(f"{metric}, protocol {protocol.tag}", fontsize="medium")
    handles, labels = by_steps.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=min(3, max(1, len(labels))))
    return drawing


def _measured(rows: Sequence[Row], metric: str) -> list[Row]:
    return [row for row in rows if metric in row.scores and math.isfinite(row.scores[metric].value)]


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(label, its rows), in the order the rows begin them."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.sampler, row.guidance), []).append(row)
    for (model, sampler, guidance), members in groups.items():
        several = sum(key[:2] == (model, sampler) for key in groups) > 1
        w = f", w = {guidance:g}" if several and guidance is not None else ""
        yield f"{model}, {sampler}{w}", members


def _draw(
    axes: Axes, places: Sequence[float], rows: Sequence[Row], metric: str, look: dict
) -> None:
    points = [(x, row.scores[metric]) for x, row in zip(places, rows, strict=True)]
    points.sort(key=lambda point: point[0])
    x, values = [place for place, _ in points], [score.value for _, score in points]
    ends = [_bar(score) for _, score in points]
    # matplotlib refuses a bar that ends on the wrong side of its value.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    axes.errorbar(x, values, [below, above], capsize=3, markersize=5, **look)
    axes.grid(alpha=0.3)


def _bar(score: Score) -> tuple[float, float]:
    if score.interval is not None:
        return score.interval
    reach = 2 * (score.standard_error or 0.0)
    return score.value - reach, score.value + reach


def _wide(values: Sequence[float] | Sequence[int]) -> bool:
    """Whether the small ones would fall together where equal lengths are equal differences."""
    return bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)


def _write_out(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
