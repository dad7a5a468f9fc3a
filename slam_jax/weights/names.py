"""What a parameter is called in a torch file: its path joined with dots, the leaf renamed.

The nets' submodules carry diffusers' names, so no table is needed; what older and newer
files spell differently is brought to those names here.
"""

import re

# Linen's leaf -> torch's. The last is a parameter of its own, in no layer: CLIP's extra patch.
LEAVES = {
    "kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
    "mean": "running_mean", "var": "running_var", "class_embedding": "class_embedding",
}  # fmt: skip

# A list's module is named with a dot by torch, with a line by Flax; linear_1 is no list's.
_FLAX_NUMBER = re.compile(r"(?<!^linear)_(\d+)$")

# transformers 4, and with it every text_encoder on the hub, puts this before all names but the
# projection's; transformers 5 leaves it out of encoders without projection, and reads both.
TEXT_PREFIX = "text_model."
TEXT_PROJECTION = "text_projection."

# The VAE's attention before diffusers 0.15, as in Stable Diffusion 1.x's own files.
_OLD_ATTENTION = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_ATTENTION = re.compile(r"\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight$")


def torch_name(path: tuple[str, ...]) -> str:
    """("down_blocks.0", "conv", "kernel") -> "down_blocks.0.conv.weight"."""
    *modules, leaf = path
    return ".".join([*modules, LEAVES[leaf]])


def from_flax(path: str) -> str:
    """A torch file's name of the array at `path` in a msgpack of diffusers' old Flax classes.

    "down_blocks_0/attentions_1/proj_in/kernel" -> "down_blocks.0.attentions.1.proj_in.weight".
    """
    *modules, leaf = path.split("/")
    torch_modules = [_FLAX_NUMBER.sub(r".\1", module) for module in modules]
    return ".".join([*torch_modules, LEAVES.get(leaf, leaf)])


def unet(name: str) -> str:
    """Our name of a UNet file's tensor: its own."""
    return name


def vae(name: str) -> str:
    """Our name of a VAE file's tensor; older attention names become today's."""
    return _OLD_ATTENTION.sub(lambda old: f".{_NEW_ATTENTION[old[1]]}.{old[2]}", name)


def text_encoder(name: str) -> str | None:
    """Our name of a text encoder file's tensor; None for the position_ids buffer, a mere arange."""
    name = name if name.startswith((TEXT_PREFIX, TEXT_PROJECTION)) else TEXT_PREFIX + name
    return None if name.endswith(".embeddings.position_ids") else name


def clip(name: str) -> str | None:
    """Our name of a CLIPModel file's tensor; None for position_ids and the logits' scale."""
    unused = name.endswith(".embeddings.position_ids") or name == "logit_scale"
    return None if unused else name


def is_vae_attention(name: str) -> bool:
    """Whether `name` is a matrix that some VAE files hold as a 1x1 convolution."""
    return _VAE_ATTENTION.search(name) is not None
