"""What a run's checkpoints scored: evaluations.jsonl, TensorBoard events, and which is the best.

Not in the run's metrics.jsonl, which is training's: it cuts off, when it is started again, all from
the first line of a later step on, so that a score of an older step that came after would be lost,
and so would be one that is written while it cuts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from slam_jax.evaluation import score
from slam_jax.evaluation.table import Row
from slam_jax.runtime import folder

NAME = "evaluations.jsonl"

Line = Mapping[str, Any]


def read(out: Path, digest: str) -> list[Line]:
    """What was scored by this protocol, in order; a line that is not whole counts as none."""
    path = out / NAME
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["protocol"] == digest]


def key(metric: str, steps: int) -> str:
    """What a score is called: "Frechet distance, 4 steps"."""
    return f"{metric}, {steps} step{'s' * (steps > 1)}"


def line(step: int, identity: str, digest: str, rows: Sequence[Row]) -> Line:
    """A checkpoint's scores."""
    scores = {key(name, row.steps): each.value for row in rows for name, each in row.scores.items()}
    return {"step": step, "model": identity, "protocol": digest, **scores}


def is_best(new: Line, before: Sequence[Line], metric: str, name: str) -> bool:
    """Whether the new line's value of `name` is better than those of all other steps before."""
    others = [each[name] for each in before if each["step"] != new["step"]]
    return all(score.is_better(metric, new[name], other) for other in others)


def append(out: Path, new: Line) -> None:
    """Writes the line, in place of one of the same step and protocol, and TensorBoard events."""
    path = out / NAME
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(each) for each in text.splitlines()]
    same = {"step", "protocol"}
    kept = [each for each in lines if any(each[field] != new[field] for field in same)]
    content = "".join(json.dumps(each) + "\n" for each in [*kept, new])
    folder.write_atomic(path, content.encode())
    with SummaryWriter(str(out / "events")) as events:
        for name, value in new.items():
            if isinstance(value, float):
                events.add_scalar(f"evaluation/{name}", value, new["step"])
