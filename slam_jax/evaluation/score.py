"""From what was kept of every image to the numbers of a table."""

import numpy as np
from jaxtyping import Float, Int32

from slam_jax.errors import UserError
from slam_jax.evaluation import classifier
from slam_jax.evaluation.protocol import Protocol
from slam_jax.evaluation.reference import Reference
from slam_jax.evaluation.store import Arrays
from slam_jax.evaluation.table import Score
from slam_jax.metrics import bootstrap, estimate, fid, kid, precision_recall, prompt_accuracy

_OF_PAIRS = ("precision", "recall", "density", "coverage")
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "prompt_accuracy", "clip", "hps")
_NAMES = {
    "fid": "FID", "kid": "KID", "prompt_accuracy": "prompt accuracy", "clip": "CLIP score",
    "hps": "HPSv2",
}  # fmt: skip
Features = Float[np.ndarray, "N F"]
FEWEST = 6  # images for precision and recall
_SEED = 0  # of subsets and resamples


def check(protocol: Protocol) -> None:
    """UserError if the protocol draws too few images for its metrics."""
    count = protocol.prompts.count
    if "kid" in protocol.metrics and count < 2 * protocol.kid_subset:
        raise UserError(
            f"protocol.prompts.count {count} is less than two subsets of protocol.kid_subset "
            f"{protocol.kid_subset}; draw more, or lower it"
        )
    if not {*_OF_PAIRS}.isdisjoint(protocol.metrics) and count < FEWEST:
        raise UserError(
            f"protocol.prompts.count {count}: precision and recall need {FEWEST} images"
        )


def scores(
    measured: Arrays,
    reference: Reference,
    labels: Int32[np.ndarray, "N K"] | None,
    protocol: Protocol,
) -> dict[str, Score]:
    """The protocol's metrics, in its order, by the names that tables have."""
    features = measured["features"]
    found: dict[str, Score] = {}
    if not {*_OF_PAIRS}.isdisjoint(protocol.metrics):
        shares = precision_recall.precision_recall(reference.features, features)
        found |= {name: Score(value) for name, value in shares._asdict().items()}
    for metric in {*protocol.metrics} - {*_OF_PAIRS}:
        match metric:
            case "fid":
                found[metric] = _fid(features, reference, protocol.bootstrap)
            case "kid":
                subset = protocol.kid_subset
                found[metric] = Score(*kid.kid(reference.features, features, subset, _SEED))
            case "prompt_accuracy":
                found[metric] = _prompt_accuracy(measured["logits"], labels)
            case "clip" | "hps":
                found[metric] = Score(*estimate.of(measured[metric]))
    return {name(metric, protocol): found[metric] for metric in protocol.metrics}


def name(metric: str, protocol: Protocol) -> str:
    """What tables call it; FID is what Inception's features give, and no other's."""
    if metric == "fid" and protocol.features.network != "inception":
        return "Frechet distance"
    return _NAMES.get(metric, metric)


def _fid(features: Features, reference: Reference, rounds: int) -> Score:
    real = reference.gaussian
    value = fid.frechet_distance(fid.fit(features), real)
    error = fid.standard_error(features, real)
    if not rounds:
        return Score(value, error)
    interval = bootstrap.fid_interval(features, real, _SEED, rounds)
    return Score(value, error, (interval.low, interval.high))


def _prompt_accuracy(logits: Float[np.ndarray, "N L"], labels: Int32[np.ndarray, "N K"]) -> Score:
    share = prompt_accuracy.prompt_accuracy(classifier.heads(logits), labels)
    return Score(share, float(np.sqrt(share * (1 - share) / len(logits))))


def warning(reference: Reference, count: int) -> str | None:
    """What to say of a Frechet distance of so few images, if they are too few."""
    return fid.small_sample_warning(reference.gaussian, count)


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether the value is the better one of that metric."""
    return value > best if metric in HIGHER_IS_BETTER else value < best
