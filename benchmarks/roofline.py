"""What a train step and a sample take at the least on some chips: counted, nothing is run.

python benchmarks/roofline.py > benchmarks/roofline.md
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import models, timing
from slam_jax import pipeline
from slam_jax.runtime import chips

# Rates that were measured, of products of large bfloat16 matrices and of copies in memory.
MEASURED = chips.named("H200 SXM")._replace(
    name="H200, measured", flops=790e12, memory_bandwidth=4.3e12, source="measured"
)
_CHIPS = (MEASURED, *map(chips.named, ("H200 SXM", "A100 80GB", "TPU v5e", "TPU v5p")))
_SAMPLER_STEPS = 4
SHOWN = ("tiny", "sd15", "sd21", "sdxl_lora")
_INTRODUCTION = f"""# The limit

Written by `python benchmarks/roofline.py > benchmarks/roofline.md`; nothing was run.

- FLOPs are multiplications and additions of matrix products and convolutions, counted in the traced
  program (`slam_jax/flops.py`). A UNet's forward is what `torch.utils.flop_counter` says of
  diffusers' class to the last digit (`tests/test_roofline.py`); XLA's `cost_analysis` of
  SD 1.5's, not yet compiled, says 789.5 GFLOP: less by the padding, more by what is done to single
  elements.
- M = 1 solver step of the teacher, so 2M = 2 calls; each further one adds two more.
- "the algorithm" is what MFU counts: nothing that is recomputed.
- Bytes are those of the state alone, each array read or written as often as a step cannot avoid:
  student and target by their networks, and by the update, which also reads the gradient that was
  written and reads and writes the two moments; frozen networks once, in 16 bits where they are kept
  so. Activations come on top: what they move is the compiler's affair.
- The limit in images/s is that of the FLOPs, which batches above "equal at" can come near;
  smaller ones are bound by the state. From {_SAMPLER_STEPS}-step sampling "sample" counts text
  encoder, student and VAE decoder.
- Peaks without sparsity, of 16-bit matrix products: {{peaks}}.
"""


class Counts(NamedTuple):
    """FLOPs for one image, and of a LoRA's merging, which is once a step."""

    teacher: int  # both calls
    target: int
    forward: int
    backward: int
    recomputed: int  # with remat
    vae_encoder: int
    vae_decoder: int
    text_encoder: int
    merges: int

    @property
    def cached(self) -> int:
        """The algorithm's, from cached latents."""
        return self.teacher + self.target + self.forward + self.backward + self.text_encoder

    @property
    def sample(self) -> int:
        """Of a few-step sample."""
        return _SAMPLER_STEPS * self.forward + self.vae_decoder + self.text_encoder


class Traffic(NamedTuple):
    """Bytes that a step moves at the least, from 16-bit frozen networks."""

    update: int  # student, target and moments read and written, the gradient read
    gradient: int  # written
    trained: int  # student and target read by their networks; the student also going backwards
    frozen: int  # read

    @property
    def all(self) -> int:
        """Of a step."""
        return sum(self)


