"""What XLA's text says a program does, against what XLA itself says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.runtime import hlo


def _convolution(stride=1, dilation=1, spread=1, groups=1):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, 1), [(1, 0), (2, 1)], lhs_dilation=(spread, 1),
            rhs_dilation=(1, dilation), feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    return convolve, (2, 9, 7, 4), (3, 2, 4 // groups, 6)


def _matrices():
    def multiply(x, w):
        return jnp.einsum("bik,bkj->bij", x, w)

    return multiply, (2, 5, 7), (2, 7, 3)


@pytest.mark.parametrize("case", [
    _matrices(), _convolution(), _convolution(stride=2), _convolution(dilation=2),
    _convolution(spread=2), _convolution(groups=2),
])  # fmt: skip
@pytest.mark.parametrize("of", ["forward", "x", "w"])
def test_flops_are_xlas(case, of):
    function, *shapes = case
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    if of == "forward":
        lowered = jax.jit(function).lower(x, w)
    else:
        place = "xw".index(of)

        def backward(x, w, cotangent):
            return jax.vjp(function, x, w)[1](cotangent)[place]

        lowered = jax.jit(backward).lower(x, w, jax.eval_shape(function, x, w))
    found = hlo.flops(hlo.parse(lowered.as_text("hlo")))
    assert found > 0 and found == lowered.cost_analysis()["flops"]


def _taken(x):
    def add(i, total):
        return total + jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    return jax.lax.fori_loop(0, 10, add, jnp.zeros(1000))


@pytest.mark.parametrize(("function", "shape", "rel"), [
    (lambda x: jnp.tanh(x) * 2 + x, (1000,), 0),
    (lambda x: jnp.sum(jnp.sin(x)[:, None] * jnp.cos(x)[None]), (100,), 0.05),
    (lambda x: x[3:5] + 1, (10, 1000), 0.01),
    (_taken, (10, 1000), 0.35),  # of the loop's counter and carried values XLA counts more
])  # fmt: skip
def test_traffic_is_about_xlas(function, shape, rel):
    compiled = jax.jit(function).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    found = hlo.traffic(hlo.parse(compiled.as_text()))
    assert found == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=rel, abs=32)


FUSED = """HloModule f

