"""AdamW with warm-up and clipping, as the released script trains."""

import jax
import jax.numpy as jnp
import optax
from jax import export
from jax.typing import DTypeLike

from slam_jax.errors import UserError

# So that a program that takes its state can be kept (runtime/executables.py).
for _state in (optax.EmptyState, optax.ScaleByAdamState, optax.ScaleByScheduleState):
    export.register_namedtuple_serialization(_state, serialized_name=f"optax.{_state.__name__}")


def adamw(
    learning_rate: float,
    warmup_steps: int,
    clip_norm: float,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    mu_dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Clips the global norm, then AdamW (Loshchilov & Hutter 2019) on every parameter.

    The learning rate rises in a straight line over the first `warmup_steps` updates (0: at
    once), the first of which is already more than nothing, and stays. mu_dtype: in which the first
    moment is kept between updates; all else is float32.
    """
    if learning_rate <= 0 or clip_norm <= 0 or warmup_steps < 0:
        raise UserError(
            f"optimizer: learning_rate {learning_rate} and clip_norm {clip_norm} must be positive, "
            f"warmup_steps {warmup_steps} at least 0"
        )

    def schedule(count):
        return learning_rate * jnp.minimum((count + 1) / max(warmup_steps, 1), 1.0)

    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype),
    )

    def update(grads, state, params=None):
        # optax raises b1 and b2 to an integer power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, params)

    return optax.GradientTransformation(chain.init, update)
