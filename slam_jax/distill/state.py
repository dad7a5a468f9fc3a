"""What training changes and saves, and what it only reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import export

from slam_jax.diffusion import guidance

Params = Any


@struct.dataclass
class TrainState:
    """All that is checkpointed: numbers are float32, but AdamW's first moment may be bfloat16.

    step is a scalar int32.
    """

    step: Any
    student: Params  # what is trained of it: all, or a LoRA
    target: Params  # the same parts
    opt_state: Any


class Frozen(NamedTuple):
    """Parameters that never change, and the text guided away from, a batch of 1. Never donated."""

    teacher: Params
    vae: Params
    text_encoder: Params
    null_text: guidance.NullText


# So that a program that takes them can be kept (runtime/executables.py).
export.register_namedtuple_serialization(Frozen, serialized_name="slam_jax.Frozen")
export.register_pytree_node_serialization(
    TrainState,
    serialized_name="slam_jax.TrainState",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


def init(student: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0: the target is a copy of the student, and nothing shares memory with `student`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=jax.tree.map(jnp.copy, student),
        target=jax.tree.map(jnp.copy, student),
        opt_state=optimizer.init(student),
    )
