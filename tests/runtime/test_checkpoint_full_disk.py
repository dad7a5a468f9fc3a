"""Where a save fails, the old checkpoints stay whole, nothing half-written does, and the next
save is tried as if nothing had been."""

import contextlib
import resource
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.runtime import checkpoint

SIDE = 400  # of a float32 matrix of 640 kB that cannot be compressed
LIMIT = 2**18

# Of several arrays that cannot be written Orbax takes the first error; when the others come, whom
# they should be told has left.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _state(step: int):
    return {"step": jnp.int32(step), "a": jax.random.normal(jax.random.key(step), (SIDE, SIDE))}


@contextlib.contextmanager
def _mounted(folder):
    """A file system in memory with room for three checkpoints, which can really be full."""
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True,
            capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here; the limit of a file's size is tried")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def _filled(folder):
    with open(folder.parent / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(LIMIT))
    # What is left is enough for files without arrays.
    with open(folder.parent / "filler", "r+b") as filler:
        filler.truncate(filler.seek(0, 2) - LIMIT)
    yield
    (folder.parent / "filler").unlink()


@contextlib.contextmanager
def _limited(_folder):
    """No file may become larger, which like a full disk fails in the middle of writing it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["mounted", "limited"])
def full(request, tmp_path):
    """(folder of checkpoints, context in which its disk is full, what the system says then)."""
    if request.param == "limited":
        yield tmp_path / "checkpoints", _limited, "File too large"
    else:
        with _mounted(tmp_path):
            yield tmp_path / "checkpoints", _filled, "No space left on device"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _check_whole(checkpoints, step):
    assert checkpoint.newest(checkpoints.directory, pytest.fail) == step
    like = jax.eval_shape(lambda: _state(step))
    found = checkpoint.restore(checkpoints, step, like)
    jax.tree.map(np.testing.assert_array_equal, found, _state(step))


def test_training_goes_on_and_the_next_save_is_tried(full):
    folder, is_full, reason = full
    checkpoints = checkpoint.manager(folder, keep=2, keep_every=0)
    said = []
    with checkpoint.closing(checkpoints, pytest.fail):
        checkpoint.save(checkpoints, 1, _state(1), pytest.fail)
        checkpoint.save_last(checkpoints, 2, _state(2))
        with is_full(folder):
            checkpoint.save(checkpoints, 3, _state(3), pytest.fail)
            until = time.monotonic() + 20
            while not said and time.monotonic() < until:
                checkpoint.check(checkpoints, said.append)  # as after every step
                time.sleep(0.01)
            assert said == [
                f"no checkpoint of step 3 in {folder}: {reason}; the last one is of step 2; "
                "training goes on, and the next one is tried when it is due"
            ]
            _check_whole(checkpoints, 2)
            checkpoint.save(checkpoints, 4, _state(4), pytest.fail)
            # Told at the next save at the latest, which fails too.
            checkpoint.save(checkpoints, 5, _state(5), said.append)
            assert len(said) == 2 and said[1].startswith("no checkpoint of step 4 ")
            with pytest.raises(UserError) as told:
                checkpoint.save_last(checkpoints, 6, _state(6))
            assert str(told.value) == (
                f"no checkpoint of step 6 in {folder}: {reason}; the last one is of step 2; "
                "make room, and run again to go on from there"
            )
            # What a late thread of a failed save still adds goes with the next one.
            assert [name for name in _names(folder) if "tmp" not in name] == ["1", "2"]
        # With room again, old ones go as ever.
        checkpoint.save(checkpoints, 7, _state(7), pytest.fail)
        checkpoint.save_last(checkpoints, 8, _state(8))
        assert _names(folder) == ["7", "8"]
        _check_whole(checkpoints, 8)


def test_a_folder_that_is_gone_is_told_too(tmp_path):
    """Not what Orbax writes fails, but the folder to write it in."""
    checkpoints = checkpoint.manager(tmp_path / "checkpoints", keep=2, keep_every=0)
    said = []
    with checkpoint.closing(checkpoints, said.append):
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").touch()
        checkpoint.save(checkpoints, 1, _state(1), said.append)
    assert "no checkpoint of step 1" in said[0] and "there is none yet" in said[0]
