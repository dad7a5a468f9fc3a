"""benchmarks/roofline.md is what the program prints, and its counts are those of torch."""

import importlib
import pathlib
import sys

import diffusers
import jax
import pytest
import torch
from torch.utils import flop_counter

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))
models = importlib.import_module("benchmarks.models")
roofline = importlib.import_module("benchmarks.roofline")


@pytest.fixture(scope="module")
def sd15():
    size = models.SIZES["sd15"]()
    start = jax.eval_shape(
        lambda parameters: models.start(size, "float32", parameters), models.parameter_shapes(size)
    )
    return size, start


def test_forward_of_sd15_is_what_torch_counts(sd15):
    size, start = sd15
    nets = models.nets(size, "float32")
    text = jax.ShapeDtypeStruct((1, 77, 768), "float32")
    x, t = jax.ShapeDtypeStruct((1, 64, 64, 4), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    ours = roofline.timing.count(nets.teacher, start.teacher, x, t, text)

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**size.model.unet.config)
        inputs = torch.empty(1, 4, 64, 64), torch.zeros(1), torch.empty(1, 77, 768)
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs)
    assert ours == counter.get_total_flops()
    assert 0.80e12 < ours < 0.86e12


@pytest.fixture(scope="module")
def tiny():
    return roofline.counts(models.SIZES["tiny"]())


def test_the_committed_limit_is_what_is_printed(tiny, monkeypatch):
    # The other sizes take minutes; the tables are made alike.
    monkeypatch.setattr(roofline, "counts", lambda size: tiny)
    committed = (ROOT / "benchmarks/roofline.md").read_text()
    assert committed.startswith(roofline.introduction())
    assert roofline.section("tiny") in committed
    for name in roofline.SHOWN:
        assert f"\n## {name}: " in committed


def test_a_step_moves_the_state_of_the_sizes_that_are_published(sd15):
    size, _ = sd15
    moved = roofline.traffic(size)
    # 859,520,964 numbers and the layer for gamma, in float32: 5 read by the update and 4 written.
    assert moved.update == 9 * 4 * (859_520_964 + 256 * 320)
    # Little more than two bytes a number: norms and embeddings of times are kept as they are.
    numbers = 859_520_964 + 123_060_480
    assert 2.0 * numbers < moved.frozen < 2.02 * numbers


def test_backward_is_twice_forward_and_limits_are_quotients(tiny):
    # Less by what the first convolution would say of its input.
    assert 1.9 < tiny.backward / tiny.forward <= 2.0
    # Blocks are run again, the layers between them are not.
    assert 0.5 < tiny.recomputed / tiny.forward < 1.0
    assert tiny.merges == 0
    chip = roofline.chips.named("A100 80GB")
    moved = roofline.Traffic(1, 2, 3, 4)
    name, image, state, equal, cached, pixels, _ = roofline._limits(chip, tiny, moved)
    assert name == chip.name and float(image) == pytest.approx(1e3 * tiny.cached / 312e12, rel=1e-3)
    assert float(state) == pytest.approx(1e4 / 2039e9, rel=1e-3)
    assert float(cached.replace(",", "")) == pytest.approx(312e12 / tiny.cached, rel=1e-4)
    assert float(pixels.replace(",", "")) < float(cached.replace(",", ""))
    assert float(equal) < 1