def counts(size: models.Size) -> Counts:
    """From shapes alone."""
    nets = models.nets(size, jnp.float32)
    start = jax.eval_shape(
        lambda p: models.start(size, jnp.float32, p), models.parameter_shapes(size)
    )
    x, t, gamma = (_floats(1, *_latent(size)), _integers(1), _floats(1, 1, 1, 1))
    tokens = jax.eval_shape(lambda: models.tokens(size, 1))
    text = jax.eval_shape(nets.encode_text, start.text_encoder, tokens)
    merged = jax.eval_shape(nets.student_params, start.teacher, start.student)
    image = {"image": jax.ShapeDtypeStruct((1, size.image_size, size.image_size, 3), jnp.uint8)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    forward = timing.count(nets.student, merged, x, t, text, gamma)
    once, with_gradient = _merges(nets.student_params, start)
    both, recomputing = (
        timing.count(_gradient(models.nets(size, jnp.float32, remat)), start, x, t, text, gamma)
        for remat in ("none", "all")
    )
    decode = pipeline.decode(size.model.vae.config, jnp.float32)
    return Counts(
        teacher=2 * timing.count(nets.teacher, start.teacher, x, t, text),
        target=forward,
        forward=forward,
        backward=both - forward - with_gradient,
        recomputed=recomputing - both,
        vae_encoder=timing.count(nets.encode_image, start.vae, image, key),
        vae_decoder=timing.count(decode, start.vae, x),
        text_encoder=timing.count(nets.encode_text, start.text_encoder, tokens),
        merges=once + with_gradient,
    )


def _gradient(nets: Any) -> Callable:
    def gradient(start, x, t, text, gamma):
        def mean(trained):
            params = nets.student_params(start.teacher, trained)
            return jnp.mean(nets.student(params, x, t, text, gamma))

        return jax.grad(mean)(start.student)

    return gradient


def _merges(student_params: Callable, start: models.Start) -> tuple[int, int]:
    """FLOPs of putting the trained parameters into the network, and of that and its gradient."""

    def with_gradient(teacher, trained):
        merged, back = jax.vjp(lambda trained: student_params(teacher, trained), trained)
        return back(merged)

    return tuple(
        timing.count(each, start.teacher, start.student) for each in (student_params, with_gradient)
    )


def traffic(size: models.Size) -> Traffic:
    """The same."""
    shapes = models.parameter_shapes(size)
    start = jax.eval_shape(lambda p: models.start(size, jnp.bfloat16, p), shapes)
    trained = _bytes(start.student)
    return Traffic(
        update=9 * trained, gradient=trained, trained=3 * trained,
        frozen=_bytes((start.teacher, start.text_encoder)),
    )  # fmt: skip


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _latent(size: models.Size) -> tuple[int, int, int]:
    return pipeline.latent_shape(size.model, size.image_size)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def introduction() -> str:
    """What holds of all sizes."""
    peaks = "; ".join(
        f"{chip.name} {chip.flops / 1e12:g} TFLOP/s, {chip.memory_bandwidth / 1e9:g} GB/s "
        f"({chip.source})"
        for chip in _CHIPS
    )
    return _INTRODUCTION.format(peaks=peaks)


def section(name: str) -> str:
    """The tables of one size."""
    size = models.SIZES[name]()
    found, moved = counts(size), traffic(size)
    what = f"a LoRA of rank {size.lora.rank}" if size.lora else "all of the student trained"
    return "\n".join([
        f"## {name}: {size.image_size}², {what}", "",
        *_table(("FLOPs per image", "GFLOP"), _flop_rows(found)),
        *_table(("state moved per step", "MB"), _traffic_rows(moved)),
        *_table(
            ("chip", "ms per image", "state, ms per step", "equal at batch", "images/s, cached",
             "images/s, from pixels", f"{_SAMPLER_STEPS}-step samples/s"),
            [_limits(chip, found, moved) for chip in _CHIPS],
        ),
    ])  # fmt: skip


def _flop_rows(found: Counts) -> list[tuple[str, str]]:
    rows = [
        ("teacher, 2 calls", found.teacher), ("target", found.target),
        ("student, forward", found.forward), ("student, backward", found.backward),
        ("text encoder", found.text_encoder), ("**the algorithm, cached latents**", found.cached),
        ("VAE encoder", found.vae_encoder),
        ("**the algorithm, from pixels**", found.cached + found.vae_encoder),
        ("recomputed with remat, not counted", found.recomputed),
        ("VAE decoder", found.vae_decoder), (f"**{_SAMPLER_STEPS}-step sample**", found.sample),
    ]  # fmt: skip
    if found.merges:
        rows.append(("merging the LoRA, twice and backwards, per step, not counted", found.merges))
    return [(name, f"{flop / 1e9:,.2f}") for name, flop in rows]


def _traffic_rows(moved: Traffic) -> list[tuple[str, str]]:
    rows = [
        ("update of student, target and moments", moved.update),
        ("gradient, written", moved.gradient),
        ("student and target, read by their networks", moved.trained),
        ("teacher and text encoder, read", moved.frozen), ("**all**", moved.all),
    ]  # fmt: skip
    return [(name, f"{size / 1e6:,.1f}") for name, size in rows]


def _limits(chip: chips.Chip, found: Counts, moved: Traffic) -> tuple[str, ...]:
    image, state = found.cached / chip.flops, moved.all / chip.memory_bandwidth
    rates = (chip.flops / flop for flop in (
        found.cached, found.cached + found.vae_encoder, found.sample
    ))  # fmt: skip
    return (
        chip.name, f"{1e3 * image:.4g}", f"{1e3 * state:.4g}", f"{state / image:.1f}",
        *(f"{rate:,.1f}" for rate in rates),
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=models.SIZES, nargs="+", default=SHOWN)
    options = parser.parse_args()
    print("\n".join([introduction(), *map(section, options.size)]).rstrip())


if __name__ == "__main__":
    main()
