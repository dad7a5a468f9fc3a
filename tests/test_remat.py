"""What benchmarks/remat.py counts as kept is what JAX says that it saves."""

import contextlib
import io
import itertools
import json
import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint

from benchmarks import models, remat
from slam_jax import pipeline
from slam_jax.nets import unet

_SAVED = re.compile(r"^(\w+?)\[([\d,]*)\]", re.MULTILINE)
_TYPES = {"f32": "float32", "f16": "float16", "i32": "int32", "bool": "bool"}


def _saved(name: str, batch: int) -> int:
    """Bytes in JAX's own list of what the student's gradient remembers."""
    size = models.SIZES["tiny"]()
    nets = models.nets(size, jnp.float32, name)
    start = models.start(size, jnp.float32, models.random_parameters(models.parameter_shapes(size)))
    text = nets.encode_text(start.text_encoder, jax.device_put(models.tokens(size, batch)))
    x = jnp.zeros((batch, *pipeline.latent_shape(size.model, size.image_size)))

    def total(trained):
        student = partial(nets.student, nets.student_params(start.teacher, trained))
        return jnp.sum(student(x, jnp.zeros(batch, jnp.int32), text, jnp.ones((batch, 1, 1, 1))))

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ad_checkpoint.print_saved_residuals(total, start.student)
    found = _SAVED.findall(printed.getvalue())
    assert len(found) == len(printed.getvalue().splitlines())
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * np.dtype(_TYPES[dtype]).itemsize
        for dtype, shape in found
    )


def test_kept_is_what_jax_says_that_it_saves():
    counted = remat.counts(models.SIZES["tiny"](), "float32", "save_products")["kept_bytes"]
    saved = _saved("save_products", 2) - _saved("save_products", 1)
    assert counted == pytest.approx(saved, rel=0.01)


def test_the_less_is_kept_the_more_is_computed_again(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["remat.py", "--size=tiny", "--dtype=float32"])
    remat.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["remat"] for line in lines] == [*unet.REMAT]
    for before, after in itertools.pairwise(lines):
        assert after["kept_bytes"] < before["kept_bytes"]
        assert after["recomputed_flops"] > before["recomputed_flops"]
    assert lines[0]["recomputed_flops"] == 0
    # A gradient takes about three forward passes; nobody needs a block's last product again.
    forward = lines[0]["gradient_flops"] / 3
    assert forward / 2 < lines[-1]["recomputed_flops"] < forward
