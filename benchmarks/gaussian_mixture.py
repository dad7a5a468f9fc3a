"""Judge a form of the loss in a minute: distil a Gaussian mixture, of which all is known.

The teacher is the mixture's exact noise under Stable Diffusion's schedule and the student a small
network; loss, train step, teacher's walk and sampler are the project's own.
"""

import argparse
import json
import pathlib
import sys
import time
from functools import partial
from typing import NamedTuple

# So that a checkout runs where it is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from benchmarks import mixtures, timing
from slam_jax.diffusion import parameterization, sampler, schedule, solver, subpath
from slam_jax.distill import gamma, loss, state, step, teacher
from slam_jax.nets import embeddings

_PUBLISHED, _FIXED = (
    subpath.told_t(spread) for spread in (subpath.sigma_markov, subpath.sigma_fixed)
)
_HALF, _ANNEALED = gamma.mixture(0.5), gamma.annealed(0.0, 1.0, 0.5)
# Name -> (what the student is fed, law of gamma); all are the same at gamma = 1.
FORMS = {
    "lcm": (_FIXED, gamma.ones),
    "published": (_PUBLISHED, gamma.uniform),
    "uniform-fixed": (_FIXED, gamma.uniform),
    "uniform-matched": (subpath.matched, gamma.uniform),
    "mixture": (_PUBLISHED, _HALF),
    "mixture-fixed": (_FIXED, _HALF),
    "mixture-matched": (subpath.matched, _HALF),
    "anneal": (_PUBLISHED, _ANNEALED),
    "anneal-fixed": (_FIXED, _ANNEALED),
    "anneal-matched": (subpath.matched, _ANNEALED),
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
STEPS = (1, 2, 4)
_EMBEDDING_DIM = 64


class Student(nn.Module):
    """Noise of x [B, 1, 1, D], told the time and, unless it is None, gamma."""

    width: int

    @nn.compact
    def __call__(self, x, t, gamma):
        condition = None
        if gamma is not None:
            condition = parameterization.gamma_embedding(gamma, _EMBEDDING_DIM)
        told = embeddings.TimestepEmbedding(
            _EMBEDDING_DIM, self.width, True, 0, _EMBEDDING_DIM, name="time_embedding"
        )(t, condition)
        hidden = x[:, 0, 0]
        for _ in range(3):
            hidden = nn.silu(nn.Dense(self.width)(hidden) + told)
        return x + jnp.reshape(nn.Dense(x.shape[-1])(hidden), x.shape)


def fit(data: mixtures.Mixture, levels: schedule.Schedule, options, key):
    """A network that has learned the teacher's noise: where a student starts. Gamma is unread."""
    net, (init_key, fit_key) = Student(options.width), jax.random.split(key)
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, options.fit_iterations))

    def batch_loss(params, key):
        data_key, time_key, noise_key = jax.random.split(key, 3)
        x_0 = mixtures.draw(data, data_key, options.batch)
        t = jax.random.randint(time_key, (options.batch,), 0, levels.alpha.size)
        alpha, sigma = levels(t)
        x = alpha * x_0 + sigma * jax.random.normal(noise_key, x_0.shape)
        return jnp.mean(
            (net.apply(params, x, t, None) - mixtures.exact_noise(data, levels, x, t, None)) ** 2
        )

    def update(carry, number):
        params, opt_state = carry
        grads = jax.grad(batch_loss)(params, jax.random.fold_in(fit_key, number))
        updates, opt_state = adam.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = net.init(init_key, *_example(data))
    cond_proj = params["params"]["time_embedding"]["cond_proj"]
    cond_proj["kernel"] = jnp.zeros_like(cond_proj["kernel"])
    (params, _), _ = jax.lax.scan(
        update, (params, adam.init(params)), jnp.arange(options.fit_iterations)
    )
    return params


def _example(data: mixtures.Mixture):
    return (
        jnp.zeros((1, 1, 1, data.means.shape[1])),
        jnp.zeros(1, jnp.int32),
        jnp.ones((1, 1, 1, 1)),
    )


