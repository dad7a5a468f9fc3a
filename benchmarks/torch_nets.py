"""diffusers' and transformers' networks with our parameters, as a plain torch program has them."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

try:
    import diffusers
    import transformers
except ModuleNotFoundError as missing:
    sys.exit(f"error: the torch side needs {missing.name}; pip install diffusers transformers")

from benchmarks import models
from slam_jax.weights import translate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Nets(NamedTuple):
    """Modules on DEVICE, images as channels last, frozen ones in the dtype that they compute in."""

    teacher: diffusers.UNet2DConditionModel
    student: diffusers.UNet2DConditionModel  # parameters float32
    target: diffusers.UNet2DConditionModel  # parameters float32
    vae: diffusers.AutoencoderKL
    text_encoders: tuple[torch.nn.Module, ...]


def build(size: models.Size, start: models.Start, dtype: torch.dtype) -> Nets:
    """start: float32. The target starts as the student."""
    model = size.model
    student_config = {**model.unet.config, "time_cond_proj_dim": models.GAMMA_DIM}
    student, target = (
        _lora(size, start) if size.lora else _unet(student_config, start.student) for _ in range(2)
    )
    texts = start.text_encoder if model.text_encoder_2 else (start.text_encoder,)
    components = (model.text_encoder, model.text_encoder_2)
    return Nets(
        teacher=_frozen(_unet(model.unet.config, start.teacher), dtype),
        student=student.train(),
        target=target.requires_grad_(False),
        vae=_frozen(_vae(model.vae.config, start.vae), dtype),
        text_encoders=tuple(
            _frozen(_text_encoder(component.config, params), dtype)
            for component, params in zip(components, texts, strict=False)
        ),
    )


def exact_settings() -> None:
    """What everybody sets: the fastest convolution, and TF32 as JAX multiplies float32 by default.

    JAX_DEFAULT_MATMUL_PRECISION=highest holds here too.
    """
    fast = jax.config.jax_default_matmul_precision in (None, "default", "tensorfloat32")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = fast


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Of what computes in that dtype from parameters that are float32."""
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def wait() -> None:
    """Until the device has done all that it was told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    """Most memory that torch held on the device; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def versions() -> dict[str, Any]:
    """For a benchmark's line."""
    return {
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "torch_threads": torch.get_num_threads(),
    }  # fmt: skip


def images(array: np.ndarray) -> torch.Tensor:
    """[B, h, w, C] -> the same on the device as torch has it, [B, C, h, w], channels last."""
    return torch.tensor(np.asarray(array), device=DEVICE).permute(0, 3, 1, 2)


def embed(gamma: torch.Tensor) -> torch.Tensor:
    """What timestep_cond is fed: diffusers' embedding of a guidance scale, here of gamma [B]."""
    pipeline = diffusers.LatentConsistencyModelPipeline
    return pipeline.get_guidance_scale_embedding(None, 10 - 10 * gamma, models.GAMMA_DIM)


def text(nets: Nets, tokens: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict | None]:
    """(hidden states, added_cond_kwargs), as a UNet takes them."""
    if len(nets.text_encoders) == 1:
        return nets.text_encoders[0](tokens["input_ids"]).last_hidden_state, None
    states = [
        encoder(tokens[name], output_hidden_states=True)
        for encoder, name in zip(nets.text_encoders, ("input_ids", "input_ids_2"), strict=True)
    ]
    hidden = torch.cat([each.hidden_states[-2] for each in states], dim=-1)
    return hidden, {"text_embeds": states[1].text_embeds, "time_ids": tokens["time_ids"]}


def _frozen(net: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return net.eval().requires_grad_(False).to(dtype)


def _unet(config: Mapping, params: Mapping) -> diffusers.UNet2DConditionModel:
    return _filled(diffusers.UNet2DConditionModel, config, params)


def _vae(config: Mapping, params: Mapping) -> diffusers.AutoencoderKL:
    return _filled(diffusers.AutoencoderKL, config, params)


def _filled(kind: type, config: Mapping, params: Mapping) -> Any:
    net = _empty(lambda: kind(**config))
    net.load_state_dict(_tensors(params), assign=True)
    return net.to(DEVICE, memory_format=torch.channels_last)


def _text_encoder(config: Mapping, params: Mapping) -> torch.nn.Module:
    described = transformers.CLIPTextConfig(**config)
    projects = "CLIPTextModelWithProjection" in config.get("architectures", ())
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    net = kind(described)
    # transformers 5 leaves the prefix out of encoders without projection.
    tensors, names = _tensors(params), net.state_dict().keys()
    if not any(name.startswith("text_model.") for name in names):
        tensors = {name.removeprefix("text_model."): each for name, each in tensors.items()}
    wrong = {name for name in names if not name.endswith("position_ids")} ^ tensors.keys()
    assert not wrong, f"text encoder: {sorted(wrong)[:3]}"
    net.load_state_dict(tensors, strict=False)
    return net.to(DEVICE)


def _empty(make: Any) -> Any:
    """A network without memory, which its tensors then bring along."""
    with torch.device("meta"):
        return make()


def _tensors(params: Mapping) -> dict[str, torch.Tensor]:
    """Copies, since jax and torch both change theirs in place."""
    return {
        name: torch.from_numpy(np.array(tensor, order="C"))
        for name, tensor in translate.to_tensors(params).items()
    }


def _lora(size: models.Size, start: models.Start) -> diffusers.UNet2DConditionModel:
    """PEFT's adapters on the teacher's network, and the layer that takes gamma."""
    import peft

    additions = _tensors(start.student)
    gamma_layer = "time_embedding.cond_proj.weight"
    base = {**_tensors(start.teacher), gamma_layer: additions.pop(gamma_layer)}
    config = {**size.model.unet.config, "time_cond_proj_dim": models.GAMMA_DIM}
    net = _empty(lambda: diffusers.UNet2DConditionModel(**config))
    net.load_state_dict(base, assign=True)
    net.requires_grad_(False)
    targets = sorted({name.partition(".lora_")[0] for name in additions})
    net.add_adapter(
        peft.LoraConfig(r=size.lora.rank, lora_alpha=size.lora.alpha, target_modules=targets)
    )
    named = {
        name.replace("lora_down", "lora_A.default").replace("lora_up", "lora_B.default"): each
        for name, each in additions.items()
    }
    missing = net.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys[:3]
    net.time_embedding.cond_proj.requires_grad_(True)
    return net.to(DEVICE, memory_format=torch.channels_last)
