"""Every config of a real teacher, built at its real size: shapes only, nothing is computed."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from slam_jax import arguments, program, settings
from slam_jax.runtime import mesh
from slam_jax.weights import architectures

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "tiny")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_train_step_can_be_built(name):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().to_dict()
    chosen = settings.from_config(config)._replace(batch_size=4, accumulate=1)
    assert architectures.known(chosen.teacher.model)
    teacher, _ = arguments.teacher(chosen)
    devices = mesh.make(chosen.mesh.axes)
    parts = program.parts(chosen, teacher)
    built = program.build(chosen, parts, devices)
    inputs = arguments.frozen(chosen, teacher, devices), arguments.batch(chosen, teacher, devices)
    after, metrics = jax.eval_shape(built.step, built.like, *inputs, arguments.key(devices))
    assert jax.tree.structure(after) == jax.tree.structure(built.like)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, built.like)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    trained = sum(leaf.size for leaf in jax.tree.leaves(after.student))
    in_base = sum(leaf.size for leaf in jax.tree.leaves(teacher.unet.params))
    if chosen.student.lora.rank:
        assert 2e7 < trained < 3e8
    else:
        assert trained == in_base + 256 * 320
