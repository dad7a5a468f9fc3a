"""Devices that are not here: what XLA is asked for, and how mistakes are answered."""

import re
import types

import pytest
from jax.experimental import topologies as jaxs

from slam_jax.errors import UserError
from slam_jax.runtime import aot, chips, topologies

HERE = topologies._version("jaxlib")
INSTALLED = {"jaxlib": HERE, "jax-cuda12-plugin": HERE, "nvidia-cudnn-cu12": "9", "libtpu": "1"}


@pytest.fixture
def installed(monkeypatch):
    """What is, as far as the module can tell."""
    known = dict(INSTALLED)
    monkeypatch.setattr(topologies, "_version", lambda package: known.get(package, ""))
    return known


@pytest.fixture
def asked(monkeypatch):
    """Of XLA, in place of it."""
    calls = []

    def describe(*arguments, **named):
        calls.append((*arguments, named))
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(jaxs, "get_topology_desc", describe)
    return calls


@pytest.mark.parametrize(("name", "grid"), [
    ("h200", "1x1x1"), ("h200:", "1x1x1"), ("h200:8", "1x1x8"), ("h200:4x8", "1x4x8"),
])  # fmt: skip
def test_gpus_are_asked_for_by_hosts_and_gpus_of_each(name, grid, installed, asked):
    topologies.devices(name)
    ((told,),) = asked
    assert (told["platform"], told["topology"]) == ("cuda", grid)


@pytest.mark.parametrize("name", topologies._GPUS)
def test_every_gpu_is_told_by_a_kind_that_the_table_of_chips_knows(name, installed, asked):
    topologies.devices(name)
    target = asked[0][0]["target_config"]
    (kind,) = re.findall(r'device_description_str: "(.*)"', target)
    chip = chips.find([types.SimpleNamespace(device_kind=kind, platform="gpu")])
    told = dict(re.findall(r"(\w+): ([\d.]+)", target))
    assert float(told["memory_bandwidth"]) == chip.memory_bandwidth
    # GiB of a card are called GB; none has less than that name says.
    assert chip.memory <= int(told["device_memory_size"]) < 1.08 * chip.memory
    assert target.count("{") == target.count("}") == 4
    # CUDA's guide: a block may have all of a multiprocessor's shared memory but 1 KiB.
    assert int(told["shared_memory_per_core"]) - int(told["shared_memory_per_block_optin"]) == 1024


@pytest.mark.parametrize("name", ["h200:0", "h200:x8", "h200:8x", "l4:2x2x2"])
def test_no_such_number_of_gpus(name, installed, asked):
    with pytest.raises(UserError, match="the number of GPUs, as in h200:8"):
        topologies.devices(name)


@pytest.mark.parametrize(("lacking", "attention", "remedy"), [
    ("jax-cuda12-plugin", "xla", r"pip install 'slam_jax\[gpu-topology\]'"),
    ("nvidia-cudnn-cu12", "cudnn", r"nvidia-cudnn-cu12: pip install 'slam_jax\[gpu-topology\]'"),
])  # fmt: skip
def test_what_is_missing_is_named_with_the_remedy(lacking, attention, remedy, installed, asked):
    topologies.devices("rtx4090", attention)
    del installed[lacking]
    with pytest.raises(UserError, match=remedy):
        topologies.devices("rtx4090", attention)


def test_a_plugin_of_another_version_is_named_with_the_right_one(installed, asked):
    installed["jax-cuda12-plugin"] = "0.4.1"
    wanted = f"jax-cuda12-plugin=={HERE} jax-cuda12-pjrt=={HERE}"
    with pytest.raises(UserError, match=re.escape(wanted)):
        topologies.devices("h200")


def test_without_libtpu_one_line_says_what_to_install(installed):
    del installed["libtpu"]
    with pytest.raises(UserError, match=r"pip install 'slam_jax\[tpu-topology\]'"):
        topologies.devices("v5e:2x2")


def test_a_slice_that_does_not_exist_is_one_line(monkeypatch, installed):
    def refuse(*_, **__):
        raise ValueError("invalid\ntopology")

    monkeypatch.setattr(jaxs, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=r"'v5e:3' is no TPU slice \(invalid topology\).*rtx4090"):
        topologies.devices("v5e:3")


def test_gpus_are_planned_without_kernels_that_only_a_gpu_can_choose():
    assert topologies.options("gpu") == {"xla_gpu_enable_triton_gemm": False}
    assert topologies.options("tpu") == topologies.options("cpu") == {}


PROGRAM = """
import jax
import jax.numpy as jnp
from slam_jax.runtime import topologies

def total(x, kernel, matrix):
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sum(jnp.sin(y @ matrix))

def gradient():
    place = jax.sharding.SingleDeviceSharding(topologies.devices("h200")[0])
    shapes = ((2, 16, 16, 64), (3, 3, 64, 128), (128, 256))
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*given)
"""


def test_a_gpus_plan_counts_the_products_of_its_libraries(tmp_path, monkeypatch):
    """Where JAX's plugin is installed. `make test` has it not: it talks at every import."""
    if not any(map(topologies._version, topologies._CUDA)):
        with pytest.raises(UserError, match="needs JAX's plugin for GPUs"):
            topologies.devices("h200")
        return
    (tmp_path / "program_of_test_topologies.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    import program_of_test_topologies

    found = aot._plan(program_of_test_topologies.gradient, topologies.devices("h200"))
    product = 2 * 2 * 16 * 16 * 128 * 256
    # Taps that meet the picture: 16 rows less the one that is missing above and below.
    convolution = 2 * 2 * 64 * 128 * (3 * 16 - 2) ** 2
    assert found.flops == 3 * product + 3 * convolution
    assert found.arguments == 2 * (2 * 16 * 16 * 64 + 3 * 3 * 64 * 128 + 128 * 256)
