"""The numbers of benchmarks/comparison.py, seed by seed and as a table.

    python benchmarks/comparison_table.py --keep runs/comparison --out comparison.jsonl
    python benchmarks/comparison_table.py --earlier benchmarks/results/*-comparison*.jsonl

Means over seeds with their standard errors; then each arm's difference from LCM on the same walk
(with the released loss, and with its own), seed by seed, so that what the seeds have in common
drops out. Of a student that was trained twice the later file's counts.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np

from benchmarks import comparison
from slam_jax.metrics import estimate, fid, precision_recall
from slam_jax.runtime import folder

_SHOWN = (
    *(f"frechet_{steps}" for steps in comparison.STEPS),
    *(f"accuracy_{steps}" for steps in comparison.STEPS[:3]),
    "precision_2", "recall_2", "endpoint_1",
)  # fmt: skip


def numbers(path: pathlib.Path) -> dict[str, Any]:
    """Those of a file that benchmarks/comparison.py left."""
    name, _, seed = path.stem.rpartition("-")
    with np.load(path) as kept:
        found = dict(kept)
    real = found["real"]
    reference = fid.fit(real)
    line: dict[str, Any] = {
        "arm": name, "seed": int(seed), "num_steps": len(found["losses"]),
        "loss": float(found["losses"][-50:].mean()), "seconds": float(found["seconds"]),
    }  # fmt: skip
    for steps in comparison.STEPS:
        features = found[f"features_{steps}"]
        near = precision_recall.precision_recall(real, features)
        line[f"frechet_{steps}"] = fid.frechet_distance(fid.fit(features), reference)
        line |= {f"{what}_{steps}": value for what, value in near._asdict().items()}
        for what in ("accuracy", "endpoint"):
            line[f"{what}_{steps}"] = float(found[f"{what}_{steps}"])
    curve = zip(comparison.CURVE, found["curve"].tolist(), strict=True)
    return line | {"error_curve": {str(t): value for t, value in curve}}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: means and standard errors, then the paired differences from LCM."""
    arms = comparison.arms()
    of = {name: {line["seed"]: line for line in lines if line["arm"] == name} for name in arms}
    present = [name for name in arms if of[name]]
    means = [[name, str(len(of[name])), *_cells(of[name].values())] for name in present]
    differences = []
    for name, base in itertools.product(present, present):
        if name == base or not _is_lcm_of(arms[base], arms[name]):
            continue
        shared = sorted(of[name].keys() & of[base].keys())
        gaps = [
            {key: of[name][seed][key] - of[base][seed][key] for key in _SHOWN} for seed in shared
        ]
        differences.append([f"{name} - {base}", str(len(shared)), *_cells(gaps)])
    head = ["", "seeds", *_SHOWN]
    return "\n\n".join(_markdown(head, rows) for rows in (means, differences) if rows)


def _is_lcm_of(arm: comparison.Arm, other: comparison.Arm) -> bool:
    """On the same walk, as released or with the other's own loss."""
    lcm = arm.form.get("gamma") == ("ones",)
    same_loss = arm.form.get("distance") in (None, other.form.get("distance"))
    same_rest = arm._replace(form={}) == other._replace(form={}, cond_proj=arm.cond_proj)
    return lcm and same_loss and same_rest


def _cells(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = list(lines)
    return [_mean([line[key] for line in lines]) for key in _SHOWN]


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    found = estimate.of(np.array(values))
    return f"{found.mean:.3f} ± {found.standard_error:.3f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("runs/comparison"))
    parser.add_argument("--out", type=pathlib.Path, help="file of JSON, a line for each student")
    parser.add_argument(
        "--earlier", type=pathlib.Path, nargs="+", default=[],
        help="files that --out wrote, whose students join the table",
    )  # fmt: skip
    options = parser.parse_args()
    paths = sorted(options.keep.glob("*.npz"))
    if not paths and not options.earlier:
        parser.error(f"{options.keep} holds no *.npz; run benchmarks/comparison.py first")
    lines = [numbers(path) for path in paths]
    if options.out:
        content = "".join(f"{json.dumps(line)}\n" for line in lines)
        folder.write_atomic(options.out, content.encode())
    earlier = [json.loads(line) for path in options.earlier for line in path.open()]
    print(table([*earlier, *lines]))


if __name__ == "__main__":
    main()
