"""Programs kept between processes: found again when nothing differs, and never a wrong one."""

import jax
import jax.numpy as jnp
import pytest

from slam_jax import kept
from slam_jax.runtime import executables

traced = []


def scaled(factor):
    def multiply(x):
        traced.append(factor)
        return factor * x

    return multiply


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAM_JAX_CACHE", str(tmp_path))
    traced.clear()
    return tmp_path


def run(factor, size=3):
    x = jnp.ones(size)
    return executables.load(scaled, (factor,), x)(x).tolist()


def test_it_is_traced_once(cache):
    settings = jax.config.values["jax_compilation_cache_dir"]
    assert run(2.0) == run(2.0) == [2.0] * 3
    assert traced == [2.0]
    # Given values, shapes and settings tell programs apart.
    assert run(3.0) == [3.0] * 3 and run(2.0, 2) == [2.0] * 2
    with jax.default_matmul_precision("default"):
        run(2.0)
    assert traced == [2.0, 3.0, 2.0, 2.0]
    assert jax.config.values["jax_compilation_cache_dir"] == settings


def test_other_code_or_another_machine_has_its_own(cache, monkeypatch):
    run(2.0)
    monkeypatch.setattr(kept, "_code", lambda: "edited")
    run(2.0)
    monkeypatch.setattr(kept, "machine", lambda: "other")
    assert run(2.0) == [2.0] * 3
    assert len(traced) == 3


@pytest.mark.parametrize("kind", ["programs", "executables"])
@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "unreadable"])
def test_what_is_damaged_is_made_anew(cache, kind, damage):
    run(2.0)
    (path,) = (cache / kind).iterdir()
    whole = path.read_bytes()
    path.unlink()
    if damage == "unreadable":
        path.mkdir()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"flipped": flipped, "short": whole[:-1], "empty": b""}[damage])
    assert run(2.0) == [2.0] * 3
    assert len(traced) == (2 if kind == "programs" else 1)
    if damage != "unreadable":
        assert kept.read(kind, path.name) is not None


def test_nothing_is_kept_where_that_is_not_wanted_or_cannot_be(cache, monkeypatch):
    monkeypatch.setenv("SLAM_JAX_CACHE", str(cache / "file" / "folder"))
    (cache / "file").write_text("in the way")
    assert run(2.0) == [2.0] * 3
    monkeypatch.setenv("SLAM_JAX_CACHE", "")
    assert run(2.0) == [2.0] * 3 and len(traced) == 2


def test_what_was_not_used_for_longest_makes_room(cache, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 3 * 132)
    for key in "abc":
        kept.write("things", key, b"0" * 100)
    assert kept.read("things", "a") == b"0" * 100
    kept.write("others", "d", b"0" * 100)
    left = [key for key in "abc" if kept.read("things", key)]
    assert left == ["a", "c"] and kept.read("others", "d")
