"""The same train step in torch: diffusers' networks, autocast, SDPA, channels last, fused AdamW.

What a careful user of torch writes, and no more; benchmarks/recipe.py has the numbers. One thing is
left out that ours does: looking whether the gradient is finite before it is applied.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import models, recipe, timing, torch_nets
from slam_jax.distill import loss


class Draws(NamedTuple):
    """All that is random in a step."""

    posterior: torch.Tensor  # [B, C, h, w]
    index: torch.Tensor  # [B], of the time at which the sub-path starts
    noise: torch.Tensor  # [B, C, h, w]
    gamma: torch.Tensor  # [B, 1, 1, 1]


class Step(NamedTuple):
    """What a step works with."""

    nets: torch_nets.Nets
    null_text: tuple[torch.Tensor, torch.Tensor | None]  # hidden states, SDXL's pooled text
    alpha: torch.Tensor  # [1000]
    sigma: torch.Tensor
    is_v: bool  # the networks predict v
    scaling_factor: float
    solver_steps: int
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer
    is_lora: bool


def build(
    size: models.Size, start: models.Start, null_text: Any, *, dtype: str, solver_steps: int,
    remat: bool, compile_mode: str | None,
) -> Step:  # fmt: skip
    """start: float32 on the host. compile_mode: torch.compile's, None to run eagerly."""
    torch_nets.exact_settings()
    precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    nets = torch_nets.build(size, start, precision)
    if remat:
        nets.student.enable_gradient_checkpointing()
    trained = [each for each in nets.student.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, recipe.LEARNING_RATE, (0.9, 0.999), 1e-8, weight_decay=0.0, fused=True
    )
    if compile_mode:
        for net in (nets.teacher, nets.student, nets.target, nets.vae.encoder):
            net.compile(mode=compile_mode)
    levels, _ = models.diffusion(size)
    to = {"device": torch_nets.DEVICE}
    pooled = None
    if not isinstance(null_text, np.ndarray):
        null_text, pooled = null_text.hidden_states, torch.tensor(null_text.pooled, **to)
    return Step(
        nets, (torch.tensor(null_text, **to), pooled), torch.tensor(np.asarray(levels.alpha), **to),
        torch.tensor(np.asarray(levels.sigma), **to),
        size.model.scheduler.get("prediction_type") == "v_prediction",
        nets.vae.config.scaling_factor, solver_steps, precision, optimizer, size.lora is not None,
    )  # fmt: skip


def runner(step: Step, examples: Mapping[str, np.ndarray], first: list[tuple]) -> timing.Runner:
    """first: what the first steps, made here, draw: recipe.draws of each."""
    batch = _on_device(examples)
    losses = [float(run(step, batch, _given(*each))) for each in first]

    def call() -> float:
        value = run(step, batch, draw(step, batch))
        torch_nets.wait()
        return float(value)

    return timing.Runner(call, {"first_losses": losses, **torch_nets.versions()})


def run(step: Step, batch: Mapping[str, torch.Tensor], drawn: Draws) -> torch.Tensor:
    """One update; the loss before it."""
    value = mean_loss(step, batch, drawn)
    value.backward()
    trained = step.optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(trained, recipe.CLIP_NORM)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        pairs = zip(step.nets.student.parameters(), step.nets.target.parameters(), strict=True)
        moved = [(new, old) for new, old in pairs if new.requires_grad]
        news, olds = (list(each) for each in zip(*moved, strict=True))
        torch._foreach_lerp_(olds, news, 1.0 - recipe.EMA_RATE)
    return value.detach()


