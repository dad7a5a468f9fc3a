"""A train step is traced once for all runs alike, and never taken for another run's."""

import importlib
import pathlib
import sys

import pytest

from slam_jax import arguments, program, settings
from slam_jax.runtime import executables, mesh

sys.path.append(str(pathlib.Path(__file__).parents[1]))


def asked(monkeypatch, **changes) -> str:
    """By what key the step of configs/tiny.py is looked for, some settings changed."""

    def key(_, name, given, *arguments, **__):
        return executables._key(name, given, arguments)

    monkeypatch.setattr(executables, "lower", key)
    config = importlib.import_module("configs.tiny").get_config()
    config.update_from_flattened_dict({"accumulate": 2} | changes)
    chosen = settings.from_config(config.to_dict())
    teacher, _ = arguments.teacher(chosen)
    devices = mesh.make(chosen.mesh.axes)
    built = program.build(chosen, program.parts(chosen, teacher), devices)
    return built.lower(built.like, arguments.batch(chosen, teacher, devices))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 7),
        ("batch_size", 16),
        ("accumulate", 1),
        ("ema_rate", 0.5),
        ("teacher.model", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("teacher.dtype", "bfloat16"),
        ("student.dtype", "bfloat16"),
        ("student.remat", "all"),
        ("student.lora.rank", 8),
        ("distill.num_subpaths", 25),
        ("distill.times", "all"),
        ("distill.length", 100),
        ("distill.stride", 50),
        ("distill.w", 3.0),
        ("distill.sigma", "matched"),
        ("distill.gamma", ("ones",)),
        ("distill.distance", ("l2",)),
        ("optimizer.learning_rate", 1e-3),
        ("optimizer.warmup_steps", 5),
        ("optimizer.mu_dtype", "bfloat16"),
        ("data.size", 64),
        ("faults.max_grad_norm", 3.0),
        ("mesh.axes", (("data", 2), ("fsdp", 2))),
    ],
)
def test_what_decides_tells_steps_apart(monkeypatch, name, value):
    assert asked(monkeypatch, **{name: value}) != asked(monkeypatch)


def test_what_does_not_decide_does_not(monkeypatch):
    others = {
        "seed": 7, "data.source": "shapes2d", "data.num_threads": 3, "eval.every_steps": 3,
        "checkpoint.keep": 9, "faults.max_skips": 3, "faults.timeout_s": 9, "log.every_steps": 3,
        "student.cond_proj": "random",
    }  # fmt: skip
    here = asked(monkeypatch)
    for name, value in others.items():
        assert asked(monkeypatch, **{name: value}) == here, name
