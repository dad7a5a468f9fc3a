"""The README.md of an exported model: what it is, how to sample it, how it was made."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ADVICE = """\
Distilled with SPLAM (arXiv 2404.13903) by slam_jax. **Sample with guidance_scale=1 and 2 to 4
steps**: guidance was fixed in training, and a pipeline's default of 7.5 gives wrong images."""
_USAGE = """\
import diffusers, torch

pipe = diffusers.DiffusionPipeline.from_pretrained("THIS_FOLDER", torch_dtype=torch.{dtype})
pipe("a prompt", num_inference_steps=4, guidance_scale=1.0).images[0].save("out.png")"""
_LICENSE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)


def license_of(folder: Path) -> str | None:
    """The licence named at the head of a model folder's README.md; None if there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head = text.split("---")[1] if text.startswith("---") else ""
    found = _LICENSE.search(head)
    return found and found[1]


def card(
    *, base: str, base_license: str | None, step: int, weights: str, settings: Mapping[str, Any],
    dtype: str,
) -> str:  # fmt: skip
    """The text of README.md.

    base: the teacher, as the config names it. weights: "ema" or "online". settings: the run's
    whole config, nested. dtype: of the files.
    """
    header = [f"license: {base_license or 'other'}", "pipeline_tag: text-to-image"]
    if "/" in base and not Path(base).exists():
        header.append(f"base_model: {base}")
    distill, data = settings["distill"], settings["data"]
    return "\n".join(
        [
            "---", *header, "---", "",
            f"# A few-step student of {base}", "", _ADVICE, "",
            "```python", _USAGE.format(dtype=dtype), "```", "",
            f"- Weights: {weights}, after {step} updates of batch {settings['batch_size']}",
            f"- Guidance in training: guidance_scale {distill['w'] + 1:g} (w = {distill['w']:g})",
            f"- Data: {data['source']}, {data['size']} pixels",
            f"- Licence of the base model: {base_license or 'look it up, its folder names none'}",
            "", "Every setting of the run:", "", "```", *_lines(settings), "```", "",
        ]
    )  # fmt: skip


def _lines(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """key = value of every leaf."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {value!r}")
    return lines
