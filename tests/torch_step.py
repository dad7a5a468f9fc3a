"""A training step in torch, from METHOD.md §1.11, recorded as the released script's is."""

import json
from pathlib import Path

import diffusers
import safetensors.torch
import torch


def unet(
    time_cond_proj_dim: int | None, cross_attention_dim: int
) -> diffusers.UNet2DConditionModel:
    """Unlike the shared recording's: heads differ by level, projections are linear."""
    return diffusers.UNet2DConditionModel(
        sample_size=(6, 4), block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=cross_attention_dim, norm_num_groups=4,
        use_linear_projection=True, time_cond_proj_dim=time_cond_proj_dim,
    ).eval()  # fmt: skip


def embed(gamma: torch.Tensor, dim: int) -> torch.Tensor:
    of_pipeline = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return of_pipeline(None, 10 - 10 * gamma, embedding_dim=dim)


def record(folder: Path, num_times: int, w: float, batch: int) -> None:
    """One step in torch, from METHOD.md §1.11, written as the shared recording is."""
    torch.manual_seed(num_times)
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    teacher, student, target = (unet(dim, 10) for dim in (None, 32, 32))
    skip, huber_c = 1000 // num_times, 0.02
    tensors = {
        "latents": torch.randn(batch, 4, 6, 4),
        "noise": torch.randn(batch, 4, 6, 4),
        "prompt_embeds": torch.randn(batch, 3, 10),
        "uncond_embeds": torch.randn(batch, 3, 10),
        "index": torch.randint(num_times, (batch,)),
        "gamma": torch.rand(batch),
        "w": torch.full((batch,), w),
    }
    tensors |= step(tensors, scheduler, teacher, student, target, skip, huber_c)
    for name, model in (("teacher", teacher), ("student", student), ("target", target)):
        model.save_pretrained(folder / f"{name}_unet")
    scheduler.save_pretrained(folder / "scheduler")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "tensors.safetensors")
    settings = dict(
        w_scale=w, num_ddim_timesteps=num_times, skip=skip, huber_c=huber_c,
        prediction_type="epsilon",
    )  # fmt: skip
    (folder / "step.json").write_text(json.dumps(settings))


def step(inputs, scheduler, teacher, student, target, skip, huber_c) -> dict[str, torch.Tensor]:
    x_0, noise, text, null_text, index, gamma, w = inputs.values()
    t = skip * (index + 1) - 1
    s = (t - skip).clamp(min=0)
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()

    def of(values, times):
        return values[times].view(-1, 1, 1, 1)

    def boundary(times):
        return 0.25 / ((10 * times) ** 2 + 0.25), 10 * times / ((10 * times) ** 2 + 0.25) ** 0.5

    def origin(x, eps, times, level):
        return (x - level * eps) / of(alpha, times)

    def consistent(x, origin, times):
        skip_part, out_part = (part.view(-1, 1, 1, 1) for part in boundary(times))
        return skip_part * x + out_part * origin

    x_t = of(alpha, t) * x_0 + of(sigma, t) * noise
    embedding = embed(gamma, 32)
    with torch.no_grad():
        cond, uncond = (teacher(x_t, t, prompt).sample for prompt in (text, null_text))
        x0_cond, x0_uncond = (origin(x_t, eps, t, of(sigma, t)) for eps in (cond, uncond))
        weight = w.view(-1, 1, 1, 1)
        pred_x0 = x0_cond + weight * (x0_cond - x0_uncond)
        pred_noise = cond + weight * (cond - uncond)
        x_s = of(alpha, s) * pred_x0 + of(sigma, s) * pred_noise
        target_eps = target(x_s, s, text, timestep_cond=embed(torch.ones_like(gamma), 32)).sample
        goal = consistent(x_s, origin(x_s, target_eps, s, of(sigma, s)), s)
    ratio, g = of(alpha, t) / of(alpha, s), gamma.view(-1, 1, 1, 1)
    x_gamma = (1 - g) * ratio * x_s + g * x_t
    level = ((ratio * of(sigma, s)) ** 2 + g**2 * (1 - ratio**2)).sqrt()
    student_eps = student(x_gamma, t, text, timestep_cond=embedding).sample
    student_x0 = origin(x_gamma, student_eps, t, level)
    output = consistent(x_gamma, student_x0, t)
    loss = ((output - goal).square() + huber_c**2).sqrt().sub(huber_c).mean()
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in student.parameters()]
    return dict(
        start_timesteps=t, end_timesteps=s, noisy_latents=x_t, gamma_embedding=embedding,
        teacher_eps_cond=cond, teacher_eps_uncond=uncond, solver_pred_x0=pred_x0,
        solver_pred_noise=pred_noise, x_prev=x_s, target_eps=target_eps, target=goal,
        interpolated=x_gamma, student_eps=student_eps, student_x0=student_x0,
        student_output=output, loss_huber=loss.view(1),
        loss_l2=(output - goal).square().mean().view(1),
        c_skip_start=boundary(t)[0], c_out_start=boundary(t)[1],
        c_skip_end=boundary(s)[0], c_out_end=boundary(s)[1],
        grad_global_norm_huber=torch.cat(gradients).norm().view(1),
        grad_huber_cond_proj=student.time_embedding.cond_proj.weight.grad,
        grad_huber_conv_out=student.conv_out.weight.grad,
    )  # fmt: skip
