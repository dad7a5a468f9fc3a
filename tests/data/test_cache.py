"""The cache's files: what is written is read, and damage is told from it."""

import concurrent.futures
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from slam_jax.data import cache, manifest, verify
from slam_jax.errors import BadSample, UserError

SHAPE = (4, 4, 8)
PLAN = manifest.Plan(
    source="photos", num_samples=10, vae="aa", tokenizers=("bb",), size=32, latent=(4, 4, 4),
    dtype="bfloat16", compute_dtype="float32", crops=1, random_crop=False, flip=False,
    filters=("short_side >= 32",), seed=0, records_per_shard=4, batch_size=8,
)  # fmt: skip


def _record(index, sdxl=False):
    rng = np.random.default_rng(index)
    ids = rng.integers(0, 9, 77).astype(np.int32)
    return cache.Record(
        rng.normal(size=SHAPE).astype(ml_dtypes.bfloat16), ids, ids + 1 if sdxl else None,
        rng.integers(0, 99, 6).astype(np.int32), f"ein Bär {index}", index % 2 == 0, "a.tar",
        "bad name \udc80" if index == 3 else str(index),
    )  # fmt: skip


def _write(folder, counts=(4, 4, 2), sdxl=False, plan=PLAN):
    """A finished cache of shards of so many records, numbered through."""
    shards, first = [], 0
    for number, count in enumerate(counts):
        path = folder / plan.shard_name(number)
        with cache.writer(path) as add:
            for index in range(first, first + count):
                add(_record(index, sdxl))
        num_bytes, digest = path.stat().st_size, verify.sha256(path)
        shards.append(manifest.Shard(path.name, count, num_bytes, digest))
        first += count
    whole = manifest.Manifest(plan, tuple(shards), first, {"aspect > 2": 3}, {"damaged picture": 1})
    manifest.publish(folder / manifest.PLAN, manifest.dump_plan(plan))
    manifest.publish(folder / manifest.MANIFEST, manifest.dump(whole))
    return whole


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path)
    return tmp_path


def _equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype
            np.testing.assert_array_equal(mine, other)
        else:
            assert mine == other and type(mine) is type(other)


@pytest.mark.parametrize("sdxl", [False, True])
def test_every_record_comes_back(tmp_path, sdxl):
    whole = _write(tmp_path, (4, 0, 1, 3), sdxl)
    found = cache.find(tmp_path)
    assert found.manifest == whole and len(found) == 8
    for index in range(8):
        _equal(found.record(index), _record(index, sdxl))


