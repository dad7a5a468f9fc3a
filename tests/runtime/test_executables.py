"""Programs kept between processes: found again when nothing differs, and never a wrong one."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def add(now, change):
    traced.append("add")
    return {"sum": now["sum"] + change.sum()}, change.mean()


def lowered():
    devices = jax.make_mesh((4,), ("data",))
    spread, whole = (NamedSharding(devices, P(*axes)) for axes in (["data"], []))
    now = {"sum": jax.device_put(jnp.zeros(3), whole)}
    change = jax.device_put(jnp.arange(8.0), spread)
    options = {"donate_argnums": 0, "out_shardings": ({"sum": whole}, whole)}
    return executables.lower(add, "add", (), now, change, **options), now, change


def test_a_program_of_many_devices_is_traced_once_and_the_same_when_read(cache):
    first, *_ = lowered()
    (path,) = (cache / "programs").iterdir()
    again, now, change = lowered()
    assert traced == ["add"] and first.as_text() == again.as_text()
    later, mean = again.compile()(now, change)
    assert later["sum"].tolist() == [28.0] * 3 and mean == 3.5
    assert now["sum"].is_deleted() and not change.is_deleted()
    path.unlink()
    jax.clear_caches()
    assert lowered()[0].as_text() == first.as_text() and traced == ["add"] * 2


def test_without_a_folder_the_program_of_many_hosts_is_the_same(cache, monkeypatch):
    kept_one, *_ = lowered()
    monkeypatch.setenv("SLAM_JAX_CACHE", "")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert lowered()[0].as_text() == kept_one.as_text()


def test_what_jax_keeps_for_its_own_version_alone_is_kept_by_versions(cache):
    """A layout; JAX refuses it unless told that no other version will read it."""

    def turned(x):
        return with_layout_constraint(2 * x, Layout((1, 0)))

    x = jnp.arange(6.0).reshape(2, 3)
    program = executables.lower(turned, "turned", (), x)
    assert "@LayoutConstraint" in program.as_text()
    assert len(list((cache / "programs").iterdir())) == 1
    assert program.compile()(x).tolist() == [[0, 2, 4], [6, 8, 10]]


def test_what_jax_cannot_keep_is_lowered_as_it_is(cache, monkeypatch):
    def refused(*_, **__):
        raise ValueError("custom call without a guarantee")

    monkeypatch.setattr(executables.export, "export", lambda *_, **__: refused)
    program, now, change = lowered()
    assert program.compile()(now, change)[0]["sum"].tolist() == [28.0] * 3
    assert not (cache / "programs").exists()


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
