"""SPLAM against LCM on assets/tiny_sd, at equal student iterations and teacher calls.

    python benchmarks/comparison.py --arms lcm_k20 splam_k20 --seeds 0 1 2

Leaves what each student drew, as features, in --keep, where those that are there already are not
made again; benchmarks/comparison_table.py makes numbers of them. Seeds are paired: all arms
of a seed see the same drawings, noises and, where the teacher's walk is the same, sub-paths.
"""

import argparse
import io
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import laboratory
from benchmarks.laboratory import Laboratory
from slam_jax import pipeline
from slam_jax.data import shapes2d
from slam_jax.diffusion import parameterization, sampler, schedule
from slam_jax.distill import loss
from slam_jax.evaluation import classifier
from slam_jax.evaluation.extractor import Extractor
from slam_jax.metrics import prompt_accuracy
from slam_jax.runtime import folder, images

STEPS = (1, 2, 4, 8)
_NUM_STEPS = 300
_NUM_IMAGES = 512
_NUM_REAL = 2000
_NUM_SHOWN = 8
_TEACHER_STEPS = 50
# Where the error curve is taken, as in a figure of the paper, with sub-paths of one step of 20.
CURVE = tuple(range(99, 1000, 100))
_NUM_PER_TIME = 64


class Arm(NamedTuple):
    """What sets one student apart."""

    walk: dict  # length, stride, w: what the teacher does
    form: dict  # sigma, gamma, distance: what the student does
    cond_proj: str = "zero"
    ema_rate: float = 0.95


LCM = {"sigma": "fixed", "gamma": ("ones",)}
PUBLISHED = {"sigma": "markov", "gamma": ("uniform",)}
WALKS = {
    "k20": {"length": 20, "stride": 20},
    "k100": {"length": 100, "stride": 100},
    "k100x5": {"length": 100, "stride": 20},
    "k200x10": {"length": 200, "stride": 20},
}
FORMS = {
    "fixed_annealed": {"sigma": "fixed", "gamma": ("annealed", 0.0, 1.0, 0.5)},
    "matched_50": {"sigma": "matched", "gamma": ("mixture", 0.5)},
    "matched_80": {"sigma": "matched", "gamma": ("mixture", 0.8)},
    "zero_50": {"sigma": "markov", "gamma": ("mixture", 0.5)},
}
LOSSES = {
    "c_01": {"form": {"distance": ("huber", 1e-2)}},
    "c_1": {"form": {"distance": ("huber", 1e-1)}},
    "l2": {"form": {"distance": ("l2",)}},
    "ema_0": {"ema_rate": 0.0},
    "ema_99": {"ema_rate": 0.99},
    "w2": {"walk": {"w": 2.0}},
    "w4": {"walk": {"w": 4.0}},
    "c_1_w2": {"form": {"distance": ("huber", 1e-1)}, "walk": {"w": 2.0}},
    "c_1_w4": {"form": {"distance": ("huber", 1e-1)}, "walk": {"w": 4.0}},
}


def arms() -> dict[str, Arm]:
    """All that can be asked for, by name."""
    found = {f"lcm_{name}": Arm(walk, LCM) for name, walk in WALKS.items()}
    found |= {f"splam_{name}": Arm(walk, PUBLISHED, "random") for name, walk in WALKS.items()}
    for walk in WALKS:
        found |= {f"{name}_{walk}": Arm(WALKS[walk], form) for name, form in FORMS.items()}
    for base in [name for name in found if name.endswith(("k20", "k100x5"))]:
        for change, values in LOSSES.items():
            arm = found[base]
            found[f"{base}_{change}"] = arm._replace(
                walk=arm.walk | values.get("walk", {}),
                form=arm.form | values.get("form", {}),
                ema_rate=values.get("ema_rate", arm.ema_rate),
            )
    return found


class Held(NamedTuple):
    """What students are asked after training, and what the teacher answers."""

    text: np.ndarray
    noise: np.ndarray  # [steps, N, h, w, C]
    labels: np.ndarray
    endpoint: np.ndarray  # the teacher's latents from noise[0]
    judge: Extractor
    real: np.ndarray  # features of real drawings
    curve: laboratory.Examples


