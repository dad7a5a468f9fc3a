"""The train step of every config of a real teacher is built: shapes only, nothing is computed.

At its real size, but where a config differs from another in its loss alone: then on the demo's
networks, since tracing takes long.
"""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from slam_jax import arguments, program, settings
from slam_jax.runtime import mesh
from slam_jax.weights import architectures

ROOT = pathlib.Path(__file__).parents[1]
OF_NETWORKS = ("sd15", "sd15_24gb", "sd21", "sdxl_lora")
OF_LOSSES = ("lcm_sd15", "sd15_matched", "sd21_base")


def built(name, **changes):
    """(the teacher, the state as it was and as it is after a step, metrics), all as shapes."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.update_from_flattened_dict({"batch_size": 4, "accumulate": 1} | changes)
    chosen = settings.from_config(config.to_dict())
    teacher, _ = arguments.teacher(chosen)
    devices = mesh.make(chosen.mesh.axes)
    made = program.build(chosen, program.parts(chosen, teacher), devices)
    inputs = arguments.frozen(chosen, teacher, devices), arguments.batch(chosen, teacher, devices)
    after, metrics = jax.eval_shape(made.step, made.like, *inputs, arguments.key(devices))
    return chosen, teacher, made.like, after, metrics


def check(before, after, metrics):
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, before)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


def test_every_config_is_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {*OF_NETWORKS, *OF_LOSSES, "tiny"}


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_a_train_step_can_be_built(name):
    chosen, teacher, *found = built(name)
    assert architectures.known(chosen.teacher.model)
    check(*found)
    trained = sum(leaf.size for leaf in jax.tree.leaves(found[1].student))
    in_base = sum(leaf.size for leaf in jax.tree.leaves(teacher.unet.params))
    if chosen.student.lora.rank:
        assert 2e7 < trained < 3e8
    else:
        assert trained == in_base + 256 * 320


@pytest.mark.parametrize("name", OF_LOSSES)
def test_a_train_step_can_be_built_on_small_networks(name):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    alike = [
        other
        for other in OF_NETWORKS
        if networks(runpy.run_path(str(ROOT / "configs" / f"{other}.py"))["get_config"]())
        == networks(config)
    ]
    assert len(alike) == 1
    small = {"teacher.model": str(ROOT / "assets/tiny_sd"), "data.size": 32}
    _, teacher, *found = built(name, **small)
    check(*found)
    trained = sum(leaf.size for leaf in jax.tree.leaves(found[1].student))
    assert trained == sum(leaf.size for leaf in jax.tree.leaves(teacher.unet.params)) + 256 * 48


def networks(config):
    """All that decides what is traced of them, but for the size of pictures."""
    model = config.teacher.model
    unet = architectures.find(model).unet.config | {"sample_size": 0}
    return unet, config.teacher.dtype, config.student.remat, config.student.lora, config.attention
