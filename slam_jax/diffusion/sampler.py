"""Few-step consistency sampling and the teacher's DDIM sampling, each one scan over its times."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slam_jax.diffusion import guidance, ode_sampler, parameterization
from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.errors import UserError
from slam_jax.shapes import Coeff, Conditioning, Latent, Timestep


def few_step_times(
    num_steps: int, original_steps: int = 50, num_timesteps: int = 1000, strength: float = 1.0
) -> Int[Array, "S"]:
    """Times that the student visits, as in diffusers >= 0.24: 4 -> 999, 759, 499, 259.

    Taken from the grid it was trained on, `original_steps` times ending at the last. strength in
    (0, 1]: the share of that grid, from its clean end, in which they lie: 1 starts at pure noise.
    """
    return jnp.asarray(host_times(num_steps, original_steps, num_timesteps, strength))


def host_times(
    num_steps: int, original_steps: int, num_timesteps: int, strength: float
) -> Int[np.ndarray, "S"]:
    """The same as numpy's array, for who compiles nothing for so many steps."""
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength} is a share of the noise; choose in (0, 1]")
    usable = int(original_steps * strength)
    if not 1 <= num_steps <= usable <= num_timesteps:
        raise UserError(
            f"{num_steps} sampling steps at strength {strength}: there are "
            f"{min(usable, num_timesteps)} times to choose from"
        )
    skipped = np.floor(np.linspace(0, usable, num_steps, endpoint=False))
    spacing = num_timesteps // original_steps
    return (spacing * (usable - skipped) - 1).astype(np.int32)


def ddim_times(
    num_steps: int, original_steps: int = 50, num_timesteps: int = 1000
) -> Int[Array, "S"]:
    """Times for the teacher: the student's, so that both start at the last and are comparable."""
    return few_step_times(num_steps, original_steps, num_timesteps)


def _levels(
    schedule: Schedule, times: Int[Array, "S"]
) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """(alpha, sigma) with which x is formed at each time; at the first it is noise alone."""
    return schedule.alpha[times].at[0].set(0.0), schedule.sigma[times].at[0].set(1.0)


def consistency_sample(
    net: Callable[[Latent, Timestep, Conditioning, Coeff], Latent],
    schedule: Schedule,
    prediction: Prediction,
    times: Int[Array, "S"],
    noise: Float[Array, "S B h w C"],
    text: Conditioning,
    start: Latent | None = None,
    count: Int[Array, ""] | None = None,
) -> Latent:
    """Multistep consistency sampling with gamma = 1 (METHOD.md §4) -> x_0; no guidance.

    net(x, t, text, gamma) is the raw network. noise[0] is where sampling starts, noise[i] the
    fresh noise with which step i begins. start: a latent to begin from, noised to times[0],
    instead of from noise alone (image to image). count: how many of the times are visited, the
    others being there for the sake of their number alone; all unless given.
    """
    batch = noise.shape[1]
    gamma = jnp.ones((batch, 1, 1, 1))

    def step(x_0, inputs):
        time, alpha, sigma, fresh = inputs
        x = alpha * x_0 + sigma * fresh
        t = jnp.full((batch,), time)
        x_0hat = prediction.to_x0(x, net(x, t, text, gamma), *schedule(t))
        return parameterization.consistency(x, x_0hat, t), None

    if start is None:
        start, levels = jnp.zeros_like(noise[0]), _levels(schedule, times)
    else:
        levels = schedule.alpha[times], schedule.sigma[times]
    inputs = (times, *levels, noise)
    if count is None:
        x_0, _ = jax.lax.scan(step, start, inputs)
        return x_0
    return jax.lax.fori_loop(
        0, count, lambda i, x_0: step(x_0, jax.tree.map(lambda each: each[i], inputs))[0], start
    )


def ddim_sample(
    teacher: Callable[[Latent, Timestep, Conditioning], Latent],
    schedule: Schedule,
    prediction: Prediction,
    times: Int[Array, "S"],
    x_T: Latent,
    text: Conditioning,
    null_text: guidance.NullText,
    w: float,
) -> Latent:
    """Guided DDIM from noise x_T through `times` (falling) to x_0; w = 0 is conditional only."""
    path = _ddim_path(times, schedule)
    return ode_sampler.sample(
        teacher, prediction, path, ode_sampler.uncorrected, x_T, text, null_text, w
    )


def _ddim_path(times: Int[Array, "S"], schedule: Schedule) -> ode_sampler.Path:
    return ode_sampler.Path(
        times, schedule.alpha[times], schedule.sigma[times], jnp.zeros(times.shape), start=1.0
    )


def _default_ddim_path(num_steps: int, schedule: Schedule, scheduler: Mapping) -> ode_sampler.Path:
    """At the student's times, whatever spacing the scheduler's config names."""
    original_steps = {"original_inference_steps": 50, **scheduler}["original_inference_steps"]
    times = ddim_times(num_steps, original_steps, schedule.alpha.size)
    return _ddim_path(times, schedule)


# What a teacher can be sampled with.
GUIDED = {
    "ddim": ode_sampler.EULER._replace(path=_default_ddim_path),
    "euler": ode_sampler.EULER,
    "heun": ode_sampler.HEUN,
    "dpm++2m": ode_sampler.DPM_SOLVER,
}


def guided(name: str) -> ode_sampler.Sampler:
    """The sampler of that name, its network_calls included."""
    if name not in GUIDED:
        raise UserError(f"sampler {name!r} is not known; there are {', '.join(GUIDED)}")
    return GUIDED[name]