def test_examples_are_what_networks_read(tmp_path, folder):
    arrays, cut = cache.find(folder).example(2, (0, 1))
    assert set(arrays) == {"moments", "input_ids"} and cut is True
    assert cache.find(folder).example(3, (0, 1)).cut is False
    (tmp_path / "sdxl").mkdir()
    _write(tmp_path / "sdxl", sdxl=True)
    arrays, _ = cache.find(tmp_path / "sdxl").example(9, (0,))
    assert set(arrays) == {"moments", "input_ids", "input_ids_2", "time_ids"}
    _equal([arrays["time_ids"], arrays["input_ids_2"]], [_record(9).time_ids, _record(9, True)[2]])


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        _write(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_many_shards_are_opened_one_by_one(folder, monkeypatch):
    opened = []
    original = cache.reader
    monkeypatch.setattr(cache, "reader", lambda path: opened.append(path.name) or original(path))
    found = cache.find(folder)
    assert len(found) == 10 and not opened
    found.record(9), found.record(9)
    assert opened == [PLAN.shard_name(2)]


def test_no_more_files_are_open_than_the_system_lets(folder, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_OPEN", 1)
    found = cache.find(folder)
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 4, 8, 0, 4, 8):
        found.record(index)
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_threads_and_copies_read_the_same(folder):
    found = cache.find(folder)
    found.record(0)  # so that something is open
    copy = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 5000
    order = np.random.default_rng(0).integers(0, 10, 400)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        records = list(pool.map(copy.record, map(int, order)))
    for index, record in zip(order, records, strict=True):
        _equal(record, _record(int(index)))


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_costs_its_record_alone(folder, seed):
    path = folder / PLAN.shard_name(1)
    content = bytearray(path.read_bytes())
    start = content.find(_record(6).moments.tobytes())
    assert start > 0
    position = start + int(np.random.default_rng(seed).integers(0, 2 * np.prod(SHAPE)))
    content[position] ^= 1 << seed
    path.write_bytes(content)
    found = cache.find(folder)
    with pytest.raises(BadSample, match="damaged record") as caught:
        found.example(6, (0,))
    assert (caught.value.shard, caught.value.key) == (path.name, "2")
    _equal(found.record(5), _record(5))
    damage = {shard.name: problem for shard, problem in verify.damage(folder)}
    assert damage == {
        PLAN.shard_name(0): None, path.name: "its bytes have changed", PLAN.shard_name(2): None
    }  # fmt: skip


def test_a_shard_of_other_content_is_damaged(folder):
    """Of the right length, but no ArrayRecord; and an ArrayRecord of something else."""
    path = folder / PLAN.shard_name(0)
    path.write_bytes(bytes(path.stat().st_size))
    found = cache.find(folder)
    with pytest.raises(BadSample, match="damaged record"):
        found.record(0)
    for content in (b"", b"\xc1", b"\x01", b"\x80", b"\xff" * 40):
        with pytest.raises((ValueError, LookupError, TypeError, cache.msgpack.UnpackException)):
            cache.decode(content, SHAPE, np.dtype("bfloat16"))
    record = cache.encode(_record(0))
    with pytest.raises(ValueError):
        cache.decode(record, (8, 4, 8), np.dtype("bfloat16"))


def test_verify_looks_into_the_records(tmp_path):
    """Also where the bytes are those that were written."""
    path = tmp_path / PLAN.shard_name(0)
    bad = _record(1)
    bad.moments[0, 0, 0] = np.nan
    with cache.writer(path) as add:
        add(_record(0)), add(bad)
    size, digest = path.stat().st_size, verify.sha256(path)
    for count, problem in ((2, "record 1 is not finite"), (3, "2 records instead of 3")):
        shards = (manifest.Shard(path.name, count, size, digest),)
        whole = manifest.Manifest(PLAN, shards, 2, {}, {})
        manifest.publish(tmp_path / manifest.MANIFEST, manifest.dump(whole))
        assert [found for _, found in verify.damage(tmp_path)] == [problem]


def _cut_short(folder):
    path = folder / PLAN.shard_name(2)
    path.write_bytes(path.read_bytes()[:-1])


def _other_format(folder):
    tree = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / manifest.MANIFEST).write_text(json.dumps(tree | {"format": 99}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / manifest.MANIFEST).unlink(), "not finished.*again"),
        (lambda f: (f / manifest.MANIFEST).write_text('{"format'), "cannot read .*manifest.json"),
        (lambda f: (f / manifest.MANIFEST).write_text("[]"), "cannot read .*manifest.json"),
        (lambda f: (f / manifest.MANIFEST).write_text('{"format": 1}'), "cannot read"),
        (_other_format, "of format 99 and this code reads 1"),
        (lambda f: (f / PLAN.shard_name(1)).unlink(), "cannot open .*shard-00001.*again"),
        (_cut_short, "shard-00002.* bytes instead of .*delete it"),
        (lambda f: [path.unlink() for path in f.iterdir()], "is no cache"),
    ],
)
def test_a_cache_that_is_not_whole_is_refused(folder, harm, message):
    assert cache.is_cache(folder)
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        cache.find(folder)
    assert "\n" not in str(caught.value)


def test_an_empty_cache_is_refused(tmp_path):
    assert not cache.is_cache(tmp_path) and not cache.is_cache(tmp_path / "nowhere")
    _write(tmp_path, (0, 0, 0))
    with pytest.raises(UserError, match="is empty"):
        cache.find(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"size": 64}, "images of 32 pixels .*this run has 64.*another cache"),
        ({"vae": "other"}, "another VAE"),
        ({"tokenizers": ("bb", "cc")}, "another tokenizer"),
    ],
)
def test_training_refuses_a_cache_of_another_model(folder, wanted, message):
    right = {"size": 32, "vae": "aa", "tokenizers": ("bb",)}
    cache.check(cache.find(folder), **right)
    with pytest.raises(UserError, match=message):
        cache.check(cache.find(folder), **right | wanted)


def test_a_disk_that_is_full_is_told_of():
    with (
        pytest.raises(UserError, match="cannot write /dev/full"),
        cache.writer(cache.Path("/dev/full")) as add,
    ):
        for index in range(100):
            add(_record(index))


def test_shards_cover_all_samples_once():
    assert [list(PLAN.samples(n)) for n in range(PLAN.num_shards)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]
    ]  # fmt: skip
    changed = PLAN._replace(size=64, seed=1)
    assert list(manifest.differences(PLAN, changed)) == [("size", 32, 64), ("seed", 0, 1)]