def held(lab: Laboratory, seed: int, w: float) -> Held:
    """Other captions than the training's, and other drawings."""
    size = lab.settings.data.size
    drawn = shapes2d.Shapes2D(size, _NUM_IMAGES, 2000 + seed)
    captions = [drawn.scene(i)[0].caption() for i in range(_NUM_IMAGES)]
    shape = (max(STEPS), _NUM_IMAGES, *pipeline.latent_shape(lab.teacher, size))
    noise = jax.device_get(jax.random.normal(jax.random.key(3000 + seed), shape))
    text = laboratory.texts(lab, captions)
    judge = classifier.extractor(classifier.read(laboratory.ROOT / lab.settings.eval.judge, size))
    source = shapes2d.Shapes2D(size, _NUM_REAL, 4000)
    drawings = np.stack([source[i].image for i in range(_NUM_REAL)])
    real = judge.apply(jax.device_put(judge.prepare(drawings)))["pool"]
    walk = laboratory.method(lab, **WALKS["k20"], times="all", w=w)
    times = jnp.repeat(jnp.asarray(CURVE, jnp.int32), _NUM_PER_TIME // len(CURVE) + 1)
    walk = walk._replace(times=times)
    curve = laboratory.examples(lab, walk, 5000 + seed, _NUM_PER_TIME * len(CURVE))
    labels = np.stack([shapes2d.parse(caption).labels() for caption in captions])
    endpoint = _endpoint(lab, text, noise[0], w)
    return Held(text, noise, labels, endpoint, judge, jax.device_get(real), curve)


def _endpoint(lab: Laboratory, text: np.ndarray, x_T: np.ndarray, w: float) -> np.ndarray:
    levels = schedule.from_config(lab.teacher.scheduler)
    prediction = parameterization.prediction_from_config(lab.teacher.scheduler)
    times = sampler.ddim_times(_TEACHER_STEPS)
    net = pipeline.teacher(lab.teacher.unet.config, jnp.float32)

    @jax.jit
    def sample(params, null_text, x_T, text):
        bound = partial(net, params)
        return sampler.ddim_sample(bound, levels, prediction, times, x_T, text, null_text, w)

    return laboratory.in_batches(
        lambda rows: sample(lab.teacher.unet.params, lab.null_text, *rows), (x_T, text), len(text)
    )


class Programs(NamedTuple):
    """Compiled once for all arms and seeds."""

    samplers: dict[int, Callable]
    gaps: Callable  # (params, (ends, text)) -> squared gaps between the ends


def programs(lab: Laboratory) -> Programs:
    """What `ask` calls."""
    method = laboratory.method(lab, **LCM, **WALKS["k20"], distance=("l2",))
    net = laboratory.network(lab)

    @jax.jit
    def gaps(params, rows):
        ends, text = rows
        ones, bound = jnp.ones((len(text), 1, 1, 1)), partial(net, params)
        return loss.slam_loss(bound, bound, method, ends, text, ones)

    return Programs({steps: laboratory.few_step(lab, steps) for steps in STEPS}, gaps)


def ask(lab: Laboratory, built: Programs, params: Any, asked: Held) -> dict[str, np.ndarray]:
    """What a student answers."""
    found = {}
    vae = lab.teacher.vae.params
    for steps, sample in built.samplers.items():
        noise = np.moveaxis(asked.noise[:steps], 0, 1)

        def draw(rows, sample=sample):
            text, noise = rows
            return sample(params, vae, text, jnp.moveaxis(noise, 1, 0))

        latents, drawn = laboratory.in_batches(draw, (asked.text, noise), len(asked.text))
        pixels = asked.judge.prepare(images.quantize(drawn))
        outputs = jax.device_get(asked.judge.apply(jax.device_put(pixels)))
        logits = classifier.heads(outputs["logits"])
        found |= {
            f"features_{steps}": outputs["pool"],
            f"accuracy_{steps}": prompt_accuracy.prompt_accuracy(logits, asked.labels),
            f"endpoint_{steps}": np.sqrt(np.mean((latents - asked.endpoint) ** 2)),
        }
        if steps == 1:
            found["shown"] = drawn[:_NUM_SHOWN]
    curve = asked.curve
    gaps = laboratory.in_batches(partial(built.gaps, params), tuple(curve), len(curve.text))
    found["curve"] = np.array([np.sqrt(gaps[curve.ends.t == t].mean()) for t in CURVE])
    return found | {"real": asked.real}


def make(lab: Laboratory, names: list[str], seed: int, keep: pathlib.Path) -> None:
    """The files of those arms, walks in turn so that their sub-paths are made once."""
    everything = arms()
    walks: dict[tuple, list[str]] = {}
    for name in names:
        if not _file(keep, name, seed).exists():
            walks.setdefault(tuple(sorted(everything[name].walk.items())), []).append(name)
    built, asked_of = programs(lab), dict[float, Held]()
    for walk, members in walks.items():
        began = time.perf_counter()
        w = dict(walk).get("w", lab.settings.distill.w)
        if w not in asked_of:
            asked_of = {w: held(lab, seed, w)}
        teacher = laboratory.method(lab, **dict(walk))
        found = laboratory.examples(lab, teacher, seed, _NUM_STEPS * laboratory.BATCH_SIZE)
        print(f"seed {seed} {dict(walk)}: {time.perf_counter() - began:.0f} s", flush=True)
        for name in members:
            began, arm = time.perf_counter(), everything[name]
            params, losses = laboratory.train(
                lab, laboratory.method(lab, **arm.walk, **arm.form),
                laboratory.start(lab, arm.cond_proj, seed), found,
                seed=seed, num_steps=_NUM_STEPS, ema_rate=arm.ema_rate,
            )  # fmt: skip
            answers = ask(lab, built, params, asked_of[w])
            seconds = time.perf_counter() - began
            content = io.BytesIO()
            np.savez(content, losses=losses, seconds=seconds, **answers)
            folder.write_atomic(_file(keep, name, seed), content.getvalue())
            print(f"seed {seed} {name}: {seconds:.0f} s", flush=True)


def _file(keep: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return keep / f"{name}-{seed}.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", required=True, choices=sorted(arms()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("runs/comparison"))
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    # The programs of an arm are the same for all seeds.
    jax.config.update("jax_compilation_cache_dir", str(options.keep / "xla"))
    lab = laboratory.enter()
    for seed in options.seeds:
        make(lab, options.arms, seed, options.keep)


if __name__ == "__main__":
    main()
