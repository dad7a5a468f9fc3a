"""Checkpoints: the same bits come back, old ones go, half-written ones are ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.runtime import checkpoint, mesh


def _state(seed: int):
    return {
        "step": jnp.int32(seed),
        "student": {"a.0": jax.random.normal(jax.random.key(seed), (3, 5))},
        # As optimizer.mu_dtype="bfloat16" has it.
        "mu": jax.random.normal(jax.random.key(seed), (3, 5), jnp.bfloat16),
    }


def _shardings(state):
    return mesh.shardings(state, mesh.make((("data", -1),)), ((".*", ()),))


def test_round_trip_is_exact_and_laid_out_as_asked(tmp_path):
    state = _state(1)
    checkpoints = checkpoint.manager(tmp_path, keep=2, keep_every=0)
    checkpoint.save(checkpoints, 1, state, pytest.fail)
    checkpoints.wait_until_finished()
    bare = jax.eval_shape(lambda: _state(1))
    like = mesh.placed(bare, mesh.make((("data", -1),)), ((".*", ()),))
    found = checkpoint.restore(checkpoints, 1, like)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert found["mu"].dtype == jnp.bfloat16
    assert found["student"]["a.0"].sharding == _shardings(state)["student"]["a.0"]
    checkpoints.close()


def test_the_last_few_are_kept(tmp_path):
    checkpoints = checkpoint.manager(tmp_path, keep=2, keep_every=0)
    for step in (1, 2, 3):
        checkpoint.save(checkpoints, step, _state(step), pytest.fail)
    checkpoints.wait_until_finished()
    assert sorted(checkpoints.all_steps()) == [2, 3]
    assert checkpoint.latest(tmp_path) == 3
    checkpoints.close()


@pytest.mark.parametrize(("keep_every", "left"), [(0, [6, 7]), (3, [3, 6, 7]), (5, [5, 6, 7])])
def test_the_last_few_and_every_mth_are_kept(tmp_path, keep_every, left):
    checkpoints = checkpoint.manager(tmp_path, keep=2, keep_every=keep_every)
    with checkpoint.closing(checkpoints, pytest.fail):
        for step in range(1, 8):
            checkpoint.save(checkpoints, step, _state(step), pytest.fail)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left


def test_a_half_written_save_is_not_seen(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.latest(tmp_path) is None
    checkpoints = checkpoint.manager(tmp_path, keep=2, keep_every=0)
    assert checkpoints.latest_step() is None
    checkpoint.save(checkpoints, 8, _state(8), pytest.fail)
    checkpoints.wait_until_finished()
    assert not list(tmp_path.glob("*tmp*"))
    checkpoints.close()


def test_no_folder_means_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
