"""The SPLAM loss (METHOD.md §1.11). With gamma = 1 throughout it is the LCM loss."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from slam_jax.diffusion import guidance, parameterization, subpath
from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.distill import teacher as teacher_walk
from slam_jax.distill.gamma import GammaLaw, Progress
from slam_jax.errors import UserError
from slam_jax.shapes import Coeff, Conditioning, Latent, PerExample, PRNGKey, Timestep

# Raw networks: student and target take gamma, the teacher does not.
StudentNet = Callable[[Latent, Timestep, Conditioning, Coeff], Latent]
TeacherNet = Callable[[Latent, Timestep, Conditioning], Latent]


class Method(NamedTuple):
    """Everything that says which loss this is, networks and data aside."""

    schedule: Schedule
    prediction: Prediction
    times: Int[Array, "N"]  # where sub-paths may start: solver.start_grid or solver.all_times
    length: int  # of a sub-path, in training times: k
    stride: int  # of the teacher's solver: k_phi; length / stride steps in all
    w: float  # guidance weight, 0 = conditional only
    point: subpath.PointOf  # what the student is fed: told_t(sigma_*) or matched
    distance: Callable[[Latent, Latent], PerExample]
    gamma_law: GammaLaw


class Draw(NamedTuple):
    """All that is random in the loss."""

    index: Int[Array, "B"]  # which of Method.times
    noise: Latent
    gamma: Coeff


class Pair(NamedTuple):
    """The ends of a sub-path [s, t]: what the loss needs of data and teacher."""

    t: Timestep
    s: Timestep
    x_t: Latent
    x_s: Latent


class Terms(NamedTuple):
    """Every intermediate value, in the order of the algorithm."""

    t: Timestep
    s: Timestep
    x_t: Latent
    x_s: Latent
    x_gamma: Latent
    sigma_gamma: Coeff
    student_output: Latent
    student_x0: Latent
    f_student: Latent
    target_output: Latent
    f_target: Latent


def checked(method: Method) -> Method:
    """The method itself, or UserError if its sub-paths end where no target was ever trained."""
    if method.stride < 1 or method.length < 1 or method.length % method.stride:
        raise UserError(
            f"length {method.length} must be a positive multiple of stride {method.stride}; "
            "length = stride is one solver step"
        )
    times = np.asarray(method.times)
    untrained = np.setdiff1d(np.maximum(times - method.length, 0), np.append(times, 0))
    if untrained.size:
        # In GAMMA.md §4 this costs a factor of four in error.
        raise UserError(
            f"length {method.length} leads from the {times.size} start times to others, where the "
            f"student is never trained (such as {untrained[-1]}): make length a multiple of their "
            f"spacing {np.diff(times, prepend=-1).min()}, or draw t from all times"
        )
    if method.point is subpath.matched and not np.asarray(method.schedule.alpha).all():
        raise UserError(
            "sigma 'matched' tells points apart by their noise-to-signal ratio, which is infinite "
            "where the schedule ends without signal; choose markov, ddim or fixed"
        )
    return method


def draw_subpath(key: PRNGKey, x_0: Latent, method: Method, progress: Progress) -> Draw:
    """Sub-paths, noises and gammas for a batch; `progress` of training in [0, 1]."""
    subpath_key, noise_key, gamma_key = jax.random.split(key, 3)
    batch = x_0.shape[0]
    return Draw(
        index=jax.random.randint(subpath_key, (batch,), 0, method.times.size),
        noise=jax.random.normal(noise_key, x_0.shape),
        gamma=method.gamma_law(gamma_key, batch, progress),
    )


def pair(
    teacher: TeacherNet,
    method: Method,
    x_0: Latent,
    text: Conditioning,
    null_text: guidance.NullText,
    draw: Draw,
) -> Pair:
    """x_t by diffusion, x_s by the teacher's guided solver."""
    schedule = method.schedule
    t = method.times[draw.index]
    alpha_t, sigma_t = schedule(t)
    x_t = alpha_t * x_0.astype(jnp.float32) + sigma_t * draw.noise
    x_s, s = teacher_walk.walk(
        teacher, x_t, t, text, null_text, method.w, schedule, method.prediction,
        method.length, method.stride,
    )  # fmt: skip
    return Pair(t, s, x_t, jax.lax.stop_gradient(x_s))


def terms(
    student: StudentNet,
    target: StudentNet,
    method: Method,
    ends: Pair,
    text: Conditioning,
    gamma: Coeff,
) -> Terms:
    """The consistency function of the student on the sub-path and of the target at its end."""
    schedule, to_x0 = method.schedule, method.prediction.to_x0
    t, s, x_t, x_s = ends

    # The student anywhere on it.
    point = method.point(schedule, x_s, s, x_t, t, gamma)
    student_output = student(point.x, point.t, text, point.gamma)
    student_x0 = to_x0(point.x, student_output, point.alpha, point.sigma)
    f_student = parameterization.consistency(point.x, student_x0, point.t)

    # The target at its clean end, where gamma = 1 is the point x_s itself.
    target_output = target(x_s, s, text, jnp.ones_like(gamma))
    target_x0 = to_x0(x_s, target_output, *schedule(s))
    f_target = jax.lax.stop_gradient(parameterization.consistency(x_s, target_x0, s))

    return Terms(
        t, s, x_t, x_s, point.x, point.sigma,
        student_output, student_x0, f_student, target_output, f_target,
    )  # fmt: skip


def slam_loss(
    student: StudentNet,
    target: StudentNet,
    method: Method,
    ends: Pair,
    text: Conditioning,
    gamma: Coeff,
) -> PerExample:
    """Distance between student and target for each example; the step takes the mean."""
    values = terms(student, target, method, ends, text, gamma)
    return method.distance(values.f_student, values.f_target)


def squared(a: Latent, b: Latent) -> PerExample:
    """Mean squared difference."""
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def pseudo_huber(c: float) -> Callable[[Latent, Latent], PerExample]:
    """Mean over elements of sqrt(difference² + c²) - c, c > 0 (METHOD.md §1.7)."""
    if c <= 0:
        raise UserError(f"huber_c {c} must be positive; the released script uses 0.001")

    def distance(a: Latent, b: Latent) -> PerExample:
        # The same number without the cancellation: exact, and never negative, near 0.
        square = (a - b) ** 2
        return jnp.mean(square / (jnp.sqrt(square + c**2) + c), axis=(1, 2, 3))

    return distance