def nets(data: mixtures.Mixture, levels: schedule.Schedule, width: int) -> step.Nets:
    """What the train step calls, the mixture in place of pictures and nothing in place of text."""

    def count(batch):
        return batch["input_ids"].shape[0]

    return step.Nets(
        student=lambda params, x, t, _text, gamma: Student(width).apply(params, x, t, gamma),
        student_params=step.all_trained,
        teacher=lambda _params, x, t, text: mixtures.exact_noise(data, levels, x, t, text),
        encode_image=lambda _params, batch, key: mixtures.draw(data, key, count(batch)),
        encode_text=lambda _params, batch: no_text(count(batch)),
    )


def no_text(count: int):
    """[count, 1, 1]"""
    return jnp.zeros((count, 1, 1))


def distil(networks: step.Nets, method: loss.Method, options, params, key):
    """The averaged student after all iterations, which is what a run exports."""
    optimizer = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.iterations))
    frozen = state.Frozen(teacher=(), vae=(), text_encoder=(), null_text=no_text(1))
    batch = {"input_ids": jnp.zeros((1, options.batch, 1), jnp.int32)}

    def update(train_state, _):
        return step.train_step(
            train_state, frozen, batch, key,
            nets=networks, method=method, optimizer=optimizer, ema_rate=options.ema_rate,
            num_steps=options.iterations, max_grad_norm=np.inf,
        )  # fmt: skip

    begin = state.init(params, optimizer)
    end, _ = jax.lax.scan(update, begin, None, length=options.iterations)
    return end.target


class Truth(NamedTuple):
    """What samples are held against."""

    noise: Float[Array, "4 N 1 1 D"]  # the same for all
    end: Float[Array, "N D"]  # of the probability flow from noise[0]
    data: Float[Array, "M D"]
    within: Float[Array, ""]  # E|Y - Y'| of the data


