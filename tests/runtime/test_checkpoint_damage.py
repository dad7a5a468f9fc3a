"""Damaged checkpoints are found, set aside, and the one before is used."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint

LIKE = {
    "step": jax.ShapeDtypeStruct((), jnp.int32),
    "student": {"a": jax.ShapeDtypeStruct((80, 90), jnp.float32)},
}


def _state(step: int):
    """Its numbers are random, so they cannot be compressed and no decoder trips over wrong ones."""
    return {
        "step": jnp.int32(step),
        "student": {"a": jax.random.normal(jax.random.key(step), (80, 90))},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoint.manager(folder, keep=9, keep_every=0)
    with checkpoint.closing(checkpoints, pytest.fail):
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, step, _state(step), pytest.fail)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def _largest(step: pathlib.Path) -> pathlib.Path:
    files = [path for path in step.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _flip_array(step):
    _flip(_largest(step))


def _truncate_array(step):
    path = _largest(step)
    path.write_bytes(path.read_bytes()[:-1])


def _remove_array(step):
    _largest(step).unlink()


def _empty_checksums(step):
    (step / "checksums.json").write_text("")


def _wrong_checksums(step):
    (step / "checksums.json").write_text('{"default/_METADATA": 3}')


def _remove_metadata_of_old(step):
    (step / "checksums.json").unlink()
    (step / "default" / "_METADATA").unlink()


def _remove_item(step):
    shutil.rmtree(step / "default")


DAMAGES = {
    _flip_array: "has other bytes", _truncate_array: r"has \d+ bytes, not \d+",
    _remove_array: "is missing", _empty_checksums: "checksums.json is not what was written",
    _wrong_checksums: "checksums.json is not what was written",
    _remove_metadata_of_old: "default/_METADATA is missing",
    _remove_item: "default/_METADATA is missing",
}  # fmt: skip


def _restored(folder, step):
    checkpoints = checkpoint.manager(folder, keep=9, keep_every=0)
    with checkpoint.closing(checkpoints, pytest.fail):
        return jax.device_get(checkpoint.restore(checkpoints, step, LIKE))


def test_orbax_alone_restores_flipped_bits_without_a_word(folder):
    """Why there are checksums; if this fails, they may no longer be needed."""
    _flip_array(folder / "3")
    found, written = _restored(folder, 3)["student"]["a"], np.asarray(_state(3)["student"]["a"])
    assert (found != written).sum() == 1


def test_whole_checkpoints_are_used_as_they_are(folder):
    before = sorted(folder.rglob("*"))
    assert checkpoint.newest(folder, pytest.fail) == 3
    (folder / "3" / "checksums.json").unlink()  # as from before there were any
    assert checkpoint.newest(str(folder), pytest.fail) == 3
    assert len(sorted(folder.rglob("*"))) == len(before) - 1


def test_every_byte_below_the_item_counts(folder):
    """Whatever file of a checkpoint is hit, what is used is another, whole one."""
    for path in sorted(path for path in (folder / "3" / "default").rglob("*") if path.is_file()):
        content = path.read_bytes()
        _flip(path)
        said = []
        assert checkpoint.newest(folder, said.append) == 2 and len(said) == 1, path
        assert str(path.relative_to(folder / "3")) in said[0] and not (folder / "3").exists()
        (folder / "3.damaged").rename(folder / "3")
        path.write_bytes(content)
    assert checkpoint.newest(folder, pytest.fail) == 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_used(folder, damage):
    damage(folder / "3")
    files = {path.relative_to(folder / "3") for path in (folder / "3").rglob("*")}
    said = []
    assert checkpoint.newest(folder, said.append) == 2
    (line,) = said
    assert line.startswith(f"the checkpoint of step 3 in {folder} is damaged (")
    assert re.search(DAMAGES[damage], line) and "3.damaged" in line
    # Nothing of it is lost, and nobody takes it for a checkpoint any more.
    aside = folder / "3.damaged"
    assert {path.relative_to(aside) for path in aside.rglob("*")} == files
    assert checkpoint.latest(folder) == 2
    np.testing.assert_array_equal(_restored(folder, 2)["student"]["a"], _state(2)["student"]["a"])
    assert checkpoint.newest(folder, pytest.fail) == 2 and aside.exists()


def test_a_step_set_aside_can_be_saved_and_damaged_again(folder):
    _flip_array(folder / "3")
    checkpoint.newest(folder, [].append)
    checkpoints = checkpoint.manager(folder, keep=9, keep_every=0)
    with checkpoint.closing(checkpoints, pytest.fail):
        checkpoint.save_last(checkpoints, 3, _state(3))
        assert checkpoint.back(checkpoints, pytest.fail) == 3
        # While the folder is in use, as at a rollback.
        _flip_array(folder / "3")
        said = []
        assert checkpoint.back(checkpoints, said.append) == 2 and "3.damaged1" in said[0]
        checkpoint.save_last(checkpoints, 3, _state(3))
    assert sorted(path.name for path in folder.iterdir()) == [
        "1", "2", "3", "3.damaged", "3.damaged1",
    ]  # fmt: skip


def test_with_none_left_it_says_so_and_does_not_begin_anew(folder):
    for step in (1, 2, 3):
        _flip_array(folder / str(step))
    said = []
    for _ in range(2):  # the second time nothing but what was set aside is there
        with pytest.raises(UserError) as told:
            checkpoint.newest(folder, said.append)
        assert str(folder) in str(told.value) and "nothing was deleted" in str(told.value)
        assert "1.damaged, 2.damaged, 3.damaged" in str(told.value)
    assert [line.split()[4] for line in said] == ["3", "2", "1"]


def test_no_folder_and_an_empty_one_are_a_new_run(tmp_path):
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    assert checkpoint.newest(tmp_path / "none", pytest.fail) is None


def test_a_part_of_a_damaged_checkpoint_is_not_restored(folder):
    like = {"a": np.zeros((80, 90), np.float32)}
    found = checkpoint.restore_part(folder, 3, "student", like)
    np.testing.assert_array_equal(found["a"], _state(3)["student"]["a"])
    _flip_array(folder / "3")
    with pytest.raises(UserError, match="has other bytes than were written.*copy it again"):
        checkpoint.restore_part(folder, 3, "student", like)
    assert (folder / "3").exists()
