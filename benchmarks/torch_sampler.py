"""The few-step sampler made of diffusers' parts: text encoder, UNet, LCMScheduler, VAE.

What LatentConsistencyModelPipeline calls, in its order, without its checks and its PIL images: the
result stays on the device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks import models, timing, torch_nets
from slam_jax import pipeline


def runner(
    size: models.Size, start: models.Start, prompts: Mapping[str, np.ndarray], *, dtype: str,
    num_steps: int, decodes: bool, compile_mode: str | None,
) -> timing.Runner:  # fmt: skip
    """start: float32 on the host. compile_mode: torch.compile's, None to run eagerly."""
    sample = build(
        size, start, prompts, dtype=dtype, num_steps=num_steps, decodes=decodes,
        compile_mode=compile_mode,
    )  # fmt: skip
    batch = len(prompts["input_ids"])
    height, width, channels = pipeline.latent_shape(size.model, size.image_size)

    def call() -> np.ndarray:
        noise = torch.randn(batch, channels, height, width, device=torch_nets.DEVICE)
        drawn = sample(noise.contiguous(memory_format=torch.channels_last))
        torch_nets.wait()
        # One number: that all is finite, or not.
        return drawn.float().mean().cpu().numpy()

    return timing.Runner(call, torch_nets.versions())


def build(
    size: models.Size, start: models.Start, prompts: Mapping[str, np.ndarray], *, dtype: str,
    num_steps: int, decodes: bool, compile_mode: str | None,
) -> Callable[[torch.Tensor], torch.Tensor]:  # fmt: skip
    """Noise [B, C, h, w] -> latents, or images in [0, 1], [B, 3, H, W]."""
    torch_nets.exact_settings()
    precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    nets = torch_nets.build(size, start, precision)
    unet = nets.target.eval()
    nets = nets._replace(teacher=None, student=None)
    if size.lora:
        unet.fuse_lora()
    unet.to(precision)
    if compile_mode:
        unet.compile(mode=compile_mode)
        nets.vae.decoder.compile(mode=compile_mode)
    scheduler = diffusers.LCMScheduler.from_config(
        {**size.model.scheduler, "_class_name": "LCMScheduler", "clip_sample": False,
         "set_alpha_to_one": False}
    )  # fmt: skip
    tokens = {
        name: torch.tensor(ids, device=torch_nets.DEVICE) for name, ids in prompts.items()
    }  # fmt: skip

    @torch.inference_mode()
    def sample(noise: torch.Tensor) -> torch.Tensor:
        # Also starts its counter of steps again.
        scheduler.set_timesteps(num_steps, device=noise.device, original_inference_steps=50)
        # Every step is asked at gamma = 1, where a LoRA's layer for gamma is told nothing.
        embedding = torch_nets.embed(torch.ones(len(noise), device=noise.device))
        embedding = (embedding * (not size.lora)).to(precision)
        x = _latents(nets, unet, scheduler, noise.to(precision), embedding, tokens)
        if not decodes:
            return x
        images = nets.vae.decode(x / nets.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    return sample


def _latents(
    nets: torch_nets.Nets, unet: Any, scheduler: diffusers.LCMScheduler, x: torch.Tensor,
    embedding: torch.Tensor, tokens: Mapping[str, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    hidden, added = torch_nets.text(nets, tokens)
    denoised = x
    for t in scheduler.timesteps:
        output = unet(
            x, t, hidden, timestep_cond=embedding, added_cond_kwargs=added, return_dict=False
        )[0]
        x, denoised = scheduler.step(output, t, x, return_dict=False)
    return denoised
