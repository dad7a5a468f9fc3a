"""Statistics of real pictures, and of what exactly they were made."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.data import shapes2d
from slam_jax.errors import UserError
from slam_jax.evaluation import pixels, store
from slam_jax.evaluation import protocol as protocols
from slam_jax.evaluation.protocol import Images, Protocol
from slam_jax.evaluation.store import Arrays
from slam_jax.metrics import fid
from slam_jax.runtime import folder as run_folder
from slam_jax.runtime import hosts, log

STATISTICS = "reference.npz"
# Metrics that compare sets of features, for which the references' Gaussian is not enough.
OF_FEATURES = ("kid", "precision", "recall", "density", "coverage")

FeaturesOf = Callable[[pixels.Pixels], Arrays]


class About(NamedTuple):
    """What two statistics must have in common to be the same."""

    network: str  # fingerprint of what made the features
    resize: int
    filter: str
    crop: str
    count: int
    pictures: str  # sha256 of the files' own, whatever their names


class Reference(NamedTuple):
    """The real images' features."""

    gaussian: fid.Gaussian
    features: Float[np.ndarray, "N F"]  # of all, or of none where only the Gaussian was kept
    identity: str  # what they were made of; part of a protocol's hash


def of_shapes2d(wanted: protocols.Reference, images: Images) -> str:
    """The identity of those drawings."""
    return f"shapes2d, size {images.size}, seed {wanted.seed}, {wanted.count} images"


def draw_shapes2d(
    wanted: protocols.Reference, images: Images, features_of: FeaturesOf, batch_size: int
) -> Reference:
    """The features of so many drawings, made anew, since that takes seconds."""
    source = shapes2d.Shapes2D(images.size, wanted.count, wanted.seed)
    drawn = (
        np.stack([source[int(number)].image for number in numbers])
        for numbers in pixels.batches(range(wanted.count), batch_size)
    )
    pooled = [features_of(pixels.resized(batch, images))["pool"] for batch in drawn]
    features = np.concatenate(pooled)[: wanted.count]
    return Reference(fid.fit(features), features, of_shapes2d(wanted, images))


def check_folder(folder: Path, wanted: protocols.Reference, images: Images) -> list[Path]:
    """The pictures of the folder; UserError unless they are as many as the protocol has."""
    found = pixels.files(folder)
    if wanted.count not in (0, len(found)):
        raise UserError(
            f"--reference {folder} holds {len(found):,} pictures, and the protocol's references "
            f"are {wanted.count:,}; give them all"
        )
    pixels.read(found[0], wanted.crop, images)
    return found


def find(
    wanted: protocols.Reference, images: Images, given: Path | None, out: Path
) -> list[Path] | Path | None:
    """Pictures, or the file of statistics; None where they are drawn. UserError if there is none.

    given: a folder or a file, else the protocol's file, else that which an earlier run left in out.
    """
    if wanted.source == "shapes2d":
        if given is not None:
            raise UserError(f"--reference {given}: this protocol's references are shapes2d's")
        return None
    if given is not None and given.is_dir():
        return check_folder(given, wanted, images)
    path = given or (Path(wanted.file) if wanted.file else out / STATISTICS)
    _read(path)
    return path


def obtain(
    found: list[Path] | Path | None, protocol: Protocol, network: str, features_of: FeaturesOf,
    batch_size: int, out: Path,
) -> Reference:  # fmt: skip
    """The statistics of what `find` found, made by all hosts together if need be."""
    wanted, images = protocol.reference, protocol.images
    if found is None:
        return draw_shapes2d(wanted, images, features_of, batch_size)
    needs_features = not set(OF_FEATURES).isdisjoint(protocol.metrics)
    if isinstance(found, list):
        with log.bar(0, len(found)) as progress, log.phase(progress, "references"):
            measure = _measurer(found, wanted, images, features_of, batch_size, progress)
            where = out / "reference" / _key(found, network, wanted, images)
            store.fill(where, store.missing(where, len(found), hosts.part()), measure)
        hosts.wait("references measured")
        if hosts.is_first():
            whole = store.read(where, len(found))
            write(out / STATISTICS, whole, network, wanted, images, needs_features)
        hosts.wait("references written")
        found = out / STATISTICS
    return read(found, network, wanted, images, needs_features)


