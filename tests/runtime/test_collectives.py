"""Bytes counted in XLA's text: of hand-made programs, and of each way of writing that it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slam_jax.runtime import collectives, hlo


def _count(function, shape, spec, out):
    devices = Mesh(np.array(jax.devices()[:4]), ("d",))
    given = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(devices, spec))
    jitted = jax.jit(function, out_shardings=NamedSharding(devices, out))
    return collectives.count(hlo.parse(jitted.lower(given).compile().as_text()), 4)


CUT, WHOLE = PartitionSpec("d"), PartitionSpec()


def test_gathering_and_summing_move_what_they_must():
    gathered = _count(lambda x: x, (64, 100), CUT, WHOLE)
    assert gathered == [("all-gather", 4, 1, 64 * 100 * 4)]
    # Three quarters come from elsewhere.
    assert gathered[0].sent == 0.75 * 64 * 100 * 4
    summed = _count(lambda x: jnp.sum(x, axis=0), (64, 100), CUT, WHOLE)
    assert summed == [("all-reduce", 4, 1, 100 * 4)]
    assert summed[0].sent == 1.5 * 100 * 4
    assert _count(lambda x: 2 * x, (64, 100), CUT, CUT) == []


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x):
        def add(_, y):
            return y + jnp.sum(jnp.sin(x + jnp.sum(y)), axis=0)

        return jax.lax.fori_loop(0, 7, add, jnp.zeros(100))

    assert _count(loop, (64, 100), CUT, WHOLE) == [("all-reduce", 4, 7, 7 * 100 * 4)]


PROGRAM = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  LINE
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], /*index=1*/f32[8]{0:T(128)}) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("line", "found"), [
    ("%r = f32[8]{0:T(128)} all-reduce(%x), channel_id=1, to_apply=%add, "
     "replica_groups=mesh['a'=2,'b'=8] {'b'}", ("all-reduce", 8, 5, 5 * 32)),
    ("%r = f32[8] all-reduce(%x), replica_groups=mesh['a'=16] {'a':(2)4}, to_apply=%add",
     ("all-reduce", 4, 5, 5 * 32)),
    ("%r = bf16[8] all-gather(%x), channel_id=4, replica_groups=mesh['a'=2,'b'=1,'c'=8], "
     "device_ids=([8,2]T(1,0)) {'a','b'}, dimensions={0}", ("all-gather", 2, 5, 5 * 16)),
    ("%r = bf16[8] all-gather(%x), replica_groups=[4,4]<=[16], dimensions={0}",
     ("all-gather", 4, 5, 5 * 16)),
    ("%r = (bf16[2], bf16[8]) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}",
     ("all-gather", 4, 5, 5 * 16)),
    ("%r = f32[2] reduce-scatter(%x), replica_groups={}, to_apply=%add",
     ("reduce-scatter", 16, 5, 5 * 16 * 8)),
    # Half of the devices send; then there are two words that tell when they have.
    ("%r = (s8[64], s8[64], u32[], u32[]) collective-permute-start(%x), source_target_pairs="
     "{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}",
     ("collective-permute", 2, 5, 5 * 32)),
])  # fmt: skip
def test_every_way_of_writing(line, found):
    # The second time it is a piece of the same one, among what hides it.
    twice = f"{line}\n  {line}" if "channel_id" in line else line
    assert collectives.count(hlo.parse(PROGRAM.replace("LINE", twice)), 16) == [found]


def test_a_way_of_writing_that_is_not_known_is_no_number():
    line = "%r = bf16[8] all-gather(%x), replica_groups=<new>, dimensions={0}"
    with pytest.raises(ValueError, match="not known: .*<new>"):
        collectives.count(hlo.parse(PROGRAM.replace("LINE", line)), 16)


def test_the_sum_of_which_each_keeps_a_part():
    fused = PROGRAM.replace("LINE", "%f = f32[2] fusion(%x), calls=%all-reduce-scatter.1").replace(
        "%body", "%all-reduce-scatter.1 (q: f32[8]) -> f32[2] {\n"
        "  %r = f32[8] all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add\n}\n\n%body", 1,
    )  # fmt: skip
    assert collectives.count(hlo.parse(fused), 4) == [("reduce-scatter", 4, 5, 5 * 32)]
