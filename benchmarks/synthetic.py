"""Data for benchmarks/data.py, made on the spot: photographs, a tokenizer, caches, tars."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image

from slam_jax.data import cache, manifest, text_inputs
from slam_jax.data.sample import Sample

CAPTION = "A photograph of an astronaut riding a horse on Mars, detailed, 4k wallpaper"
_SIZES = ((512, 512), (768, 512), (512, 768), (1024, 768))


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A source of `size` samples, the same few files over and over."""

    files: tuple[bytes, ...]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.files[index % len(self.files)], CAPTION, "memory", str(index), {})


def photographs(count: int) -> tuple[bytes, ...]:
    """JPEG files of 0.25 to 0.8 megapixels, with detail at every scale, as the web's have."""
    rng = np.random.default_rng(0)
    return tuple(_photograph(rng, *_SIZES[number % len(_SIZES)]) for number in range(count))


def _photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    total = np.zeros((height, width, 3), np.float32)
    for cell, contrast in ((128, 100), (32, 40), (8, 20), (2, 8)):
        shape = (height // cell + 1, width // cell + 1, 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        large = noise.resize((width, height), Image.Resampling.BICUBIC)
        total += contrast * (np.asarray(large, np.float32) / 128 - 1)
    out = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(128 + total, 0, 255))).save(out, "JPEG", quality=92)
    return out.getvalue()


def letters(folder: Path) -> text_inputs.Tokenizers:
    """A tokenizer of CLIP's kind that knows letters alone."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return text_inputs.read(folder, None)


def latents(folder: Path, count: int, side: int, per_shard: int) -> cache.Cache:
    """A cache of `count` random posteriors [side, side, 8] of 2 bytes a number."""
    plan = manifest.Plan(
        source="synthetic", num_samples=count, vae="", tokenizers=("",), size=8 * side,
        latent=(side, side, 4), dtype="bfloat16", compute_dtype="float32", crops=1,
        random_crop=False, flip=False, filters=(), seed=0, records_per_shard=per_shard,
        batch_size=1,
    )  # fmt: skip
    folder.mkdir()
    shards = []
    for number in range(plan.num_shards):
        path = folder / plan.shard_name(number)
        _write_shard(path, plan.samples(number), side)
        records = len(plan.samples(number))
        shards.append(manifest.Shard(path.name, records, path.stat().st_size, ""))
    done = manifest.Manifest(plan, tuple(shards), count, {}, {})
    (folder / manifest.MANIFEST).write_bytes(manifest.dump(done))
    return cache.find(folder)


def _write_shard(path: Path, samples: range, side: int) -> None:
    rng = np.random.default_rng(samples.start)
    ids, time_ids = np.arange(77, dtype=np.int32), np.zeros(6, np.int32)
    with cache.writer(path) as write:
        for number in samples:
            moments = rng.integers(0, 256, (side, side, 16), np.uint8)
            write(cache.Record(moments, ids, None, time_ids, CAPTION, False, "tar", str(number)))


def tar(path: Path, pictures: tuple[bytes, ...], count: int, extra: int) -> None:
    """A shard as img2dataset writes it: NAME.jpg, NAME.json, NAME.txt, and so on.

    extra: random bytes behind each picture, for files larger than is quick to make.
    """
    filling = np.random.default_rng(0).bytes(extra)
    with tarfile.open(path, "w") as file:
        for number in range(count):
            fields = {"caption": CAPTION, "key": f"{number:09d}", "punsafe": 0.01}
            for suffix, content in (
                ("jpg", pictures[number % len(pictures)] + filling),
                ("json", json.dumps(fields).encode()),
                ("txt", CAPTION.encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
