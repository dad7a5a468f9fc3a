"""Prompts as the arrays that a model's text encoders read."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from slam_jax.data import tokenizer
from slam_jax.errors import UserError


class Tokenizers(NamedTuple):
    """A model's tokenizer, and SDXL's second one."""

    first: tokenizer.Tokenizer
    second: tokenizer.Tokenizer | None

    def encode(
        self, prompts: list[str], image_size: tuple[int, int]
    ) -> dict[str, Int32[np.ndarray, "B _"]]:
        """Tokens of every prompt, "input_ids"; what does not fit is dropped (cut says what).

        For SDXL also "input_ids_2" and "time_ids", those of a whole image of that height and
        width.
        """
        encoded = {"input_ids": self.first.encode(prompts)}
        if self.second is not None:
            encoded["input_ids_2"] = self.second.encode(prompts)
            encoded["time_ids"] = np.tile(whole_image(*image_size), (len(prompts), 1))
        return encoded

    def encode_one(
        self, prompt: str, time_ids: Int32[np.ndarray, "6"]
    ) -> tuple[dict[str, Int32[np.ndarray, "_"]], bool]:
        """The same as one row, for a picture of those sizes; and whether some was dropped."""
        ids, cut = self.first.encode_with_cut([prompt])
        encoded = {"input_ids": ids[0]}
        if self.second is not None:
            encoded["input_ids_2"] = self.second.encode([prompt])[0]
            encoded["time_ids"] = time_ids
        return encoded, bool(cut[0])

    def cut(self, prompts: list[str]) -> list[str]:
        """For every prompt the end of its text that does not fit, "" if all does."""
        return self.first.encode_with_cut(prompts)[1]


def read(folder: Path, folder_2: Path | None) -> Tokenizers:
    """The tokenizers in those folders. UserError if one is broken or they differ in length."""
    first = tokenizer.Tokenizer.from_folder(folder)
    if folder_2 is None:
        return Tokenizers(first, None)
    second = tokenizer.Tokenizer.from_folder(folder_2)
    if first.length != second.length:
        raise UserError(
            f"{folder} gives {first.length} tokens (model_max_length) and {folder_2} "
            f"{second.length}; SDXL needs as many of both: copy both folders from one model"
        )
    return Tokenizers(first, second)


def fingerprints(tokenizers: Tokenizers) -> tuple[str, ...]:
    """sha256 of all that the ids of the tokenizer, and of SDXL's second one, depend on."""
    return tuple(_fingerprint(each) for each in tokenizers if each is not None)


def _fingerprint(each: tokenizer.Tokenizer) -> str:
    special = (each.bos, each.eos, each.pad, each.length)
    return hashlib.sha256(f"{special} {each.backend.to_str()}".encode()).hexdigest()


def whole_image(height: int, width: int) -> Int32[np.ndarray, "6"]:
    """SDXL's time_ids of an image that is neither resized nor cropped; sizes in pixels.

    Original height and width, the crop's top and left, target height and width.
    """
    return np.array([height, width, 0, 0, height, width], np.int32)
