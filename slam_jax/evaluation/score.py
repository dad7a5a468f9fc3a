"""From what was kept of every image to the numbers of a table."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32

from slam_jax.errors import UserError
from slam_jax.evaluation import classifier
from slam_jax.evaluation.protocol import Protocol
from slam_jax.evaluation.reference import Reference
from slam_jax.evaluation.store import Arrays
from slam_jax.metrics import bootstrap, estimate, fid, kid, precision_recall, prompt_accuracy

_OF_PAIRS = ("precision", "recall", "density", "coverage")
# Metrics that compare sets of features, for which the references' Gaussian is not enough.
OF_FEATURES = ("kid", *_OF_PAIRS)
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "prompt_accuracy", "clip")
_NEIGHBOURS = 6  # as many images as precision and recall need
_SEED = 0  # of subsets and resamples


def check(protocol: Protocol) -> None:
    """UserError if the protocol draws too few images for its metrics."""
    count = protocol.prompts.count
    if "kid" in protocol.metrics and count < 2 * protocol.kid_subset:
        raise UserError(
            f"protocol.prompts.count {count} is less than two subsets of protocol.kid_subset "
            f"{protocol.kid_subset}; draw more, or lower it"
        )
    if not {*_OF_PAIRS}.isdisjoint(protocol.metrics) and count < _NEIGHBOURS:
        raise UserError(
            f"protocol.prompts.count {count}: precision and recall need {_NEIGHBOURS} images"
        )


def numbers(
    measured: Arrays,
    reference: Reference,
    labels: Int32[np.ndarray, "N K"] | None,
    protocol: Protocol,
) -> dict[str, float]:
    """The protocol's metrics, in its order, those with an error followed by it.

    KEY_se is a standard error, fid_low and fid_high the ends of a 95 % interval.
    """
    found: dict[str, float] = {}
    for metric in protocol.metrics:
        match metric:
            case "fid":
                found |= _fid(measured["features"], reference, protocol.bootstrap)
            case "kid":
                value = kid.kid(
                    reference.features, measured["features"], protocol.kid_subset, _SEED
                )
                found |= _with_error("kid", value)
            case "prompt_accuracy":
                heads = classifier.heads(measured["logits"])
                found[metric] = prompt_accuracy.prompt_accuracy(heads, labels)
            case "clip":
                found |= _with_error("clip", estimate.of(measured["clip"]))
    return found | _of_pairs(measured["features"], reference, protocol.metrics)


def _fid(features: np.ndarray, reference: Reference, rounds: int) -> dict[str, float]:
    found = {"fid": fid.frechet_distance(fid.fit(features), reference.gaussian)}
    if rounds:
        interval = bootstrap.fid_interval(features, reference.gaussian, _SEED, rounds)
        found |= {
            "fid_low": interval.low, "fid_high": interval.high,
            "fid_se": interval.standard_error, "fid_bias": interval.bias,
        }  # fmt: skip
    return found


def _of_pairs(features: np.ndarray, reference: Reference, metrics: tuple) -> dict[str, float]:
    wanted = [metric for metric in _OF_PAIRS if metric in metrics]
    if not wanted:
        return {}
    values: Mapping[str, float] = precision_recall.precision_recall(
        reference.features, features
    )._asdict()
    return {metric: values[metric] for metric in wanted}


def _with_error(name: str, value: estimate.Estimate) -> dict[str, float]:
    return {name: value.mean, f"{name}_se": value.standard_error}


def warning(reference: Reference, count: int) -> str | None:
    """What to say of a Frechet distance of so few images, if they are too few."""
    return fid.small_sample_warning(reference.gaussian, count)


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether the value is the better one of that metric."""
    return value > best if metric in HIGHER_IS_BETTER else value < best
