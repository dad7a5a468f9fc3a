"""LDM's names, which A1111 and ComfyUI share, of the tensors that we call as diffusers does.

LDM numbers the UNet's blocks in the order in which they run and the VAE's decoder levels from the
finest on, so a name depends on the config. Each function returns a table of modules, or of whole
names, to be used with `rename`; what stands below a module in it has the same name in both.
"""

import re
from collections.abc import Mapping

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_IMAGE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    # Three tensors of ours, of one name there: see weights/ldm.py.
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
}

# What files also hold and no network of ours uses: buffers, averages, a VAE's training loss, and
# the parts of the text encoders that Stable Diffusion never runs.
_IGNORED = re.compile(
    r"""
    (alphas|sqrt_alphas|sqrt_one_minus_alphas|log_one_minus_alphas)_cumprod | alphas_cumprod_prev
    | sqrt_recip(m1)?_alphas_cumprod | betas | denoiser\.sigmas | logvar | lvlb_weights
    | posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2) | scale_factor
    | model_ema\..* | first_stage_model\.(loss|model_ema)\..*
    | (cond_stage_model|conditioner\.embedders\.[01])\..*\b(position_ids|logit_scale|attn_mask)
    | cond_stage_model\.(logit_scale | model\.text_projection)
    """,
    re.VERBOSE,
)

# Some files of 2022 lack transformers' "text_model."; A1111 too puts it there.
_BARE_CLIP = re.compile(
    r"(?<=^cond_stage_model\.transformer\.)(?=embeddings|encoder|final_layer_norm)"
)


def unet(layers_per_block: tuple[int, ...], up_attention: tuple[bool, ...]) -> dict[str, str]:
    """Our UNet's modules -> LDM's.

    layers_per_block: residual blocks of each level on the way down, finest level first.
    up_attention: whether a level on the way up, coarsest first, has transformers.
    """
    modules = dict(_UNET)
    modules |= _resnet("mid_block.resnets.0", "middle_block.0")
    modules |= _resnet("mid_block.resnets.1", "middle_block.2")
    number = 1
    for i, num_resnets in enumerate(layers_per_block):
        for j in range(num_resnets):
            modules |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for i, num_resnets in enumerate(reversed(layers_per_block)):
        for j in range(num_resnets + 1):
            modules |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        # Upsampling is the last part of the level's last block, after a transformer if it has one.
        upsampling = f"output_blocks.{number - 1}.{2 if up_attention[i] else 1}.conv"
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = upsampling
    return modules


def vae(num_levels: int, layers_per_block: int) -> dict[str, str]:
    """Our VAE's modules -> LDM's."""
    modules = {"encoder.conv_norm_out": "encoder.norm_out"}
    modules["decoder.conv_norm_out"] = "decoder.norm_out"
    for half in ("encoder", "decoder"):
        ours, theirs = f"{half}.mid_block", f"{half}.mid"
        modules |= _vae_resnet(f"{ours}.resnets.0", f"{theirs}.block_1")
        modules |= _vae_resnet(f"{ours}.resnets.1", f"{theirs}.block_2")
        modules |= _within(f"{ours}.attentions.0", f"{theirs}.attn_1", _VAE_ATTENTION)
    for i in range(num_levels):
        down, up = f"encoder.down.{i}", f"decoder.up.{num_levels - 1 - i}"
        for j in range(layers_per_block + 1):
            modules |= _vae_resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"{down}.block.{j}")
            modules |= _vae_resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"{up}.block.{j}")
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = f"{down}.downsample"
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = f"{up}.upsample"
    return modules


def clip(num_layers: int) -> dict[str, str]:
    """OpenAI's text encoder has transformers' names, and so have we."""
    del num_layers
    return {}


def open_clip(num_layers: int) -> dict[str, str]:
    """Our text encoder's modules and tensors -> OpenCLIP's."""
    return _OPEN_CLIP | _open_clip_layers("text_model", "transformer", num_layers)


def open_clip_image(num_layers: int) -> dict[str, str]:
    """Our image tower's modules and tensors -> OpenCLIP's."""
    return _OPEN_CLIP_IMAGE | _open_clip_layers("vision_model", "visual.transformer", num_layers)


def _open_clip_layers(ours: str, theirs: str, num_layers: int) -> dict[str, str]:
    modules = {}
    for i in range(num_layers):
        layer, block = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
        modules |= _within(layer, block, _OPEN_CLIP_LAYER)
    return modules


def rename(name: str, modules: Mapping[str, str]) -> str:
    """`name` with the longest of its leading modules that `modules` has replaced by its entry."""
    head, tail = name, ""
    while head not in modules:
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
        if not head:
            return name
    return modules[head] + tail


def full_key(key: str) -> str:
    """`key` as today's files spell it."""
    return _BARE_CLIP.sub("text_model.", key)


def is_ignored(key: str) -> bool:
    """Whether a file may hold `key` though nothing of ours has it."""
    return _IGNORED.fullmatch(key) is not None


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return _within(ours, theirs, _UNET_RESNET)


def _vae_resnet(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}


def _within(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{inner}": f"{theirs}.{modules[inner]}" for inner in modules}
