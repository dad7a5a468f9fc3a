"""A source of captioned pictures, encoded once into a cache that training reads.

    python -m slam_jax.prepare --source photos --model ORG/NAME --size 512 --out caches/photos

Killed at any moment, the same command goes on where it was, and ends with the same bytes. On
several hosts each encodes its share of the shards into the same, shared folder. A finished cache
is looked at with --out caches/photos --verify, or --report.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slam_jax import command, pipeline
from slam_jax.data import (
    batches,
    filters,
    manifest,
    report,
    shapes2d,
    shards,
    sources,
    summary,
    tally,
    text_inputs,
    verify,
    watch,
)  # fmt: skip
from slam_jax.data.image import Crop
from slam_jax.data.manifest import Manifest, Plan
from slam_jax.data.shards import Encoder
from slam_jax.data.summary import Summary
from slam_jax.data.variants import Variants
from slam_jax.data.watch import Watch
from slam_jax.errors import UserError
from slam_jax.runtime import folder, hosts, log, mesh
from slam_jax.weights import fingerprint, hub, pretrained, translate

_SOURCE = flags.DEFINE_string(
    "source", None,
    "Folder of pictures, GLOB of tars or Parquet files, tfds:NAME, or shapes2d.",
)  # fmt: skip
# Flags that other programs have too.
_MODEL, _REVISION, _VARIANT, _CONFIG, _OUT = (
    flags.DEFINE_string(name, default, text, allow_override=True)
    for name, default, text in (
        ("model", None, "Model folder in diffusers' layout, ORG/NAME on the hub, or single file."),
        ("revision", "", "Branch, tag or commit on the hub."),
        ("variant", "", "fp16 for files *.fp16.safetensors."),
        ("model_config", "", "For a single file: folder or ORG/NAME with configs and tokenizer."),
        ("out", None, "Folder of the cache."),
    )
)
_SIZE = flags.DEFINE_integer("size", 512, "Height and width in pixels.", lower_bound=1)
_CROPS = flags.DEFINE_integer(
    "crops", 1, "Variants of each picture, randomly cut if more than one: each costs as much "
    "time and disk as the first.", lower_bound=1,
)  # fmt: skip
_RANDOM_CROP = flags.DEFINE_bool("random_crop", False, "Cut anywhere, not in the middle.")
_FLIP = flags.DEFINE_bool("flip", False, "Mirror half of the variants, chosen at random.")
_FILTER = flags.DEFINE_multi_string(
    "filter", [], "What to keep: 'short_side >= 512', 'aesthetic >= 6'; may be repeated."
)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "Of the source, at most so many, the first ones.", lower_bound=1
)
_RECORDS_PER_SHARD = flags.DEFINE_integer(
    "records_per_shard", 4096, "Samples of the source in a shard, before any is left out.",
    lower_bound=1,
)  # fmt: skip
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Pictures at a time, per device.", 1)
_COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", "float32", "Of the VAE's activations.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of random crops and flips.", lower_bound=0, allow_override=True
)
_NUM_THREADS = flags.DEFINE_integer("num_threads", 16, "That read ahead, in each process.", 1)
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes that read ahead.", 0)
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "For tars' indices; default: beside each tar.")
_MAX_BAD_FRACTION = flags.DEFINE_float(
    "max_bad_fraction", 0.01, "Stop where more samples than that cannot be used.", 0.0, 1.0
)
_REPORT = flags.DEFINE_bool("report", False, "Write report.html and report.json into the cache.")
_VERIFY = flags.DEFINE_bool("verify", False, "Read the finished cache through.")
_HOSTS = command.hosts_flags()
_TIMEOUT_S = 600  # in which all hosts must have come


def main() -> None:
    out = Path(_OUT.value)
    given = [flag for flag in (_SOURCE, _MODEL) if flag.value is not None]
    if len(given) == 1:
        raise UserError(f"--{given[0].name} is given; --source and --model belong together")
    if not given and not _VERIFY.value and not _REPORT.value:
        raise UserError("give --source and --model; or --verify or --report for a finished cache")
    if given and not _prepare(out):
        print(f"{out}: done with this host's shards; the last host finishes the cache")
        return
    if _VERIFY.value:
        _verify(out)
    if _REPORT.value:
        _write_report(out)


def _prepare(out: Path) -> bool:
    """Encodes what is missing of this host's shards. Whether the cache is finished."""
    wanted = filters.parse(_FILTER.value)
    dtype = pipeline.dtype(_COMPUTE_DTYPE.value)
    hosts.start(*_HOSTS(), timeout_s=_TIMEOUT_S)
    folder.check_writable(out)
    hosts.check_shared(out)
    source = _source(_SOURCE.value)
    model = hub.find(*(flag.value for flag in (_MODEL, _REVISION, _VARIANT, _CONFIG)))
    tokens = text_inputs.read(model.tokenizer, model.tokenizer_2)
    posterior = pipeline.cached_posterior(model.vae.config, dtype)
    plan = _plan(len(source), model, tokens, posterior)
    host, num_hosts = hosts.part()
    _begin(out, plan, host)
    mine = range(host, plan.num_shards, num_hosts)
    done = {number: summary.read(out / plan.shard_name(number)) for number in mine}
    todo = [number for number in mine if done[number] is None]
    watching = watch.start(_MAX_BAD_FRACTION.value, (each[0] for each in done.values() if each))
    if todo:
        crop = Crop(plan.size, plan.random_crop, plan.flip)
        pictures = Variants(source, wanted, crop, tokens, plan.crops, plan.seed)
        encoder = _encoder(model.vae, posterior, plan.batch_size)
        _write(out, plan, todo, pictures, encoder, watching)
    return _finish(out, plan, host)


