"""docs/splam_in_100_lines.ipynb runs, and its pictures are kept with it."""

import json
import pathlib

import jax
import matplotlib
import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / "docs" / "splam_in_100_lines.ipynb"


@pytest.fixture(scope="module")
def cells():
    found = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_it_runs(cells, monkeypatch):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setenv("SPLAM_STEPS", "20")
    shown = []

    def show():
        last = plt.gcf().axes[-1]
        shown.append((len(plt.gcf().axes), [line.get_ydata() for line in last.lines]))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    names = {}
    # In JAX as a reader has it, not at its strictest.
    with jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        for cell in cells:
            exec(compile("".join(cell["source"]), str(PATH), "exec"), names)
    assert [num_axes for num_axes, _ in shown] == [4, 2, 8, 1]
    # The teacher's curves end in the modes, and students of other forms are other students.
    modes, ends = np.asarray(names["means"]), np.asarray(names["end"])[:, 0, 0]
    away = np.linalg.norm(ends[:, None] - modes, axis=-1).min(1)
    assert np.mean(away < 3 * names["spread"]) > 0.95
    leaves = [
        np.asarray(each["params"]["Dense_0"]["kernel"]) for each in names["students"].values()
    ]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert not np.array_equal(leaves[0], leaves[1]) and not np.array_equal(leaves[0], leaves[2])
    # At gamma = 1 all assume the same noise, and pull the same way.
    assert np.ptp([sigma[-1] for sigma in shown[1][1]]) < 1e-6
    cosines = shown[3][1][:-1]
    assert len(cosines) == 3
    assert [line[-1] for line in cosines] == pytest.approx([1, 1, 1], abs=1e-5)
    assert all(line[0] < 0.999 for line in cosines)


def test_its_pictures_are_kept_small(cells):
    pictures = [output for cell in cells for output in cell["outputs"]]
    assert [list(picture["data"]) for picture in pictures] == [["image/png"]] * 4
    assert PATH.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
