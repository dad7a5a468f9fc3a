"""The networks of a Stable Diffusion as pure functions of their parameters.

Compute dtypes are decided here: parameters stay as they are given, and Linen casts them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from slam_jax.diffusion import guidance, ode_sampler, parameterization, sampler
from slam_jax.diffusion.parameterization import Prediction
from slam_jax.diffusion.schedule import Schedule
from slam_jax.errors import UserError
from slam_jax.nets import clip, kernels, unet, vae
from slam_jax.shapes import (
    Coeff,
    Conditioning,
    Guidance,
    Image,
    Latent,
    Moments,
    Pixels,
    PRNGKey,
    SDXLText,
    Time,
    Timestep,
)  # fmt: skip
from slam_jax.weights import pretrained

Params = Any
# What prompts are to the text encoders: [B, ...] arrays by name (data/text_inputs.py).
Prompts = Mapping[str, Any]

# What diffusers takes for a vae/config.json without the key, as Stable Diffusion 1.x has it.
_SCALING_FACTOR = 0.18215
# Layers of the UNet that compute in float32 whatever the dtype of the rest.
_OF_TIMES = {"time_embedding", "add_embedding"}


def dtype(name: str) -> DTypeLike:
    """The compute dtype of that name."""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {name!r} is not one of float32, bfloat16")
    return jnp.dtype(name)


def at_rest(dtype: DTypeLike) -> Callable[[tuple[str, ...], np.ndarray], np.ndarray]:
    """(path, parameter) of a frozen network -> as it is kept on the devices.

    Kernels and embeddings are kept as what Linen would cast them to anyway, to compute in `dtype`.
    Vectors, which are biases and norms, and the embeddings of times stay as they are, since norms
    and times are computed in float32.
    """

    def cast(path: tuple[str, ...], parameter: np.ndarray) -> np.ndarray:
        keeps = parameter.ndim < 2 or not _OF_TIMES.isdisjoint(path)
        return parameter if keeps else parameter.astype(dtype)

    return cast


def posterior(config: Mapping, dtype: DTypeLike) -> Callable[[Params, Pixels], vae.Posterior]:
    """(params, images) -> what the VAE knows of their latents."""
    net = vae.from_config(config, dtype=dtype)

    def encode(params: Params, pixels: Pixels) -> vae.Posterior:
        image = pixels.astype(jnp.float32) / 127.5 - 1.0
        return net.apply({"params": params}, image, method=net.encode)

    return encode


def cached_posterior(config: Mapping, dtype: DTypeLike) -> Callable[[Params, Pixels], Moments]:
    """(params, images) -> the same as it is kept, mean and then log-variance, in bfloat16.

    Half of float32's size; what it loses is far below the posterior's own noise.
    """
    encode = posterior(config, dtype)

    def moments(params: Params, pixels: Pixels) -> Moments:
        return jnp.concatenate(encode(params, pixels), axis=-1).astype(jnp.bfloat16)

    return moments


def encode_image(
    config: Mapping, dtype: DTypeLike
) -> Callable[[Params, Mapping[str, Array], PRNGKey], Latent]:
    """(params, batch, posterior_key) -> a sample of the posterior of its images x scaling_factor.

    The posterior is the batch's own, "moments", where a cache holds it, else that of "image".
    """
    encode, scaling_factor = posterior(config, dtype), _scaling_factor(config)

    def draw(params: Params, batch: Mapping[str, Array], posterior_key: PRNGKey) -> Latent:
        if "moments" in batch:
            mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        else:
            mean, logvar = encode(params, batch["image"])
        noise = jax.random.normal(posterior_key, mean.shape)
        return scaling_factor * (mean + jnp.exp(0.5 * logvar) * noise)

    return draw


def decode(config: Mapping, dtype: DTypeLike) -> Callable[[Params, Latent], Image]:
    """(params, scaled latent) -> image in [0, 1]."""
    net = vae.from_config(config, dtype=dtype)
    scaling_factor = _scaling_factor(config)

    def decode_scaled(params: Params, latent: Latent) -> Image:
        image = net.apply({"params": params}, latent / scaling_factor, method=net.decode)
        return jnp.clip(0.5 * image + 0.5, 0.0, 1.0)

    return decode_scaled


def _scaling_factor(config: Mapping) -> float:
    return {"scaling_factor": _SCALING_FACTOR, **config}["scaling_factor"]


def text_params(model: pretrained.Pretrained) -> Params:
    """What encode_text takes: the text encoder's parameters, SDXL's as a pair."""
    if model.text_encoder_2 is None:
        return model.text_encoder.params
    return model.text_encoder.params, model.text_encoder_2.params


def encode_text(
    model: pretrained.Pretrained, dtype: DTypeLike
) -> Callable[[Params, Prompts], Conditioning]:
    """(text_params, prompts) -> what the model's UNet is told."""
    if model.text_encoder_2 is None:
        return _encode_text(model.text_encoder.config, dtype)
    return _encode_sdxl_text(model.text_encoder.config, model.text_encoder_2.config, dtype)


