"""One training step as a pure function; the driver applies jit, shardings and donation."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Shaped

from slam_jax.distill import loss
from slam_jax.distill.loss import Method
from slam_jax.distill.state import Frozen, Params, TrainState
from slam_jax.shapes import Coeff, Conditioning, PRNGKey

# Microbatches of B examples: "image" or "moments" as encode_image reads them, "input_ids", and
# whatever else encode_text does.
Batch = dict[str, Shaped[Array, "accumulate B ..."]]
Metrics = dict[str, Float[Array, ""]]


class Nets(NamedTuple):
    """The networks as pure functions of their parameters (pipeline.py)."""

    student: Callable  # (params, x, t, text, gamma) -> raw output
    student_params: Callable  # (teacher's params, trained params) -> all of the student's
    teacher: Callable  # (params, x, t, text) -> raw output
    encode_image: Callable  # (params, batch, key) -> scaled latent
    encode_text: Callable  # (params, batch) -> text


def all_trained(_teacher: Params, trained: Params) -> Params:
    """Nets.student_params where all of the student's parameters are trained."""
    return trained


class Lesson(NamedTuple):
    """What one microbatch teaches."""

    ends: loss.Pair
    text: Conditioning
    gamma: Coeff


def train_step(
    state: TrainState, frozen: Frozen, batch: Batch, key: PRNGKey, *,
    nets: Nets, method: Method, optimizer: optax.GradientTransformation, ema_rate: float,
    num_steps: int, max_grad_norm: float,
    over_devices: Callable[[Callable], Callable] | None = None,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One update from the mean gradient of all microbatches; `key` is the run's, not the step's.

    A loss or gradient that is not finite, or a gradient above max_grad_norm, changes nothing but
    the step; so does an update that is not finite, on accelerators where its numbers are not.
    over_devices: of the gradient's function, makes one that is faster (apart.over_devices).
    """
    learn = partial(gradient, nets=nets, method=method)
    if over_devices is not None:
        learn = over_devices(learn)
    step_key = jax.random.fold_in(key, state.step)
    progress = state.step / num_steps

    def of_microbatch(number: int | Array, microbatch: Batch) -> tuple[Array, Params]:
        key = jax.random.fold_in(step_key, number)
        lesson = prepare(frozen, microbatch, key, progress, nets=nets, method=method)
        return learn(lesson, state.student, state.target, frozen.teacher)

    mean_loss, grads = _mean(of_microbatch, batch, state.student)
    return update(
        state, mean_loss, grads,
        optimizer=optimizer, ema_rate=ema_rate, max_grad_norm=max_grad_norm,
    )  # fmt: skip


def prepare(
    frozen: Frozen, microbatch: Batch, key: PRNGKey, progress: Array, *, nets: Nets, method: Method
) -> Lesson:
    """Encodes a microbatch [B, ...] and has the teacher walk down its sub-paths."""
    posterior_key, draw_key = jax.random.split(key)
    x_0 = nets.encode_image(frozen.vae, microbatch, posterior_key)
    text = nets.encode_text(frozen.text_encoder, microbatch)
    draw = loss.draw_subpath(draw_key, x_0, method, progress)
    teacher = partial(nets.teacher, frozen.teacher)
    ends = loss.pair(teacher, method, x_0, text, frozen.null_text, draw)
    return Lesson(ends, text, draw.gamma)


def gradient(
    lesson: Lesson, student: Params, target: Params, teacher: Params, *, nets: Nets, method: Method
) -> tuple[Float[Array, ""], Params]:
    """The mean loss of a microbatch, and what it says of the student's parameters."""

    def mean_loss(student: Params) -> Float[Array, ""]:
        student_net, target_net = (
            partial(nets.student, nets.student_params(teacher, trained))
            for trained in (student, target)
        )
        return jnp.mean(loss.slam_loss(student_net, target_net, method, *lesson))

    return jax.value_and_grad(mean_loss)(student)


def _mean(of_microbatch: Callable, batch: Batch, student: Params) -> tuple[Array, Params]:
    """Mean over the microbatches, one after the other, of the loss and of its gradient."""

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, of_microbatch(*numbered)), None

    count = batch["input_ids"].shape[0]
    if count == 1:
        # Without a loop: inside one, XLA's CPU compiler leaves the convolutions' gradients in a
        # form that takes three times as long (LOG.md).
        return of_microbatch(0, jax.tree.map(lambda x: x[0], batch))
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, student))
    total, _ = jax.lax.scan(add, zero, (jnp.arange(count), batch))
    return jax.tree.map(lambda x: x / count, total)


def update(
    state: TrainState, mean_loss: Array, grads: Params, *,
    optimizer: optax.GradientTransformation, ema_rate: float, max_grad_norm: float,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """AdamW's step, the target after it, and what is logged of both.

    Numbers of an update that are not finite never reach the student, and it counts as skipped.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
    norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    usable = jnp.isfinite(mean_loss) & (norms["grad_norm"] <= max_grad_norm)
    whole = usable & jnp.isfinite(norms["update_norm"])
    # For XLA's CPU compiler each output is a program of its own. That nothing is replaced before
    # all updates are there, nor a target before its student, leaves each old array one last reader,
    # the new one that takes its place: else it copies them all first. Others join outputs, and
    # would go over the state twice.
    on = jax.lax.platform_dependent
    usable = on(usable, whole, cpu=lambda _, whole: whole, default=lambda usable, _: usable)
    keep = partial(jax.tree.map, partial(jnp.where, usable))
    student = jax.tree.map(
        lambda old, change: jnp.where(usable & jnp.isfinite(change), old + change, old),
        state.student, updates,
    )  # fmt: skip
    student, usable = on(
        student, usable, cpu=lambda *both: jax.lax.optimization_barrier(both), default=lambda *x: x
    )
    target = jax.tree.map(
        lambda old, new: jnp.where(usable, ema_rate * old + (1.0 - ema_rate) * new, old),
        state.target, student,
    )  # fmt: skip
    after = TrainState(state.step + 1, student, target, keep(opt_state, state.opt_state))
    return after, {"loss": mean_loss, **norms, "skipped": 1.0 - whole.astype(jnp.float32)}
