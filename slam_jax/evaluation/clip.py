"""CLIP score and HPSv2: embeddings of pictures and captions, all choices stated.

The score is metrics/clip_score.py's. Towers compute in float32; what is not the model's own choice
is the prefix that every caption is given, "" or such as "A photo of ".
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from slam_jax.data import clip_image, text_inputs, tokenizer
from slam_jax.errors import UserError
from slam_jax.evaluation.extractor import Extractor
from slam_jax.nets import clip as text_nets
from slam_jax.nets import clip_image as image_nets
from slam_jax.weights import clip as weights
from slam_jax.weights import fingerprint

_BATCH_SIZE = 256  # captions at a time

# Of what the Human Preference Score is a fine-tune: OpenCLIP's ViT-H/14.
_HPS_TEXT = {"hidden_size": 1024, "num_hidden_layers": 24, "projection_dim": 1024}
_HPS_IMAGE = {"hidden_size": 1280, "num_hidden_layers": 32, "patch_size": 14}
# Of OpenCLIP's model the repository has both, and a fine-tune's file beside them would be unused.
_WEIGHTS = ("model.safetensors", weights.OPEN_CLIP)


class Scorer(NamedTuple):
    """Both sides of a score; embeddings are not normalized.

    pictures: gives {"embedding": [B, P]}; its name and fingerprint are those of the whole score,
    captions and prefix included. captions: their embeddings, the prefix put before each; what is
    longer than the tokenizer's length (77 tokens) is cut.
    """

    pictures: Extractor
    captions: Callable[[Sequence[str]], Float32[np.ndarray, "N P"]]


def scorer(
    model: str, prefix: str, *, revision: str = "", place: Callable[[Any], Any] = jax.device_put
) -> Scorer:
    """The CLIP score of a model in the layout of transformers' CLIPModel.

    model: a folder, or ORG/NAME on the hub. place: puts the parameters on the devices where
    pictures will be. UserError for what is not there, not supported or does not fit together.
    """
    label = f"CLIP score, {Path(model).name}, prefix {prefix!r}"
    return _scorer(label, weights.read(weights.locate(model, revision)), prefix, place)


def hps_scorer(folder: str, *, place: Callable[[Any], Any] = jax.device_put) -> Scorer:
    """The Human Preference Score v2 (Wu et al. 2023) of a CLIP-H that was fine-tuned for it.

    As HPSv2's own program computes it, but x 100, as its papers' tables have it: the cosine
    without prefix. folder: on this machine, as weights/clip.py reads it.
    """
    found = weights.read(folder)
    if len(files := [name for name in _WEIGHTS if (Path(folder) / name).is_file()]) > 1:
        raise UserError(f"{folder} holds {' and '.join(files)}; remove what is not HPSv2's")
    for config, wanted in ((found.text.config, _HPS_TEXT), (found.image.config, _HPS_IMAGE)):
        for key, value in wanted.items():
            if config[key] != value:
                raise UserError(
                    f"{folder} has {key} {config[key]}, not {value}, so it is no ViT-H/14, "
                    "which HPSv2 fine-tunes; give an HPSv2 checkpoint, or score by CLIP"
                )
    return _scorer(f"HPSv2, {Path(folder).name}", found, "", place)


def _scorer(label: str, found: weights.CLIP, prefix: str, place: Callable[[Any], Any]) -> Scorer:
    preprocessing = clip_image.from_config(found.preprocessor)
    tokens = tokenizer.Tokenizer.from_folder(found.tokenizer)
    text_net = text_nets.from_config(found.text.config)
    image_net = image_nets.from_config(found.image.config)
    _check(found.tokenizer, preprocessing, tokens, text_net, image_net)
    pictures = Extractor(
        name=label,
        fingerprint=_fingerprint(found, preprocessing, tokens, prefix),
        prepare=partial(clip_image.prepare, preprocessing),
        apply=partial(_jitted(partial(_picture, image_net)), place(found.image.params)),
    )
    embed = partial(_jitted(partial(_text, text_net)), place(found.text.params))
    return Scorer(pictures, partial(_embed_captions, tokens, embed, prefix))


def _picture(net: image_nets.CLIPImageModel, params, pixels) -> dict[str, jax.Array]:
    return {"embedding": net.apply({"params": params}, pixels)}


def _text(net: text_nets.CLIPTextModel, params, ids) -> jax.Array:
    return net.apply({"params": params}, ids, method=net.states).pooled


def _jitted(embed: Callable) -> Callable:
    """In full float32, of which GPUs from Ampere on otherwise keep 10 bits in products."""

    def precise(*args):
        with jax.default_matmul_precision("highest"):
            return embed(*args)

    return jax.jit(precise)


def _embed_captions(
    tokens: tokenizer.Tokenizer, embed: Callable, prefix: str, captions: Sequence[str]
) -> Float32[np.ndarray, "N P"]:
    """Batch by batch, the last one filled up, so that it compiles once."""
    ids = tokens.encode([f"{prefix}{caption}" for caption in captions])
    size = min(_BATCH_SIZE, len(ids))
    batches = [
        jax.device_get(
            embed(jax.device_put(np.resize(ids[first : first + size], (size, ids.shape[1]))))
        )
        for first in range(0, len(ids), size)
    ]
    return np.concatenate(batches)[: len(ids)]


def _check(
    folder: Path,
    preprocessing: clip_image.Preprocessing,
    tokens: tokenizer.Tokenizer,
    text_net: text_nets.CLIPTextModel,
    image_net: image_nets.CLIPImageModel,
) -> None:
    """UserError unless pictures and token ids are what the towers take."""
    remedy = "take all files from one model's folder"
    if preprocessing.crop != image_net.image_size:
        raise UserError(
            f"{folder}: pictures are cut to {preprocessing.crop} pixels (crop_size), but the "
            f"image tower's image_size is {image_net.image_size}; {remedy}"
        )
    num_ids = tokens.backend.get_vocab_size()
    if num_ids > text_net.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {num_ids} tokens, but the text tower's vocab_size is "
            f"{text_net.vocab_size}; {remedy}"
        )
    # 2 stands for the highest id (nets/clip.py).
    end = num_ids - 1 if text_net.eos_token_id == 2 else text_net.eos_token_id
    if tokens.eos != end:
        raise UserError(
            f"{folder}: the tokenizer ends texts with id {tokens.eos}, but the text tower reads "
            f"its result where id {end} is (eos_token_id); {remedy}"
        )


def _fingerprint(
    found: weights.CLIP,
    preprocessing: clip_image.Preprocessing,
    tokens: tokenizer.Tokenizer,
    prefix: str,
) -> str:
    """sha256 of all that a score depends on but pictures and captions."""
    towers = {
        name: [tower.config, fingerprint.of_params(tower.params)]
        for name, tower in (("text", found.text), ("image", found.image))
    }
    stated = {
        **towers,
        "preprocessing": preprocessing,
        "tokenizer": text_inputs.fingerprints(text_inputs.Tokenizers(tokens, None)),
        "prefix": prefix,
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
