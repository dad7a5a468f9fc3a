"""What became of a run, as report.html: a page that needs no other file."""

import base64
import collections
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import traverse_util
from matplotlib.figure import Figure
from PIL import Image

from slam_jax import page
from slam_jax.errors import UserError
from slam_jax.evaluation import table
from slam_jax.runtime import folder, log

NAME = "report.html"
RESULTS = "results.json"
# Curves by heading, each of values in metrics.jsonl.
_CURVES = {
    "Loss": ("loss",),
    "Norms of gradient and update": ("grad_norm", "update_norm"),
    "Images per second": ("images_per_second",),
    "Left out since the line before": ("bad_samples", "filtered_samples", "skipped_updates"),
}
_LOGARITHMIC = {"loss", "grad_norm", "update_norm"}
_MOST_GRIDS = 8
_WIDEST = 1200  # pixels of an embedded picture
_MOST_LISTED = 20
_FORMATS = ("diffusers", "diffusers-folded", "single-file", "lora")


def write(workdir: Path) -> Path:
    """Writes the report of the run in that folder, finished or not; its path.

    UserError if the folder holds no run.
    """
    path = workdir / NAME
    folder.write_atomic(path, _as_html(workdir))
    return path


def _as_html(workdir: Path) -> bytes:
    try:
        chosen = json.loads((workdir / folder.CONFIG).read_text(encoding="utf-8"))
        metrics = _lines(workdir / log.METRICS)
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir} holds no run: {error}; give a --workdir of a run") from None
    starts = _words(workdir / folder.REVISION)
    values = traverse_util.flatten_dict(chosen, sep=".")
    parts = [
        page.facts(_facts(workdir, chosen, metrics, starts)),
        _evaluation(workdir / RESULTS),
        *(_curve(name, keys, metrics) for name, keys in _CURVES.items()),
        _grids(workdir / "samples"),
        _faults(workdir, metrics, starts),
        _exports(workdir),
        page.heading("Config"),
        page.facts({key: json.dumps(value) for key, value in values.items()}),
    ]
    return page.whole(f"{chosen['teacher']['model']} distilled: {workdir.name}", parts)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines that may not be there; a last line that is not whole is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _words(path: Path) -> list[list[str]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line.split() for line in text.splitlines()]


def _facts(
    workdir: Path, chosen: Mapping, metrics: Sequence[Mapping], starts: Sequence[Sequence[str]]
) -> dict[str, object]:
    done = metrics[-1]["step"] if metrics else 0
    rates = [line["images_per_second"] for line in metrics if line["images_per_second"]]
    return {
        "steps": f"{done:,} of {chosen['num_steps']:,}",
        "batch size": chosen["batch_size"],
        "images per second, median": f"{statistics.median(rates):.1f}" if rates else "not known",
        "data": chosen["data"]["source"],
        "started": starts[0][0] if starts else "not known",
        "starts in all": len(starts),
        "student": "written" if (workdir / "student").is_dir() else "not written yet",
    }


def _evaluation(path: Path) -> str:
    """The table and a plot of each score against steps and time."""
    if not path.exists():
        return ""
    try:
        rows, protocol = table.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"<p>{page.text(path.name)} cannot be shown: {page.text(error)}</p>\n"
    head, lines = table.cells(rows)
    first, *others = (
        _embedded(table.plot(rows, metric, protocol), f"{metric} against steps and time")
        for metric in table.metrics(rows)
    )
    said = f"<p>Protocol {page.text(protocol.name)}, hash {page.text(protocol.digest)}.</p>\n"
    plots = first + page.folded("The other scores", "".join(others))
    return page.heading("Evaluation") + page.table(head, lines) + said + plots


def _curve(name: str, keys: Sequence[str], metrics: Sequence[Mapping]) -> str:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for key in keys:
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, linewidth=1)
    if not axes.lines:
        return ""
    positive = all(y > 0 for line in axes.lines for y in line.get_ydata())
    axes.set(xlabel="step", yscale="log" if positive and set(keys) <= _LOGARITHMIC else "linear")
    axes.grid(alpha=0.3)
    if len(keys) > 1:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return page.heading(name) + _embedded(buffer.getvalue(), name)


def _grids(samples: Path) -> str:
    """Grids spread over the run, the last among them, and the final comparison."""
    paths = sorted(samples.glob("step_*.png"))
    every = -(-len(paths) // _MOST_GRIDS) or 1
    chosen = paths[::-1][::every][::-1]
    named = {f"Step {int(path.stem.removeprefix('step_')):,}": path for path in chosen}
    if (samples / "final.png").exists():
        named["At the end"] = samples / "final.png"
    parts = [f"<h3>{name}</h3>{_picture(path, name)}" for name, path in named.items()]
    if not parts:
        return ""
    said = "<p>A row for each prompt: teacher, student.</p>\n" if chosen else ""
    return page.heading("Samples") + said + "".join(parts)


def _picture(path: Path, name: str) -> str:
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB")
    except OSError as error:
        return f"<p>{page.text(path.name)} cannot be read: {page.text(error)}</p>"
    shown.thumbnail((_WIDEST, 10 * _WIDEST))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=88)
    return _embedded(buffer.getvalue(), name, "jpeg")


def _embedded(content: bytes, name: str, kind: str = "png") -> str:
    encoded = base64.b64encode(content).decode()
    return (
        f"<figure><img alt='{page.text(name)}' src='data:image/{kind};base64,{encoded}'></figure>"
    )


def _faults(workdir: Path, metrics: Sequence[Mapping], starts: Sequence[Sequence[str]]) -> str:
    """Starts, rollbacks, dropped updates, and where the bad samples were."""
    dropped = sum(line.get("skipped_updates", 0) for line in metrics)
    bad = collections.Counter(
        (line["shard"], line["reason"])
        for path in sorted(workdir.glob("bad_samples*.jsonl"))
        for line in _lines(path)
    )
    parts = [
        page.heading("Faults and restarts"),
        page.facts({"dropped updates": dropped, "bad samples": sum(bad.values())}),
        page.table(("started", "revision"), starts),
    ]
    rollbacks = _lines(workdir / "rollbacks.jsonl")
    if rollbacks:
        rows = [(each["step"], each["back_to"]) for each in rollbacks]
        parts.append(page.table(("rolled back at step", "to step"), rows))
    if bad:
        rows = [(*where, count) for where, count in bad.most_common(_MOST_LISTED)]
        parts.append(page.table(("shard", "reason", "bad samples"), rows))
    return "".join(parts)


def _exports(workdir: Path) -> str:
    if not (workdir / "student").is_dir():
        return ""
    commands = "\n".join(
        f"python -m slam_jax.export --workdir {workdir} --out OUT --format {each}"
        for each in _FORMATS
    )
    return (
        f"{page.heading('Export')}<p>A diffusers folder: <a href='student/'>student/</a></p>\n"
        f"<pre>{page.text(commands)}</pre>\n"
    )
