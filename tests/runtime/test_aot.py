"""Plans: what XLA settles before it makes machine code, read from its files."""

import subprocess
import sys
import time

import jax
import psutil
import pytest

from slam_jax.runtime import aot
from slam_jax.runtime.collectives import Collective

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

def lower():
    devices = Mesh(np.array(jax.devices()[:4]), ("d",))
    cut, whole = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (("d",), ()))
    given = jax.ShapeDtypeStruct((64, 1000), jnp.float32, sharding=cut)
    state = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=whole)
    step = lambda state, x: (state + jnp.sum(jnp.sort(jnp.tanh(x), axis=1), axis=0), jnp.ones(9))
    return jax.jit(step, donate_argnums=0, out_shardings=whole).lower(state, given)

def refuse():
    raise jax.errors.JaxRuntimeError("Ran out of memory. Used 23.50G of 15.75G hbm. Exceeded")

def fail():
    raise jax.errors.JaxRuntimeError("some other trouble")
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A module that a new process can import, too."""
    (tmp_path / "program_of_test_aot.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import program_of_test_aot

    yield program_of_test_aot
    del sys.modules["program_of_test_aot"]


def test_a_plan_says_what_the_compiled_program_says(program):
    lowered, said = program.lower(), []
    places = jax.devices()[:4]
    compiled = aot._compile(lowered, 4)
    planned = aot.planned(lowered, program.lower, places, lambda: said.append("planning"))
    assert planned.arguments == compiled.arguments == 4 * (1000 + 16 * 1000)
    assert planned.collectives == compiled.collectives
    assert Collective("all-reduce", 4, 1, 4000) in planned.collectives
    assert planned.traffic == compiled.traffic > 0
    assert planned.work == compiled.work and planned.operations == compiled.operations > 1
    assert planned.temporaries == pytest.approx(compiled.temporaries, rel=0.01)
    assert planned.results == pytest.approx(compiled.results, abs=64)
    again = aot.planned(lowered, program.fail, places, lambda: said.append("planning"))
    assert again == planned and said == ["planning"]


def test_a_compiler_that_gives_up_is_no_crash_and_another_failure_is(program):
    assert aot._plan(program.refuse, jax.devices()[:4]).too_large == 23.5 * 2**30
    with pytest.raises(RuntimeError, match="some other trouble"):
        aot._plan(program.fail, jax.devices()[:4])


BUFFERS = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {3}, maybe-live-out:
 value: <1 p @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 512, parameter 1, shape |f32[8]| at ShapeIndex {}:
allocation 2: size 2048, output shape is |(f32[4], f32[4])|, maybe-live-out:
allocation 3: size 128, thread-local:
allocation 4: size 64, constant:
allocation 5: size 9000, preallocated-temp:
allocation 6: size 7777, color 1, preallocated-temp:
"""


def test_memory_is_that_of_the_buffers_in_main_memory():
    found = aot._read_plan("ENTRY %main () -> f32[] {\n}\n", BUFFERS, 1.0, 4)
    assert found[3:8] == (4096 + 512, 2048, 9000 + 64, 0, 0)


def test_a_killed_parent_leaves_no_planner(tmp_path):
    """One of SDXL takes 11 GB, for as long as the whole compilation would take."""
    planning = tmp_path / "planning"
    lowers = f"import time; open({str(planning)!r}, 'w').close(); time.sleep(600)"
    program = f"""
import functools, jax
from slam_jax.runtime import aot
if __name__ == "__main__":
    aot._plan(functools.partial(exec, {lowers!r}), jax.devices())
"""
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    until = time.monotonic() + 60
    while not planning.exists():
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.1)
    started = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    for each in alive:
        each.kill()
    assert started and not alive
