"""From pictures to what is kept of each: features, and how well it fits its caption."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slam_jax.evaluation import classifier, clip, inception
from slam_jax.evaluation.extractor import Extractor
from slam_jax.evaluation.pixels import Pixels
from slam_jax.evaluation.protocol import Clip, Features
from slam_jax.evaluation.store import Arrays
from slam_jax.metrics import clip_score


class Meters(NamedTuple):
    """What measures pictures."""

    features: Extractor
    scorers: Mapping[str, clip.Scorer]  # by metric
    features_of: Callable[[Pixels], Arrays]  # all outputs of the extractor
    scores_of: Callable[[Pixels, Sequence[str]], Arrays]  # one of each scorer

    def fingerprints(self) -> tuple[str, ...]:
        """Of the networks and what is done to pictures before them."""
        return (
            self.features.fingerprint,
            *(scorer.pictures.fingerprint for scorer in self.scorers.values()),
        )

    def name(self) -> str:
        """For people."""
        scorers = (scorer.pictures.name for scorer in self.scorers.values())
        return "; ".join([self.features.name, *scorers])


def check(features: Features, chosen: Clip, size: int) -> None:
    """UserError if the networks' files are not there or not right; touches no device."""
    _extractor(features, size, _as_it_is)
    _scorers(chosen, _as_it_is)


def load(features: Features, chosen: Clip, size: int, devices: Mesh) -> Meters:
    """The networks on the devices, over which pictures are spread."""
    place = partial(jax.device_put, device=NamedSharding(devices, P()))
    return of_networks(_extractor(features, size, place), _scorers(chosen, place), devices)


def _as_it_is(params: Any) -> Any:
    return params


def _extractor(features: Features, size: int, place: Callable[[Any], Any]) -> Extractor:
    if features.network == "inception":
        return inception.extractor(features.weights, features.mode, place=place)
    return classifier.extractor(classifier.read(features.weights, size), place=place)


def _scorers(chosen: Clip, place: Callable[[Any], Any]) -> dict[str, clip.Scorer]:
    scorers = {}
    if chosen.model:
        scorers["clip"] = clip.scorer(chosen.model, chosen.prefix, place=place)
    if chosen.hps:
        scorers["hps"] = clip.hps_scorer(chosen.hps, place=place)
    return scorers


def of_networks(extractor: Extractor, scorers: Mapping[str, clip.Scorer], devices: Mesh) -> Meters:
    """Meters of networks that lie on the devices already."""

    def features_of(pixels: Pixels) -> Arrays:
        return _run(extractor, pixels, devices)

    def scores_of(pixels: Pixels, captions: Sequence[str]) -> Arrays:
        return {
            metric: clip_score.per_pair(
                _run(scorer.pictures, pixels, devices)["embedding"], scorer.captions(captions)
            )
            for metric, scorer in scorers.items()
        }

    return Meters(extractor, scorers, features_of, scores_of)


def _run(extractor: Extractor, pixels: Pixels, devices: Mesh) -> Arrays:
    """Spread over the devices, which must divide the pictures."""
    rows = NamedSharding(devices, P("data"))
    return jax.device_get(extractor.apply(jax.device_put(extractor.prepare(pixels), rows)))
