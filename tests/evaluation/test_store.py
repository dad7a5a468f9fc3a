"""Files of measured images: shared out among hosts, whole or not there."""

import contextlib

import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.evaluation import store

COUNT = 2 * store.SIZE + 5


def _measure(shard):
    numbers = np.arange(shard.start, shard.stop)
    return {"features": np.stack([numbers, numbers**2], axis=1), "first": numbers == 0}


def test_hosts_measure_every_image_once(tmp_path):
    for host in range(2):
        missing = store.missing(tmp_path, COUNT, (host, 2))
        assert missing == store.shards(COUNT, (host, 2))
        store.fill(tmp_path, missing, _measure)
        assert store.missing(tmp_path, COUNT, (host, 2)) == []
    assert store.missing(tmp_path, COUNT, (0, 1)) == []
    found = store.read(tmp_path, COUNT)
    np.testing.assert_array_equal(found["features"][:, 0], np.arange(COUNT))
    np.testing.assert_array_equal(found["features"][:, 1], np.arange(COUNT) ** 2)
    assert found["first"].sum() == 1


def test_what_a_killed_run_measured_is_kept(tmp_path):
    def killed(shard):
        if shard.start:
            raise KeyboardInterrupt
        return _measure(shard)

    with pytest.raises(KeyboardInterrupt):
        store.fill(tmp_path, store.missing(tmp_path, COUNT, (0, 1)), killed)
    again = []
    missing = store.missing(tmp_path, COUNT, (0, 1))
    store.fill(tmp_path, missing, lambda shard: again.append(shard) or _measure(shard))
    assert [shard.start for shard in again] == [store.SIZE, 2 * store.SIZE]
    assert len(store.read(tmp_path, COUNT)["features"]) == COUNT


def test_damaged_and_missing_files_are_named(tmp_path):
    store.fill(tmp_path, store.missing(tmp_path, COUNT, (0, 1)), _measure)
    paths = sorted(tmp_path.iterdir())
    content = paths[1].read_bytes()
    for spoilt in (content[:-100], content[:50], paths[2].read_bytes(), b""):
        paths[1].write_bytes(spoilt)
        with pytest.raises(UserError, match=f"{paths[1].name}.*delete it and run again"):
            store.read(tmp_path, COUNT)
    paths[1].unlink()
    with pytest.raises(UserError, match="cannot read .*delete it and run again"):
        store.read(tmp_path, COUNT)


def test_a_damaged_archive_is_no_missing_file(tmp_path):
    """In each byte, one by one: a member may seem to lie before the archive's beginning."""
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    content = (tmp_path / "a.npz").read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "a.npz").write_bytes(changed)
        with contextlib.suppress(ValueError):
            store.load(tmp_path / "a.npz")
    with pytest.raises(OSError):
        store.load(tmp_path / "b.npz")
