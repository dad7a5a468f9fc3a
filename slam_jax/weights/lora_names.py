"""How LoRA files spell a module and the two halves of its addition."""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from slam_jax.nets import lora
from slam_jax.weights import names

ALPHA = "alpha"

# Before a module's name: in diffusers' and PEFT's files with dots, in kohya's all in underscores.
# Files of diffusers before 0.18 hold a UNet alone, without prefix.
_DOTTED = {
    "unet": ("unet.", ""),
    "text_encoder": ("text_encoder.",),
    "text_encoder_2": ("text_encoder_2.",),
}
_UNDERSCORED = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
PARTS = tuple(_DOTTED)

_HALF = re.compile(
    r"(?P<module>.+?)(\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<half>A|B|down|up)\.weight"
)
_HALVES = {"A": lora.DOWN, "down": lora.DOWN, "B": lora.UP, "up": lora.UP}

# The attention of text encoders in diffusers before 0.19.
_OLD_TEXT = re.compile(r"\.self_attn\.to_(q|k|v|out)$")

# LDM's name for a module whose own name diffusers cannot tell apart without its dots.
_KOHYA = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def parse(key: str) -> tuple[str, str] | None:
    """A tensor's key -> (its module as spelt there, DOWN, UP or ALPHA); None if it is no such."""
    if key.endswith(f".{ALPHA}"):
        return key.removesuffix(f".{ALPHA}"), ALPHA
    match = _HALF.fullmatch(key)
    return match and (match["module"], _HALVES[match["half"]])


def spellings(part: str, module: str, ldm_module: str) -> Iterator[str]:
    """Each way in which files spell that module of "unet", "text_encoder" or "text_encoder_2"."""
    for prefix in _DOTTED[part]:
        yield prefix + module
        yield prefix + module.removeprefix(names.TEXT_PREFIX)
    for prefix in _UNDERSCORED[part]:
        for name in (module, ldm_module):
            yield prefix + name.replace(".", "_")


def modern(module: str) -> str:
    """A module as today's files spell it, from attention processors' and older spellings."""
    module = module.replace(".processor.", ".")
    module = _OLD_TEXT.sub(lambda old: f".self_attn.{old[1]}_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module)


def to_diffusers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A UNet's tensors `MODULE.lora_down.weight`, `MODULE.lora_up.weight` as PEFT has them."""
    letters = {lora.DOWN: "lora_A", lora.UP: "lora_B"}
    return {
        f"unet.{module}.{letters[half]}.weight": tensors[f"{module}.{half}.weight"]
        for module, half in _modules(tensors)
    }


def to_kohya(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as kohya has them, with alpha = rank."""
    spelt = {}
    for module, half in _modules(tensors):
        name = "lora_unet_" + _KOHYA.get(module, module).replace(".", "_")
        spelt[f"{name}.{half}.weight"] = tensors[f"{module}.{half}.weight"]
        rank = tensors[f"{module}.{lora.DOWN}.weight"].shape[0]
        spelt[f"{name}.{ALPHA}"] = np.array(rank, np.float32)
    return spelt


def _modules(tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in tensors:
        module, half, _ = name.rsplit(".", 2)
        yield module, half