def _key(files: list[Path], network: str, wanted: protocols.Reference, images: Images) -> str:
    """Of what is kept of the pictures' features: the files may be others next time."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return protocols.of_json([stats, network, wanted.crop, images._asdict()])[:16]


def _measurer(
    files: list[Path], wanted: protocols.Reference, images: Images, features_of: FeaturesOf,
    batch_size: int, progress: log.Progress,
) -> Callable[[range], Arrays]:  # fmt: skip
    """(numbers of pictures) -> {"features", "sha256", that of each file}, for store.fill."""

    def measure(shard: range) -> Arrays:
        pooled, digests = [], []
        for numbers in pixels.batches(shard, batch_size):
            read = [pixels.read(files[number], wanted.crop, images) for number in numbers]
            pooled.append(features_of(np.stack([picture for picture, _ in read]))["pool"])
            digests += [bytes.fromhex(sha256) for _, sha256 in read]
            progress.bar.update(min(batch_size, shard.stop - int(numbers[0])))
        return {
            "features": np.concatenate(pooled)[: len(shard)],
            "sha256": np.stack([np.frombuffer(each, np.uint8) for each in digests])[: len(shard)],
        }

    return measure


def write(
    path: Path, measured: Arrays, network: str, wanted: protocols.Reference, images: Images,
    keep_features: bool,
) -> None:  # fmt: skip
    """The statistics of all pictures, and what they were made of."""
    features = measured["features"]
    digests = sorted(each.tobytes() for each in measured["sha256"])
    about = About(
        network, images.resize, images.filter, wanted.crop, len(features),
        hashlib.sha256(b"".join(digests)).hexdigest(),
    )  # fmt: skip
    fitted, buffer = fid.fit(features), io.BytesIO()
    np.savez(
        buffer, about=np.array(json.dumps(about._asdict())), mean=fitted.mean,
        covariance=fitted.covariance, features=features if keep_features else features[:0],
    )  # fmt: skip
    run_folder.write_atomic(path, buffer.getvalue())


def read(
    path: Path, network: str, wanted: protocols.Reference, images: Images, needs_features: bool
) -> Reference:
    """The statistics in a file; UserError unless they were made as the protocol says."""
    about, arrays = _read(path)
    expected = about._replace(
        network=network, resize=images.resize, filter=images.filter, crop=wanted.crop,
        count=wanted.count or about.count, pictures=wanted.sha256 or about.pictures,
    )  # fmt: skip
    for name, here, there in zip(About._fields, about, expected, strict=True):
        if here != there:
            raise UserError(
                f"{path} holds statistics of another protocol: {name} is {here} there and {there} "
                "in this one; give the pictures' folder as --reference, to make them anew"
            )
    if needs_features and not len(arrays["features"]):
        raise UserError(
            f"{path} has no features, which this protocol's metrics need; give the pictures' "
            "folder as --reference, to make them anew"
        )
    gaussian = fid.Gaussian(arrays["mean"], arrays["covariance"])
    identity = f"{about.count} pictures, sha256 {about.pictures}"
    return Reference(gaussian, arrays["features"], identity)


def _read(path: Path) -> tuple[About, Arrays]:
    try:
        found = store.load(path)
        about = About(**json.loads(str(found.pop("about"))))
        return about, {name: found[name] for name in ("mean", "covariance", "features")}
    except FileNotFoundError:
        raise UserError(
            f"there are no reference statistics {path}; give a folder of pictures as --reference, "
            "of which they are made once"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} holds no statistics of this program ({type(error).__name__}: {error}), which "
            "say what they were made of; give the pictures' folder as --reference"
        ) from None
