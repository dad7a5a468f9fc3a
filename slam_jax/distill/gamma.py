"""Laws of gamma, the position on a sub-path: (key, batch, progress in [0, 1]) -> gamma.

gamma = 1 is the noisy end, the only place where samplers query the student.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slam_jax.errors import UserError
from slam_jax.shapes import Coeff, PRNGKey

Progress = float | Float[Array, ""]
GammaLaw = Callable[[PRNGKey, int, Progress], Coeff]


def uniform(gamma_key: PRNGKey, batch: int, progress: Progress) -> Coeff:
    """U(0, 1], the published law (METHOD.md §1.7)."""
    del progress
    # Never 0: there, with zero terminal SNR, x_gamma holds neither signal nor noise.
    return 1.0 - jax.random.uniform(gamma_key, (batch, 1, 1, 1))


def ones(gamma_key: PRNGKey, batch: int, progress: Progress) -> Coeff:
    """gamma = 1 always, which makes SPLAM's loss the LCM loss."""
    del gamma_key, progress
    return jnp.ones((batch, 1, 1, 1))


def mixture(p: float) -> GammaLaw:
    """1 with probability p, otherwise uniform (GAMMA.md)."""
    return annealed(p, p, 1.0)


def annealed(p_0: float, p_1: float, until: float) -> GammaLaw:
    """Mixture whose p goes in a straight line from p_0 to p_1, reached at progress `until`.

    (0, 1, 0.5) ends as plain LCM after half of the training (GAMMA.md §6).
    """
    for name, value in (("p_0", p_0), ("p_1", p_1)):
        if not 0 <= value <= 1:
            raise UserError(f"gamma law: {name} {value} is a probability; choose from 0 to 1")
    if not 0 < until <= 1:
        raise UserError(f"gamma law: until {until} is a share of the training; choose in (0, 1]")

    def law(gamma_key: PRNGKey, batch: int, progress: Progress) -> Coeff:
        end_key, interior_key = jax.random.split(gamma_key)
        p = p_0 + (p_1 - p_0) * jnp.minimum(progress / until, 1.0)
        at_end = jax.random.bernoulli(end_key, p, (batch, 1, 1, 1))
        return jnp.where(at_end, 1.0, uniform(interior_key, batch, progress))

    return law