def follow(data: mixtures.Mixture, method: loss.Method, x, *, stride: int):
    """The flow from x [N, 1, 1, D] at the last time to time 0, by DDIM steps: [N, D]."""
    text, t = no_text(x.shape[0]), jnp.full(x.shape[0], method.times[-1])
    end, _ = teacher.walk(
        partial(mixtures.exact_noise, data, method.schedule), x, t, text, text[:1], method.w,
        method.schedule, method.prediction, -(-1000 // stride) * stride, stride,
    )  # fmt: skip
    return end[:, 0, 0]


def truth(data: mixtures.Mixture, method: loss.Method, options) -> Truth:
    """The flow is followed through every time of the training."""
    noise_key, data_key = jax.random.split(jax.random.key(2**31))
    shape = (max(STEPS), options.samples, 1, 1, data.means.shape[1])
    noise, y = (
        jax.random.normal(noise_key, shape),
        mixtures.draw(data, data_key, 2 * options.samples)[:, 0, 0],
    )
    end = jax.jit(partial(follow, data, method, stride=1))(noise[0])
    return Truth(noise, end, y, jax.jit(mixtures.within)(y))


def judge(networks: step.Nets, method: loss.Method, known: Truth, params) -> dict:
    """err1, the mean distance of one step to the flow's end; energy distances by steps, x 1000."""
    text, found = no_text(known.end.shape[0]), {}
    for steps in STEPS:
        x_0 = sampler.consistency_sample(
            partial(networks.student, params), method.schedule, method.prediction,
            sampler.few_step_times(steps, method.times.size), known.noise[:steps], text,
        )[:, 0, 0]  # fmt: skip
        if steps == 1:
            found["err1"] = jnp.mean(jnp.linalg.norm(x_0 - known.end, axis=-1))
        found[f"E{steps}"] = 1e3 * mixtures.energy_distance(x_0, known.data, known.within)
    return found


def reference(data: mixtures.Mixture, method: loss.Method, known: Truth) -> dict:
    """err1 of the method's stride, energy distances of the flow's end and of 4-step DDIM."""
    text = no_text(known.end.shape[0])
    ddim = sampler.ddim_sample(
        partial(mixtures.exact_noise, data, method.schedule), method.schedule, method.prediction,
        sampler.ddim_times(4), known.noise[0], text, text[:1], method.w,
    )[:, 0, 0]  # fmt: skip
    end = follow(data, method, known.noise[0], stride=method.stride)
    return {
        "solver_err1": jnp.mean(jnp.linalg.norm(end - known.end, axis=-1)),
        "exact_E": 1e3 * mixtures.energy_distance(known.end, known.data, known.within),
        "ddim_E4": 1e3 * mixtures.energy_distance(ddim, known.data, known.within),
    }


def summary(found: dict, first: dict) -> dict:
    """Mean and standard error over the seeds, of each number and of its difference to the first."""

    def mean_and_error(values):
        spread = np.std(values, ddof=1) / np.sqrt(values.size) if values.size > 1 else None
        return [round(float(v), 4) if v is not None else None for v in (np.mean(values), spread)]

    rows = {name: mean_and_error(values) for name, values in found.items()}
    paired = {name: mean_and_error(values - first[name]) for name, values in found.items()}
    return rows | {"minus_first": paired}


def parse() -> argparse.Namespace:
    """The options, whose defaults are those of GAMMA.md's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--form", nargs="+", choices=FORMS, default=["lcm", "published", "anneal-fixed"]
    )
    parser.add_argument("--dim", type=timing.positive, default=2)
    parser.add_argument("--length", type=timing.positive, default=20, help="of a sub-path, k")
    parser.add_argument("--stride", type=timing.positive, default=20, help="of the teacher")
    parser.add_argument("--seeds", type=timing.positive, default=2)
    parser.add_argument("--iterations", type=timing.positive, default=3000)
    parser.add_argument("--fit_iterations", type=timing.positive, default=3000)
    parser.add_argument("--batch", type=timing.positive, default=256)
    parser.add_argument("--width", type=timing.positive, default=128)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--ema_rate", type=float, default=0.95)
    parser.add_argument("--samples", type=timing.positive, default=4096)
    options = parser.parse_args()
    with timing.refusing(parser):
        options.methods = {form: method(form, options) for form in options.form}
    return options


def method(form: str, options) -> loss.Method:
    """The loss of that form, without guidance."""
    levels = schedule.from_config(SCHEDULER)
    point, law = FORMS[form]
    return loss.checked(
        loss.Method(
            schedule=levels, prediction=parameterization.EPSILON,
            times=solver.start_grid(50, levels.alpha.size),
            length=options.length, stride=options.stride, w=0.0,
            point=point, distance=loss.pseudo_huber(1e-3), gamma_law=law,
        )
    )  # fmt: skip


def main() -> None:
    options = parse()
    methods = vars(options).pop("methods")
    data, shared = mixtures.make(options.dim), next(iter(methods.values()))
    networks = nets(data, shared.schedule, options.width)
    known = truth(data, shared, options)
    line = {"program": "gaussian_mixture", **vars(options), **timing.surroundings()}
    found = jax.device_get(jax.jit(partial(reference, data, shared))(known))
    line |= {name: round(value.item(), 4) for name, value in found.items()}

    keys = jax.random.split(jax.random.key(0), options.seeds)
    begin = jax.jit(jax.vmap(partial(fit, data, shared.schedule, options)))(keys)
    score, first = jax.jit(partial(judge, networks, shared)), None
    for form, chosen in methods.items():
        started = time.perf_counter()
        train = jax.jit(jax.vmap(partial(distil, networks, chosen, options)))
        end = train(begin, keys)
        by_seed = [
            jax.device_get(score(known, jax.tree.map(lambda leaf, n=n: leaf[n], end)))
            for n in range(options.seeds)
        ]
        found = {name: np.array([row[name] for row in by_seed]) for name in by_seed[0]}
        first = first or found
        seconds = round(time.perf_counter() - started, 1)
        line |= {"form": form, **summary(found, first), "seconds": seconds}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