def _encode_text(config: Mapping, dtype: DTypeLike) -> Callable[[Params, Prompts], Conditioning]:
    """The last hidden state after the final norm."""
    net = clip.from_config(config, dtype=dtype)

    def encode(params: Params, prompts: Prompts) -> Conditioning:
        return net.apply({"params": params}, prompts["input_ids"])

    return encode


def _encode_sdxl_text(
    config: Mapping, config_2: Mapping, dtype: DTypeLike
) -> Callable[[Params, Prompts], SDXLText]:
    """The penultimate states side by side, the second encoder's pooled one, and the sizes."""
    net, net_2 = clip.from_config(config, dtype=dtype), clip.from_config(config_2, dtype=dtype)

    def encode(params: Params, prompts: Prompts) -> SDXLText:
        first, second = params
        states = net.apply({"params": first}, prompts["input_ids"], method="states")
        states_2 = net_2.apply({"params": second}, prompts["input_ids_2"], method="states")
        hidden_states = jnp.concatenate([states.penultimate, states_2.penultimate], axis=-1)
        return SDXLText(hidden_states, states_2.pooled, prompts["time_ids"])

    return encode


def encode_null_text(
    model: pretrained.Pretrained, dtype: DTypeLike
) -> Callable[[Params, Prompts], guidance.NullText]:
    """(text_params, the empty prompt) -> what guidance leads away from.

    The text of the empty prompt; but zeros for an SDXL with force_zeros_for_empty_prompt, as
    the base model has it.
    """
    encode = encode_text(model, dtype)
    if model.text_encoder_2 is None or not model.force_zeros_for_empty_prompt:
        return encode

    def encode_zeros(params: Params, prompts: Prompts) -> SDXLText:
        return jax.tree.map(jnp.zeros_like, encode(params, prompts))

    return encode_zeros


def teacher(
    config: Mapping, dtype: DTypeLike, attend: Callable = kernels.attend
) -> Callable[[Params, Latent, Time, Conditioning], Latent]:
    """(params, x, t, text) -> raw output."""
    net = unet.from_config(config, dtype=dtype, attend=attend)

    def call(params: Params, x: Latent, t: Time, text: Conditioning) -> Latent:
        return net.apply({"params": params}, x, t, text)

    return call


def student(
    config: Mapping, dtype: DTypeLike, remat: str = "none", attend: Callable = kernels.attend
) -> Callable[[Params, Latent, Timestep, Conditioning, Coeff], Latent]:
    """(params, x, t, text, gamma) -> raw output.

    Without time_cond_proj_dim in its config the student is made for gamma = 1 and sees no gamma.
    """
    net = unet.from_config(config, dtype=dtype, remat=remat, attend=attend)
    dim = net.time_cond_proj_dim

    def call(params: Params, x: Latent, t: Timestep, text: Conditioning, gamma: Coeff) -> Latent:
        embedding = None if dim is None else parameterization.gamma_embedding(gamma, dim)
        return net.apply({"params": params}, x, t, text, embedding)

    return call


