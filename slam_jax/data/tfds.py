"""Samples of TensorFlow Datasets that are prepared for random access. Needs no TensorFlow."""

import dataclasses
import functools
import glob
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format, message

from slam_jax.data import captions
from slam_jax.data.sample import Sample
from slam_jax.errors import BadSample, UserError

_CAPTIONS = ("caption", "captions", "text")
# What its readers raise on damaged or missing files.
_DAMAGE = (ValueError, RuntimeError, OSError, message.DecodeError, json_format.ParseError)


class Place(NamedTuple):
    """A split of a prepared dataset, and the names of its features."""

    folder: str
    split: str
    images: tuple[str, ...]  # the picture is the one called image, or else the first by name
    caption: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The examples of a split; their keys are their numbers."""

    place: Place
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        """BadSample, saying where it lies."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        image, *others = self.place.images
        shard, key = self.place.folder, str(index)
        try:
            example = dict(_data(self.place)[index])
            content = example.pop(image)
            if not isinstance(content, bytes):  # of a record that is cut, all features are None
                raise BadSample("unreadable record")
            caption = _first_text(example[self.place.caption])
        except BadSample as bad:
            raise BadSample(bad.reason, shard, key) from None
        except _DAMAGE:
            raise BadSample("unreadable record", shard, key) from None
        fields = {name: _plain(example[name]) for name in example if name not in others}
        scalars = {name: value for name, value in fields.items() if value is not None}
        return Sample(content, caption, shard, key, scalars)


def opened(name: str) -> Dataset:
    """The source NAME, NAME/CONFIG, NAME:VERSION or a folder, each with @SPLIT or all of train.

    It lies in $TFDS_DATA_DIR, or ~/tensorflow_datasets, prepared in a format with random access;
    nothing is downloaded, and the code that prepared it is not imported, which may need
    TensorFlow. UserError if it is not there, or has no images or captions.
    """
    name, _, split = name.partition("@")
    folder = _folder(name)
    try:
        builder = tfds.builder_from_directory(folder)
        place = Place(
            folder, split or "train", *_features(name, dict(builder.info.features.items()))
        )
        return Dataset(place, len(_data(place)))
    except NotImplementedError:
        raise UserError(
            f"tfds:{name} is not prepared for random access; {_prepare(name)}"
        ) from None
    except UserError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tfds:{name}@{split or 'train'} cannot be read: {reason}") from None


def _prepare(name: str) -> str:
    return f"prepare it with: tfds build {name} --file_format=array_record"


def _folder(name: str) -> str:
    """Of the newest version. UserError if there is none, or one of several configs."""
    data = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    top = os.path.join(os.path.expanduser(data), os.path.expanduser(name.replace(":", os.sep)))
    if not name or not os.path.isdir(top):
        raise UserError(f"tfds:{name} is not in {data} ($TFDS_DATA_DIR); {_prepare(name)}")
    if os.path.exists(os.path.join(top, "features.json")):
        return top
    pattern = os.path.join(glob.escape(top), "**", "features.json")
    found = map(os.path.dirname, glob.iglob(pattern, recursive=True))
    versions = [path for path in found if tfds.core.Version.is_valid(os.path.basename(path))]
    configs = sorted({os.path.relpath(os.path.dirname(path), top) for path in versions})
    if not versions:
        raise UserError(f"tfds:{name} has no finished version in {top}; {_prepare(name)}")
    if len(configs) > 1:
        raise UserError(f"tfds:{name} has configs {', '.join(configs)}; give tfds:{name}/CONFIG")
    return max(versions, key=lambda path: tfds.core.Version(os.path.basename(path)))


def _features(
    name: str, features: Mapping[str, tfds.features.FeatureConnector]
) -> tuple[tuple[str, ...], str]:
    """Images and caption. UserError naming those that are there if one of them is missing."""
    images = (key for key in features if isinstance(features[key], tfds.features.Image))
    # They come in no order.
    images = tuple(sorted(images, key=lambda name: (name != "image", name)))
    caption = next((key for key in _CAPTIONS if _has_text(features, key)), None)
    if not images or caption is None:
        kinds = (f"{key} ({type(features[key]).__name__})" for key in sorted(features))
        raise UserError(
            f"tfds:{name} has {', '.join(kinds)}; it must have an Image and one of "
            f"{', '.join(_CAPTIONS)}, a Text or several"
        )
    return images, caption


def _has_text(features: Mapping[str, tfds.features.FeatureConnector], key: str) -> bool:
    """Whether there is a text, a sequence of texts, or of dicts with a text, of that name."""
    if key not in features:
        return False
    feature = features[key]
    if isinstance(feature, tfds.features.Sequence | tfds.features.Dataset):
        return _has_text({key: feature.feature}, key)
    if isinstance(feature, tfds.features.FeaturesDict):
        return _has_text(dict(feature.items()), "text")
    return isinstance(feature, tfds.features.Text)


@functools.lru_cache
def _data(place: Place):
    """The examples, shared by all threads of the process; files are opened when asked for."""
    builder = tfds.builder_from_directory(place.folder)
    decoders = dict.fromkeys(place.images, tfds.decode.SkipDecoding())
    return builder.as_data_source(place.split, decoders=decoders)


def _first_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return _first_text(value["text"])
    if isinstance(value, bytes):
        return captions.decoded(value)
    if isinstance(value, str):
        return captions.checked(value)
    first = next(iter(() if value is None else value), None)
    if first is None:
        raise BadSample("missing caption")
    return _first_text(first)


def _plain(value: Any) -> int | float | bool | str | None:
    """A number or a string as Python has it; None for anything else."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, int | float | str) else None