def draw(step: Step, batch: Mapping[str, torch.Tensor]) -> Draws:
    """By torch's own generator."""
    rows = len(batch["input_ids"])
    pictures = batch["image"] if "image" in batch else batch["moments"]
    factor = 2 ** (len(step.nets.vae.config.block_out_channels) - 1) if "image" in batch else 1
    shape = (rows, 4, pictures.shape[2] // factor, pictures.shape[3] // factor)
    to = {"device": torch_nets.DEVICE}
    return Draws(
        torch.randn(shape, **to), torch.randint(1000 // recipe.SPACING, (rows,), **to),
        torch.randn(shape, **to), 1.0 - torch.rand((rows, 1, 1, 1), **to),
    )  # fmt: skip


def mean_loss(step: Step, batch: Mapping[str, torch.Tensor], drawn: Draws) -> torch.Tensor:
    """The pseudo-Huber distance of student and target, means over elements and examples."""
    nets, gamma = step.nets, drawn.gamma
    t = recipe.SPACING * (drawn.index + 1) - 1
    s = (t - recipe.SPACING * step.solver_steps).clamp(min=0)
    with torch.no_grad(), torch_nets.autocast(step.dtype):
        x_0 = _latents(step, batch, drawn.posterior)
        text = torch_nets.text(nets, batch)
        alpha_t, sigma_t = _levels(step, t)
        x_t = alpha_t * x_0 + sigma_t * drawn.noise
        x_s = _walk(step, x_t, t, text)
        goal = _consistent(
            step, nets.target, x_s, s, text, torch.ones_like(gamma), *_levels(step, s)
        )
    alpha_s, sigma_s = _levels(step, s)
    drift = alpha_t / alpha_s
    x = gamma * x_t + (1 - gamma) * drift * x_s
    sigma = ((drift * sigma_s) ** 2 + gamma**2 * (1 - drift**2)).sqrt()
    with torch_nets.autocast(step.dtype):
        output = _consistent(step, nets.student, x, t, text, gamma, alpha_t, sigma)
    c = recipe.HUBER_C
    return ((output - goal).square() + c**2).sqrt().sub(c).mean()


def _on_device(examples: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    found = {}
    for name, array in examples.items():
        if array.ndim == 4:
            found[name] = torch_nets.images(array if name == "image" else array.astype(np.float32))
        else:
            found[name] = torch.tensor(array, device=torch_nets.DEVICE)
    return found


def _given(posterior: np.ndarray, drawn: loss.Draw) -> Draws:
    index, gamma = (
        torch.tensor(np.asarray(each), device=torch_nets.DEVICE)
        for each in (drawn.index, drawn.gamma)
    )
    noise = torch_nets.images(drawn.noise)
    return Draws(torch_nets.images(posterior), index.long(), noise, gamma)


def _latents(
    step: Step, batch: Mapping[str, torch.Tensor], posterior: torch.Tensor
) -> torch.Tensor:
    """A sample of the batch's posteriors, float32."""
    if "image" in batch:
        pixels = batch["image"].float() / 127.5 - 1.0
        known = step.nets.vae.encode(pixels.to(step.dtype)).latent_dist
        mean, deviation = known.mean.float(), known.std.float()
    else:
        mean, logvar = batch["moments"].chunk(2, dim=1)
        deviation = (0.5 * logvar).exp()
    return step.scaling_factor * (mean + deviation * posterior)


def _levels(step: Step, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return step.alpha[t].view(-1, 1, 1, 1), step.sigma[t].view(-1, 1, 1, 1)


def _walk(step: Step, x: torch.Tensor, t: torch.Tensor, text: tuple) -> torch.Tensor:
    """Guided DDIM down the sub-path, conditional and not in one call."""
    hidden, added = text
    null_hidden, null_pooled = step.null_text
    both = torch.cat([hidden, null_hidden.expand_as(hidden).to(hidden.dtype)])
    if added is not None:
        pooled = added["text_embeds"]
        added = {
            "text_embeds": torch.cat([pooled, null_pooled.expand_as(pooled).to(pooled.dtype)]),
            "time_ids": added["time_ids"].repeat(2, 1),
        }
    for _ in range(step.solver_steps):
        output = step.nets.teacher(
            torch.cat([x, x]), torch.cat([t, t]), both, added_cond_kwargs=added
        ).sample.float()
        found = (
            torch.lerp(*reversed(each.chunk(2)), 1.0 + recipe.W)
            for each in _prediction(step, torch.cat([x, x]), output, *_levels(step, t.repeat(2)))
        )
        x_0, eps = found
        earlier = (t - recipe.SPACING).clamp(min=0)
        alpha, sigma = _levels(step, earlier)
        x = torch.where((t > 0).view(-1, 1, 1, 1), alpha * x_0 + sigma * eps, x)
        t = earlier
    return x


def _prediction(
    step: Step, x: torch.Tensor, output: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_0, noise) of a network's output."""
    if not step.is_v:
        return (x - sigma * output) / alpha, output
    n = (alpha**2 + sigma**2).sqrt()
    return (
        alpha / n**2 * x - sigma / n * output,
        sigma / n**2 * x + alpha / n * output,
    )


def _consistent(
    step: Step, net: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, text: tuple,
    gamma: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The consistency function at (x, t), where x has these levels."""
    hidden, added = text
    embedding = torch_nets.embed(gamma.flatten())
    if step.is_lora:
        embedding = embedding - torch_nets.embed(torch.ones_like(gamma).flatten())
    output = net(x, t, hidden, timestep_cond=embedding, added_cond_kwargs=added).sample.float()
    x_0, _ = _prediction(step, x, output, alpha, sigma)
    scaled = 10.0 * t.view(-1, 1, 1, 1).float()
    root = (scaled**2 + 0.25).sqrt()
    return 0.25 / root**2 * x + scaled / root * x_0