def lora_student(
    config: Mapping, dtype: DTypeLike, remat: str = "none", attend: Callable = kernels.attend
) -> Callable[[Params, Latent, Timestep, Conditioning, Coeff], Latent]:
    """(params, x, t, text, gamma) -> raw output; the LoRA is merged into params.

    The base knows no gamma and a LoRA file has no place for C, the layer that takes it. A full
    student's time embedding starts with linear_1(tau(t) + C e(gamma)), where tau are the sinusoids
    of t and e is gamma_embedding. Here it starts with linear_1(tau(t) + C (e(gamma) - e(1))): at
    gamma = 1 that is linear_1(tau(t)) whatever C has become. Samplers only ever ask for gamma = 1
    (sampler.py), so base and LoRA in a UNet without C draw the very same images.

    The two differ by a constant, linear_1's image of C e(1), which is a shift of its bias.
    """
    net = unet.from_config(config, dtype=dtype, remat=remat, attend=attend)
    dim = net.time_cond_proj_dim

    def call(params: Params, x: Latent, t: Timestep, text: Conditioning, gamma: Coeff) -> Latent:
        at_one = parameterization.gamma_embedding(jnp.ones_like(gamma), dim)
        embedding = parameterization.gamma_embedding(gamma, dim) - at_one
        return net.apply({"params": params}, x, t, text, embedding)

    return call


def latent_shape(model: pretrained.Pretrained, image_size: int) -> tuple[int, int, int]:
    """[h, w, C] of the latents of square images."""
    factor = pixels_per_latent(model)
    if image_size % factor:
        raise UserError(f"images of {image_size} pixels: the VAE needs a multiple of {factor}")
    channels = unet.from_config(model.unet.config).in_channels
    return image_size // factor, image_size // factor, channels


def pixels_per_latent(model: pretrained.Pretrained) -> int:
    """How many times wider and higher an image is than its latent."""
    return 2 ** (len(vae.from_config(model.vae.config).block_out_channels) - 1)


def few_step(
    student: Callable, decode: Callable, schedule: Schedule, prediction: Prediction,
    num_steps: int, original_steps: int,
) -> Callable[..., Image]:  # fmt: skip
    """(student_params, vae_params, text, noise [num_steps, B, h, w, C]) -> images in [0, 1]."""
    times = sampler.few_step_times(num_steps, original_steps, schedule.alpha.size)

    def sample(params: Params, vae_params: Params, text: Conditioning, noise) -> Image:
        net = partial(student, params)
        x_0 = sampler.consistency_sample(net, schedule, prediction, times, noise, text)
        return decode(vae_params, x_0)

    return sample


def ddim(
    teacher: Callable, decode: Callable, schedule: Schedule, prediction: Prediction,
    num_steps: int, original_steps: int, w: Guidance,
) -> Callable[..., Image]:  # fmt: skip
    """`guided` by DDIM at the times of a student that knows `original_steps` of them."""
    scheduler = {"original_inference_steps": original_steps}
    return guided("ddim", teacher, decode, schedule, prediction, scheduler, num_steps, w)


def guided(
    sampler_name: str, teacher: Callable, decode: Callable, schedule: Schedule,
    prediction: Prediction, scheduler: Mapping, num_steps: int, w: Guidance,
) -> Callable[..., Image]:  # fmt: skip
    """(teacher_params, vae_params, text, null_text, x_T) -> images in [0, 1].

    A sampler of sampler.GUIDED, at the times of the scheduler's config; w = 0 is conditional only.
    """
    chosen = sampler.guided(sampler_name)
    path = chosen.path(num_steps, schedule, scheduler)

    def sample(params: Params, vae_params: Params, text, null_text, x_T: Latent) -> Image:
        net = partial(teacher, params)
        x_0 = ode_sampler.sample(net, prediction, path, chosen.correct, x_T, text, null_text, w)
        return decode(vae_params, x_0)

    return sample
