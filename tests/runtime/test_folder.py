"""Run folder: what may change between two starts of a run, and files that are whole."""

import json
import re

import pytest

from slam_jax.errors import UserError
from slam_jax.runtime import folder

SETTINGS = {"seed": 1, "distill": {"w": 8.0, "length": 20}, "eval": {"every_steps": 5}}


def test_start_writes_config_and_revision(tmp_path):
    folder.start(tmp_path, SETTINGS)
    folder.start(tmp_path, SETTINGS)
    assert json.loads((tmp_path / "config.json").read_text()) == SETTINGS
    lines = (tmp_path / "revision.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(re.search(r" ([0-9a-f]{40}(\+changes)?|unknown)$", line) for line in lines)


def test_same_settings_and_free_ones_pass(tmp_path):
    folder.start(tmp_path, SETTINGS)
    folder.check_same(tmp_path, SETTINGS, ())
    folder.check_same(tmp_path, SETTINGS | {"eval": {"every_steps": 7}}, ("eval",))


@pytest.mark.parametrize(
    "changed, message",
    [
        (SETTINGS | {"distill": {"w": 7.0, "length": 20}}, r"distill\.w=8\.0 .* distill\.w=7\.0"),
        (SETTINGS | {"evaluate": 1}, "evaluate=absent .* evaluate=1"),
        ({"seed": 1, "eval": {"every_steps": 5}}, r"distill\.length=20 .*=absent"),
    ],
)
def test_changed_setting_is_named_with_both_values(tmp_path, changed, message):
    folder.start(tmp_path, SETTINGS)
    with pytest.raises(UserError, match=message):
        folder.check_same(tmp_path, changed, ("eval",))


def test_tuples_equal_the_lists_that_json_makes_of_them(tmp_path):
    folder.start(tmp_path, {"rules": ((".*", ()),)})
    folder.check_same(tmp_path, {"rules": ((".*", ()),)}, ())


def test_missing_config_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no readable config\.json"):
        folder.check_same(tmp_path, SETTINGS, ())


def test_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run.*Not a directory.*--workdir"):
        folder.check_writable(tmp_path / "file" / "run")


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path):
    for content in (b"one", b"two"):
        folder.write_atomic(tmp_path / "a" / "b.png", content)
    assert (tmp_path / "a" / "b.png").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]