def _source(name: str):
    if name != "shapes2d":
        return sources.find(name, _INDEX_DIR.value)
    if _NUM_IMAGES.value is None:
        raise UserError("--source shapes2d has no end; give --num_images")
    return shapes2d.Shapes2D(_SIZE.value, _NUM_IMAGES.value, _SEED.value + 1)


def _plan(
    num_samples: int,
    model: pretrained.Pretrained,
    tokens: text_inputs.Tokenizers,
    posterior: Callable,
) -> Plan:
    height, width, _ = pipeline.latent_shape(model, _SIZE.value)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), model.vae.params
    )
    pixels = jax.ShapeDtypeStruct((1, _SIZE.value, _SIZE.value, 3), np.uint8)
    moments = jax.eval_shape(posterior, params, pixels)
    return Plan(
        source=_SOURCE.value,
        num_samples=min(num_samples, _NUM_IMAGES.value or num_samples),
        vae=fingerprint.of_params(model.vae.params),
        tokenizers=text_inputs.fingerprints(tokens),
        size=_SIZE.value,
        latent=(height, width, moments.shape[-1] // 2),
        dtype=moments.dtype.name,
        compute_dtype=_COMPUTE_DTYPE.value,
        crops=_CROPS.value,
        random_crop=_RANDOM_CROP.value or _CROPS.value > 1,
        flip=_FLIP.value,
        filters=tuple(_FILTER.value),
        seed=_SEED.value,
        records_per_shard=_RECORDS_PER_SHARD.value,
        batch_size=_BATCH_SIZE.value,
    )


def _begin(out: Path, plan: Plan, host: int) -> None:
    """Writes the plan; UserError if the folder has another one, or holds something else."""
    before = manifest.read_plan(out)
    if before is None:
        # A plan may have been begun, by a run that was killed or by another host.
        others = [path for path in out.iterdir() if not path.name.startswith(f".{manifest.PLAN}")]
        if others and manifest.read_plan(out) is None:
            raise UserError(f"--out {out} holds {others[0].name} and is no cache; choose another")
        manifest.publish(out / manifest.PLAN, manifest.dump_plan(plan), host)
        return
    for name, old, new in manifest.differences(before, plan):
        raise UserError(
            f"--out {out} was begun with {name}={old} and this run has {name}={new}; give the "
            "same options and model as then, or choose another --out"
        )


def _encoder(vae: pretrained.Component, posterior: Callable, batch_size: int) -> Encoder:
    """On all devices of this host, `batch_size` pictures on each."""
    devices = Mesh(np.array(jax.local_devices()), ("data",))
    params = jax.device_put(translate.load(vae.params), mesh.replicated(devices))
    run, rows = jax.jit(posterior), NamedSharding(devices, P("data"))
    return Encoder(
        lambda pixels: run(params, jax.device_put(pixels, rows)), batch_size * devices.size
    )


def _write(
    out: Path, plan: Plan, todo: list[int], pictures: Variants, encoder: Encoder, watching: Watch
) -> None:
    """The shards `todo`; reading runs ahead of encoding."""
    read = batches.iterate(
        shards.chunks(pictures, plan, todo), 0, num_threads=_NUM_THREADS.value,
        num_workers=_NUM_WORKERS.value, num_prefetch=2 * _NUM_THREADS.value,
    )  # fmt: skip
    num_samples = sum(len(plan.samples(number)) for number in todo)
    with contextlib.closing(read), log.bar(0, num_samples) as progress:
        progress.bar.set_description_str("encoding")
        shards.write(out, plan, todo, _shown(read, progress), encoder, watching)
        # Nobody asks for what comes after the last chunk.
        progress.bar.update(num_samples - progress.bar.n)


def _shown(read: Iterator[list], progress: log.Progress) -> Iterator[list]:
    """The same, and moves the bar on."""
    for chunk in read:
        yield chunk
        progress.bar.update(len(chunk))
        rate = progress.bar.n / max(progress.bar.format_dict["elapsed"], 1e-3)
        progress.bar.set_postfix_str(f"{rate:,.1f} samples/s", refresh=False)


def _finish(out: Path, plan: Plan, host: int) -> bool:
    """Writes the manifest if all shards of all hosts are there. Whether they are."""
    found = [summary.read(out / plan.shard_name(number)) for number in range(plan.num_shards)]
    if None in found:
        return False
    watch.finish(watch.start(_MAX_BAD_FRACTION.value, (each for each, _ in found)))
    total = summary.total((each for each, _ in found), 0)
    filtered, bad = (summary.reasons(total, filtered=which) for which in (True, False))
    whole = Manifest(plan, tuple(shard for _, shard in found), total.kept, filtered, bad)
    manifest.publish(out / manifest.MANIFEST, manifest.dump(whole), host)
    dropped = tally.listed(Counter(filtered) + Counter(bad)) or "none"
    kept = f"kept {total.kept:,} of {plan.num_samples:,} pictures"
    if plan.crops > 1:
        kept += f", {plan.crops} crops of each at {plan.crops} times the work and disk of one"
    print(f"{out}: {kept}; left out: {dropped}; {total.cut:,} captions cut; "
          f"{whole.num_bytes / 1e6:,.1f} MB")  # fmt: skip
    return True


def _verify(out: Path) -> None:
    """UserError naming the damaged shards."""
    damaged = []
    with log.bar(0, len(manifest.read(out).shards)) as progress:
        progress.bar.set_description_str("verifying")
        for shard, problem in verify.damage(out):
            progress.bar.update()
            if problem is not None:
                damaged.append(f"{out / shard.name} ({problem})")
    if damaged:
        raise UserError(
            f"{len(damaged):,} damaged: {', '.join(damaged)}; delete them and run slam_jax.prepare "
            "with the same options again, which encodes just these"
        )
    print(f"{out}: every record is as it was written")


def _write_report(out: Path) -> None:
    whole = manifest.read(out)
    read = (_summary(out / shard.name) for shard in whole.shards)
    total = summary.total(read, report.MOST_THUMBNAILS)
    numbers = report.numbers(whole, total)
    folder.write_atomic(out / report.JSON, report.as_json(numbers))
    folder.write_atomic(out / report.HTML, report.as_html(numbers, total))
    print(f"{out / report.HTML}, {out / report.JSON}")


def _summary(path: Path) -> Summary:
    found = summary.read(path)
    if found is None:
        raise UserError(
            f"{path} or {summary.path_of(path).name} beside it is missing or damaged; run "
            "slam_jax.prepare with the same options again"
        )
    return found[0]


if __name__ == "__main__":
    command.run(main, required=("out",), leave=hosts.leave)
