"""Folders that appear whole or not at all."""

import pytest

from slam_jax.errors import UserError
from slam_jax.weights import whole


def _write(root, text, fails=None):
    with whole.folder(root, "letter", lambda path: (path / "letter").exists()) as new:
        (new / "letter").write_text(text)
        if fails:
            raise fails


def test_a_folder_takes_the_place_of_one_of_its_kind(tmp_path):
    root = tmp_path / "deep" / "root"
    _write(root, "a")
    (root / "old").touch()
    _write(root, "b")
    assert [path.name for path in root.iterdir()] == ["letter"]
    assert (root / "letter").read_text() == "b"
    assert list(root.parent.iterdir()) == [root]


def test_a_folder_of_another_kind_is_kept(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not a letter"):
        _write(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, failure):
    root = tmp_path / "root"
    _write(root, "a")
    with pytest.raises((UserError, KeyboardInterrupt), match="No space|^$"):
        _write(root, "b", fails=failure)
    assert (root / "letter").read_text() == "a" and list(tmp_path.iterdir()) == [root]


def test_what_a_killed_write_set_aside_is_put_back(tmp_path):
    root = tmp_path / "root"
    _write(root, "a")
    root.rename(tmp_path / ".root.replaced")
    with pytest.raises(UserError, match="No space"):
        _write(root, "b", fails=OSError(28, "No space left on device"))
    assert (root / "letter").read_text() == "a"
