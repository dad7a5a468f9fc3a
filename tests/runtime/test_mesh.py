"""Mesh and sharding rules, on four fake devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slam_jax.errors import UserError
from slam_jax.runtime import mesh

AXES = (("data", -1),)


def test_all_devices_form_the_mesh():
    assert mesh.make(AXES).shape == {"data": 4}
    assert mesh.make((("data", -1), ("model", 2))).shape == {"data": 2, "model": 2}


def test_axes_must_use_every_device():
    with pytest.raises(UserError, match="3 devices and 4 are present"):
        mesh.make((("data", 3),))


def test_first_matching_rule_wins():
    tree = {"a": {"kernel": np.zeros((4, 8))}, "b": [np.zeros(3)]}
    rules = ((".*/kernel", (None, "data")), (".*", ()))
    found = mesh.shardings(tree, mesh.make(AXES), rules)
    assert found["a"]["kernel"].spec == P(None, "data")
    assert found["b"][0].spec == P()


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((3, 3, 64, 128), P(None, None, None, "fsdp")),  # the longest
        ((128, 3, 3, 64), P("fsdp")),
        ((64, 64), P(None, "fsdp")),  # the last of equal ones
        ((129, 64), P(None, "fsdp")),  # the longest that 2 divides
        ((129, 65), P()),
        ((32, 64), P()),  # small
        ((), P()),
    ],
)
def test_fsdp_cuts_the_longest_dimension_that_can_be_cut(shape, spec):
    devices = mesh.make((("data", -1), ("fsdp", 2)))
    found = mesh.shardings({"a": np.zeros(shape)}, devices, ((".*", "fsdp"),))
    assert found["a"].spec == spec


def test_examples_are_split_over_data_and_fsdp_alike():
    devices = mesh.make((("data", -1), ("fsdp", 2)))
    assert mesh.num_batch_shards(devices) == 4
    images = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    put = mesh.put_batch({"image": images}, 1, devices)["image"]
    assert {shard.data.shape for shard in put.addressable_shards} == {(1, 2, 3)}
    assert len({str(shard.index) for shard in put.addressable_shards}) == 4


def test_path_without_a_rule_is_named():
    with pytest.raises(UserError, match="'b/0'"):
        mesh.shardings({"b": [np.zeros(3)]}, mesh.make(AXES), (("a/.*", ()),))


def test_an_array_goes_to_its_devices_in_parts():
    rules = (("unet/.*/kernel", (None, "data")), (".*", ()))
    place = mesh.placer(mesh.make(AXES), rules)
    array = np.arange(3 * 8, dtype=np.float32).reshape(3, 8)
    for path, width in ((("unet", "down.0", "kernel"), 2), (("vae", "kernel"), 8)):
        placed = place(path, array)
        np.testing.assert_array_equal(placed, array)
        shards = placed.addressable_shards
        assert [shard.data.shape for shard in shards] == [(3, width)] * 4
        assert len({shard.device for shard in shards}) == 4


@pytest.mark.parametrize(
    "axes, rules, word",
    [
        ((("model", -1),), (), "named data"),
        ((("data", -1), ("model", -1)), (), "at most one"),
        (AXES, ((".*", ("model",)),), "'model'"),
        (AXES, ((".*", "fsdp"),), "'fsdp'"),
        (AXES, (("*", ()),), "not a regex"),
    ],
)
def test_bad_rules_are_refused(axes, rules, word):
    with pytest.raises(UserError, match=word):
        mesh.check_rules(axes, rules)


@pytest.mark.parametrize(
    "batch_size, accumulate, use",
    [(30, 1, "use 28 or 32"), (12, 2, "use 8 or 16"), (2, 1, "use 4")],
)
def test_indivisible_batch_is_refused_with_the_remedy(batch_size, accumulate, use):
    with pytest.raises(UserError, match=f"batch_size {batch_size} .* 4 devices .*{use}$"):
        mesh.check_batch(batch_size, 4, accumulate)


def test_divisible_batch_passes():
    mesh.check_batch(16, 4, 2)


def test_every_microbatch_is_spread_over_all_devices():
    images = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    put = mesh.put_batch({"image": images}, 2, mesh.make(AXES))["image"]
    np.testing.assert_array_equal(put, [images[::2], images[1::2]])
    assert {shard.data.shape for shard in put.addressable_shards} == {(2, 1, 3)}
    assert len({shard.device for shard in put.addressable_shards}) == jax.device_count() == 4
