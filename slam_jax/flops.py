"""Floating-point operations of a traced program: its matrix products and convolutions.

XLA's own count (cost_analysis) takes the body of a loop once, however often it runs, and on
some devices leaves out calls of vendor libraries; this one depends on neither.
"""

import math

from jax.extend import core


def count(jaxpr: core.Jaxpr, *, unrolled: bool = True) -> int:
    """Multiplications and additions of all dot_general and conv_general_dilated, loops unrolled.

    Padding counts as if it were data. Of the branches of a `cond` the dearest counts, and a
    kernel's body as often as its grid has places. unrolled: False counts as XLA's text can be
    counted, the body of a loop once and kernels but cuDNN's not at all.
    """
    total = 0
    for equation in jaxpr.eqns:
        inner = [count(sub, unrolled=unrolled) for sub in core.jaxprs_in_params(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                total += _dot(equation)
            case "conv_general_dilated":
                total += _convolution(equation)
            case "pallas_call":
                places = math.prod(equation.params["grid_mapping"].grid)
                total += places * sum(inner) if unrolled else 0
            case "dot_product_attention_fwd_wrapper":
                total += 2 * _product_of_attention(equation)
            case "dot_product_attention_bwd_wrapper":
                # Queries with keys once more, and a gradient for each factor of both products.
                total += 5 * _product_of_attention(equation)
            case "scan":
                total += (equation.params["length"] if unrolled else 1) * sum(inner)
            case "cond":
                total += max(inner)
            case "while":
                assert not any(inner), "a loop of unknown length holds matrix products"
            case _:
                total += sum(inner)
    return total


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    depth = math.prod(shape[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * depth


def _product_of_attention(equation: core.JaxprEqn) -> int:
    """Of every query with every key, in cuDNN's kernel."""
    query, key = (variable.aval.shape for variable in equation.invars[:2])
    batch, queries, heads, depth = query
    return 2 * batch * heads * queries * key[1] * depth


def _convolution(equation: core.JaxprEqn) -> int:
    """Positions between the elements of a dilated input are zeros and do not count."""
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    depth = math.prod(kernel) // outputs
    places = math.prod(equation.outvars[0].aval.shape)
    return 2 * places * depth // math.prod(equation.params["lhs_dilation"])
