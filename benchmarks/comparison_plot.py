"""Draws what benchmarks/comparison.py left.

    python benchmarks/comparison_plot.py --keep runs/comparison --plot comparison.png \\
        --pictures pictures.png --arms lcm_k100x5 matched_50_k100x5

--plot: the Frechet distance of each arm against its number of steps, and how far it is off LCM at
the same seed, with standard errors over seeds. --pictures: what every arm drew in one step, of one
seed, a row for each.
"""

import argparse
import pathlib
import sys

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot, ticker

from benchmarks import comparison, comparison_table
from slam_jax.metrics import estimate
from slam_jax.runtime import folder, images

_SIZE = (10, 4)  # inches


def plot(lines: list[dict], names: list[str], out: pathlib.Path) -> None:
    """Distances to the left, differences from the first arm to the right."""
    of = {name: {x["seed"]: x for x in lines if x["arm"] == name} for name in names}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=_SIZE, layout="constrained")
    for place, name in enumerate(names):
        # Side by side, where arms are level.
        steps = [steps * 1.02**place for steps in comparison.STEPS]
        shared = sorted(of[name].keys() & of[names[0]].keys())
        distances = [[of[name][s][f"frechet_{n}"] for s in of[name]] for n in comparison.STEPS]
        gaps = [
            [of[name][s][f"frechet_{n}"] - of[names[0]][s][f"frechet_{n}"] for s in shared]
            for n in comparison.STEPS
        ]
        for axes, values in ((left, distances), (right, gaps)):
            found = [estimate.of(np.array(each)) for each in values]
            axes.errorbar(
                steps, [each.mean for each in found], [each.standard_error for each in found],
                marker="o", capsize=3, label=name,
            )  # fmt: skip
    for axes, title in ((left, "Fréchet distance"), (right, f"less {names[0]} at the same seed")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(comparison.STEPS, [str(steps) for steps in comparison.STEPS])
        axes.set(title=title, xlabel="steps")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    for ticks in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        ticks(ticker.StrMethodFormatter("{x:g}"))
    right.set_yscale("symlog", linthresh=0.1)
    left.legend(fontsize="small")
    figure.savefig(out, dpi=110)


def pictures(keep: pathlib.Path, names: list[str], seed: int, out: pathlib.Path) -> None:
    """A grid, in the order of the names."""
    rows = []
    for name in names:
        with np.load(keep / f"{name}-{seed}.npz") as kept:
            rows.append(kept["shown"])
    labelled = images.labelled_grid(np.stack(rows), names, [""] * len(rows[0]))
    folder.write_atomic(out, images.png(labelled))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("runs/comparison"))
    parser.add_argument("--arms", nargs="+", required=True, choices=sorted(comparison.arms()))
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--pictures", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    options = parser.parse_args()
    if options.pictures:
        pictures(options.keep, options.arms, options.seed, options.pictures)
    if options.plot:
        found = [sorted(options.keep.glob(f"{name}-*.npz")) for name in options.arms]
        if missing := [name for name, paths in zip(options.arms, found, strict=True) if not paths]:
            sys.exit(f"error: {options.keep} holds nothing of {', '.join(missing)}")
        lines = [comparison_table.numbers(path) for paths in found for path in paths]
        plot(lines, options.arms, options.plot)


if __name__ == "__main__":
    main()
