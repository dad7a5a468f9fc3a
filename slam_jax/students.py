"""A student's UNet made of its teacher's: with a layer for gamma, as a LoRA, and plain again."""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from slam_jax.diffusion import parameterization
from slam_jax.errors import UserError
from slam_jax.nets import lora, unet
from slam_jax.weights import pretrained


def is_student(model: pretrained.Pretrained) -> bool:
    """Whether it samples in a few steps: by its scheduler or because its UNet takes gamma."""
    return takes_gamma(model.unet.config) or model.scheduler["_class_name"] == "LCMScheduler"


def takes_gamma(unet_config: Mapping) -> bool:
    """Whether that UNet has a layer for gamma."""
    return unet.from_config(unet_config).time_cond_proj_dim is not None


def random_cond_proj(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """U(-1/sqrt(d), 1/sqrt(d)) of [d, channels]: torch's default, as released (METHOD.md §1.6)."""
    bound = shape[0] ** -0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def zero_cond_proj(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Zeros: the student starts as the teacher, whatever gamma is."""
    del rng
    return np.zeros(shape, np.float32)


def student_config(teacher_config: Mapping, gamma_dim: int) -> dict:
    """The config of the teacher's UNet, taking a gamma embedding of that width."""
    if takes_gamma(teacher_config):
        raise UserError(
            f"the teacher's UNet has time_cond_proj_dim {teacher_config['time_cond_proj_dim']}: it "
            "is a few-step student already; give the model that it was distilled from"
        )
    if gamma_dim < 4 or gamma_dim % 2:
        raise UserError(f"student.gamma_dim {gamma_dim} must be even and at least 4, such as 256")
    return {**teacher_config, "time_cond_proj_dim": gamma_dim}


def student_of(
    teacher: pretrained.Component,
    gamma_dim: int,
    cond_proj: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
    rng: np.random.Generator,
) -> pretrained.Component:
    """The teacher's UNet with a new, first guess of the layer that takes the gamma embedding."""
    channels = teacher.params["conv_in"]["kernel"].shape[-1]
    time_embedding = {
        **teacher.params["time_embedding"],
        "cond_proj": {"kernel": cond_proj(rng, (gamma_dim, channels))},
    }
    return teacher._replace(
        config=student_config(teacher.config, gamma_dim),
        params={**teacher.params, "time_embedding": time_embedding},
    )


def lora_of(
    teacher: pretrained.Component,
    student: pretrained.Component,
    targets: Sequence[str],
    rank: int,
    rng: np.random.Generator,
) -> pretrained.Component:
    """Of that student only what a LoRA trains: additions to the targets, and the gamma layer."""
    additions = lora.init(rng, teacher.params, targets, rank)
    cond_proj = {"cond_proj": student.params["time_embedding"]["cond_proj"]}
    time_embedding = {**additions.get("time_embedding", {}), **cond_proj}
    return student._replace(params={**additions, "time_embedding": time_embedding})


def fold_gamma(student: pretrained.Component) -> pretrained.Component:
    """The student at gamma = 1, where it is sampled, as a UNet without that input.

    Its embedding e is constant there, so C e, added before linear_1, is a bias: b + W (C e).
    A UNet that takes no gamma is returned as it is.
    """
    if not takes_gamma(student.config):
        return student
    time_embedding = dict(student.params["time_embedding"])
    cond_proj = np.float64(time_embedding.pop("cond_proj")["kernel"])
    linear_1 = time_embedding["linear_1"]
    e = parameterization.gamma_embedding(jnp.ones((1, 1, 1, 1)), len(cond_proj))[0]
    shift = np.float64(e) @ cond_proj @ np.float64(linear_1["kernel"])
    bias = np.asarray(linear_1["bias"])
    time_embedding["linear_1"] = {**linear_1, "bias": (bias + shift).astype(bias.dtype)}
    return student._replace(
        config={key: student.config[key] for key in student.config if key != "time_cond_proj_dim"},
        params={**student.params, "time_embedding": time_embedding},
    )