%sliced (p: f32[10,8], q: f32[8]) -> f32[8] {
  %p = f32[10,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %s = f32[1,8]{1,0} slice(%p), slice={[0:1], [0:8]}
  %r = f32[8]{0} bitcast(%s)
  ROOT %a = f32[8]{0} add(%r, %q)
}

%fetched (t: f32[10,8]) -> f32[2,8] {
  %t = f32[10,8]{1,0} parameter(0)
  ROOT %u = f32[2,8]{1,0:S(1)} slice(%t), slice={[0:2], [0:8]}
}

%written (w: f32[10,8], o: f32[1,8], k: s32[]) -> f32[10,8] {
  %w = f32[10,8]{1,0} parameter(0)
  %o = f32[1,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %d = f32[10,8]{1,0} dynamic-update-slice(%w, %o, %k, %k)
}

ENTRY %main (x: f32[10,8], y: f32[8]) -> f32[8] {
  %x = f32[10,8]{1,0} parameter(0)
  %y = f32[8]{0:T(8)S(1)} parameter(1)
  LINE
}
"""


@pytest.mark.parametrize(("line", "num_bytes"), [
    # Read: a row. The other operand and the result lie in faster memory, or not.
    ("%f = f32[8]{0:S(1)} fusion(%x, /*index=1*/%y), kind=kLoop, calls=%sliced", 32),
    ("%f = f32[8]{0} fusion(%x, %y), kind=kLoop, calls=%sliced", 64),
    ("%c = (f32[10,8]{1,0:S(1)}, f32[10,8]{1,0}, u32[]{:S(2)}) copy-start(%x)", 320),
    ("%d = f32[10,8]{1,0:S(1)} copy-done(%x)", 0),
    ("%s = ((f32[10,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%fetched",
     64),
    ("%g = f32[8]{0} get-tuple-element(%x), index=0", 0),
    ("%n = f32[10,8]{1,0} negate(%x)", 640),
    # Written in place; a fusion that does so is taken to write the whole.
    ("%h = f32[10,8]{1,0} fusion(%x, %z, %i), kind=kLoop, calls=%written", 320 + 32 + 4),
    ("%v = f32[10,8]{1,0} dynamic-update-slice(%x, %z, %i, %i)", 64),
])  # fmt: skip
def test_only_main_memory_counts(line, num_bytes):
    others = "%z = f32[1,8]{1,0} parameter(2)\n  %i = s32[] parameter(3)\n  "
    assert hlo.traffic(hlo.parse(FUSED.replace("LINE", others + line))) == num_bytes


def test_bytes_of_arrays():
    assert hlo.sizes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[5], s4[6])") == (12, 5, 3)
    assert hlo.sizes("(bf16[2,3]{1,0:S(1)}, f32[])", main_memory=True) == (0, 4)
    assert np.prod(hlo.sizes("token[]")) == 0


CALLS = """HloModule f

ENTRY %main (x: f32[2,9,7,4]) -> f32[] {
  %x = f32[2,9,7,4]{3,2,1,0} parameter(0)
  %w = f32[6,3,2,4]{3,2,1,0} parameter(1)
  %y = f32[2,4,9,6]{3,2,1,0} parameter(2)
  %q = bf16[2,32,3,8]{3,2,1,0} parameter(3)
  %k = bf16[2,16,3,8]{3,2,1,0} parameter(4)
  %a = f32[3,5,7]{2,1,0} parameter(5)
  %b = f32[3,7,4]{2,1,0} parameter(6)
  %c = (RESULT, s8[4194304]{0}) custom-call(OPERANDS), custom_call_target="TARGET", MORE
}
"""
WINDOW = "window={size=3x2 stride=2x1 pad=1_0x2_1}, dim_labels=b01f_o01i->b01f"
DIMENSIONS = (
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":'
    '["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
)


@pytest.mark.parametrize(("target", "operands", "result", "more", "of"), [
    ("__cudnn$convForward", "%x, %w", "f32[2,4,9,6]{3,2,1,0}", WINDOW, "forward"),
    ("__cudnn$convBiasActivationForward", "%x, %w, %b", "f32[2,4,9,6]{3,2,1,0}", WINDOW, "forward"),
    ("__cudnn$convBackwardInput", "%y, %w", "f32[2,9,7,4]{3,2,1,0}", WINDOW, "x"),
    ("__cudnn$convBackwardFilter", "%x, %y", "f32[6,3,2,4]{3,2,1,0}", WINDOW, "w"),
])  # fmt: skip
def test_convolutions_of_cudnn_cost_what_xla_says_of_the_same(target, operands, result, more, of):
    function, *shapes = _convolution(stride=2)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    lowered = jax.jit(function).lower(x, w)
    if of != "forward":
        place = "xw".index(of)
        lowered = jax.jit(lambda x, w, y: jax.vjp(function, x, w)[1](y)[place]).lower(
            x, w, jax.eval_shape(function, x, w)
        )
    found = hlo.parse(_call(target, operands, result, more))
    assert hlo.flops(found) == lowered.cost_analysis()["flops"]


def _call(target, operands, result, more):
    text = CALLS.replace("TARGET", target).replace("OPERANDS", operands)
    return text.replace("RESULT", result).replace("MORE", more)


def test_scratch_memory_of_libraries_is_no_traffic_and_other_kernels_are_not_known():
    product = _call("__cublas$lt$matmul", "%a, %b", "f32[3,5,4]{2,1,0}", DIMENSIONS)
    (work,) = hlo.work(hlo.parse(product))
    assert work == (1, 2 * 3 * 5 * 4 * 7, 4 * 3 * (5 * 7 + 7 * 4 + 5 * 4))
    attention = _call("__cudnn$fmhaSoftmax", "%q, %k, %k", "bf16[2,32,3,8]{3,1,2,0}", "")
    (work,) = hlo.work(hlo.parse(attention))
    assert work == (1, 2 * 2 * 2 * 3 * 32 * 16 * 8, 2 * 2 * 3 * 8 * (32 + 16 + 16 + 32))
    backward = attention.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    assert hlo.flops(hlo.parse(backward)) == 5 * 2 * 2 * 3 * 32 * 16 * 8
    assert hlo.flops(hlo.parse(attention.replace("__cudnn$fmhaSoftmax", "mine"))) == 0


def test_work_is_counted_as_often_as_loops_run():
    def multiply(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y @ x), x)

    shape = jax.ShapeDtypeStruct((50, 50), jnp.float32)
    program = hlo.parse(jax.jit(multiply).lower(shape).compile().as_text())
    assert hlo.flops(program) == 2 * 50**3
    work = list(hlo.work(program))
    assert sum(each.times * each.flops for each in work) == 7 * 2 * 50**3
    assert {each.times for each in work} <= {1, 7}
