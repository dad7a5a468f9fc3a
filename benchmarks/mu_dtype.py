"""The demo's loss with AdamW's first moment in bfloat16 against float32, on the same sub-paths."""

import argparse
import json
import pathlib
import sys

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np

from benchmarks import laboratory, timing


def losses(
    lab: laboratory.Laboratory, found: laboratory.Examples, mu_dtype: str, num_steps: int
) -> np.ndarray:
    """Of each step of configs/tiny.py, which starts at the teacher."""
    optimizer = lab.settings.optimizer._replace(mu_dtype=mu_dtype)
    here = lab._replace(settings=lab.settings._replace(optimizer=optimizer))
    student = laboratory.start(here, "zero", seed=0)
    method = laboratory.method(here)
    return laboratory.train(
        here, method, student, found, seed=0, num_steps=num_steps, ema_rate=0.95
    )[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_steps", type=timing.positive, default=200)
    options = parser.parse_args()
    lab = laboratory.enter()
    count = options.num_steps * laboratory.BATCH_SIZE
    found = laboratory.examples(lab, laboratory.method(lab), seed=0, count=count)
    exact, half = (losses(lab, found, kind, options.num_steps) for kind in ("float32", "bfloat16"))
    last = slice(-(options.num_steps // 4 or 1), None)
    line = {
        "program": "mu_dtype", **vars(options), "loss": float(exact.mean()),
        "mean": float(half.mean() / exact.mean() - 1),
        "last_quarter": float(half[last].mean() / exact[last].mean() - 1),
        "largest": float(np.abs(half / exact - 1).max()), **timing.surroundings(),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
