"""CLIP's byte-level BPE tokenizer, read from a model folder's tokenizer/.

Both forms are read: vocab.json + merges.txt, as the hub's Stable Diffusion folders have them,
and tokenizer.json, as transformers 5 writes it; tokenizer.json wins where both lie there, as in
transformers. tokenizer_config.json (and, in the older form, special_tokens_map.json) name the
special tokens and the length.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers

from slam_jax.errors import UserError

_WORD_END = "</w>"
# How CLIP cuts text into words before BPE; contractions and single digits are words.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# In the order in which transformers registers them: the last of two equal ones counts.
_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_DEFAULT_LENGTH = 77
_UNSET_LENGTH = 10**6  # transformers writes 1e30 for "no limit was given"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids: <start> text <end>, padded to `length`."""

    backend: tokenizers.Tokenizer
    bos: int
    eos: int
    pad: int
    length: int

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "Tokenizer":
        """Reads a tokenizer folder; UserError naming the file that is missing or broken."""
        folder = pathlib.Path(folder)
        config = _read_config(folder)
        model = _read_model(folder)
        named = {name: _token(folder, config.get(name) or _SPECIAL[name]) for name in _SPECIAL}
        added = _added_tokens(folder, config, model, {t.content for t in named.values()})
        _check_whole(model, {t.content for t in (*named.values(), *added.values())})
        backend = _build(model, unknown=named["unk_token"].content)
        _register(folder, backend, added, named)
        bos, eos, pad = (
            backend.token_to_id(named[name].content)
            for name in ("bos_token", "eos_token", "pad_token")
        )
        return cls(backend, bos, eos, pad, _length(folder, config))

    def encode(self, prompts: list[str]) -> Int32[np.ndarray, "B L"]:
        """Ids of every prompt; what does not fit is dropped (encode_with_cut says what)."""
        return self.encode_with_cut(prompts)[0]

    def encode_with_cut(self, prompts: list[str]) -> tuple[Int32[np.ndarray, "B L"], list[str]]:
        """Ids, and for every prompt the end of its text that did not fit, "" if all did."""
        room = self.length - 2
        ids = np.full((len(prompts), self.length), self.pad, np.int32)
        cut = []
        for row, prompt in zip(ids, prompts, strict=True):
            encoding = self.backend.encode(prompt, add_special_tokens=False)
            kept = encoding.ids[:room]
            row[: len(kept) + 2] = [self.bos, *kept, self.eos]
            cut.append(prompt[encoding.offsets[room][0] :] if len(encoding.ids) > room else "")
        return ids, cut


class _Model(NamedTuple):
    vocab: dict[str, int]
    merges: list[tuple[str, ...]]
    added: list[dict]  # tokenizer.json's added_tokens
    vocab_file: pathlib.Path
    merges_file: pathlib.Path


def _build(model: _Model, unknown: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=model.vocab,
            merges=model.merges,
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix=_WORD_END,
        )
    )
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    return backend


def _register(
    folder: pathlib.Path,
    backend: tokenizers.Tokenizer,
    added: dict[int, tokenizers.AddedToken],
    named: dict[str, tokenizers.AddedToken],
) -> None:
    """Makes the backend find added and special tokens in the text before BPE."""
    for index, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"{folder}: the added token {token.content!r} should have id {index}, but comes to "
                f"{backend.token_to_id(token.content)}; copy the whole folder again"
            )
    known = {token.content for token in added.values()}
    for name, token in named.items():
        if backend.token_to_id(token.content) is None:
            raise UserError(
                f"{folder}: the vocabulary has no token {token.content!r}, which is to be the "
                f"{name}; copy all files of the folder again from one model"
            )
        if token.content not in known:
            backend.add_special_tokens([token])


def _read_config(folder: pathlib.Path) -> dict:
    """tokenizer_config.json, and in the older form special_tokens_map.json over it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the tokenizer folder of a model")
    config = {}
    if (folder / "tokenizer_config.json").exists():
        config = _read_json(folder / "tokenizer_config.json")
    special = folder / "special_tokens_map.json"
    if special.exists() and "added_tokens_decoder" not in config:
        config = config | _read_json(special)
    return config


def _read_model(folder: pathlib.Path) -> _Model:
    if (folder / "tokenizer.json").exists():
        return _read_tokenizer_json(folder / "tokenizer.json")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab, merges):
        if not path.exists():
            raise UserError(
                f"{path} is missing; a tokenizer folder has vocab.json and merges.txt, or "
                "tokenizer.json: copy them from the model"
            )
    return _Model(_read_json(vocab), _read_merges(merges), [], vocab, merges)


def _read_tokenizer_json(path: pathlib.Path) -> _Model:
    content = _read_json(path)
    model = content.get("model")
    is_bpe = isinstance(model, dict) and isinstance(model.get("vocab"), dict)
    if not is_bpe or model.get("end_of_word_suffix") != _WORD_END:
        raise UserError(f"{path} is not CLIP's BPE tokenizer; give a Stable Diffusion tokenizer")
    # older files write "a b", newer ones ["a", "b"]
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])
    ]
    return _Model(model.get("vocab", {}), merges, content.get("added_tokens") or [], path, path)


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [tuple(line.split(" ")) for line in lines if line.strip()]


def _check_whole(model: _Model, special: set[str]) -> None:
    """UserError unless merges make exactly the vocabulary's longer tokens."""
    vocab, merges = model.vocab_file, model.merges_file
    if not model.vocab or not all(isinstance(i, int) for i in model.vocab.values()):
        raise UserError(f"{vocab} is not a vocabulary of token to id; copy it again")
    made = set(special)
    for pair in model.merges:
        made.add("".join(pair))
        if len(pair) != 2 or any(token not in model.vocab for token in (*pair, "".join(pair))):
            raise UserError(
                f"{merges}: the merge {' '.join(pair)!r} does not fit the vocabulary in "
                f"{vocab.name}; copy both again from one model"
            )
    for token in model.vocab:
        if len(token.removesuffix(_WORD_END)) > 1 and token not in made:
            raise UserError(
                f"{merges}: no merge makes the token {token!r} of {vocab.name}, as if the file "
                "were cut short; copy both again from one model"
            )


def _added_tokens(
    folder: pathlib.Path, config: dict, model: _Model, named: set[str]
) -> dict[int, tokenizers.AddedToken]:
    """Tokens found before BPE, by id: special ones, and words that a fine-tune has added."""
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"].items()
        return {int(index): _token(folder, value) for index, value in decoder}
    added = {value.get("id"): _token(folder, value) for value in model.added}
    if (folder / "added_tokens.json").exists():
        for content, index in _read_json(folder / "added_tokens.json").items():
            special = content in named
            added[index] = tokenizers.AddedToken(content, special=special, normalized=not special)
    return added


def _token(folder: pathlib.Path, value: str | dict) -> tokenizers.AddedToken:
    """A special token as the json files write it: its text, or an object with its flags."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{folder}: {value!r} is not a special token; copy its json files again")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: value[name] for name in flags if name in value}
    return tokenizers.AddedToken(value["content"], **{"special": True, **flags})


def _length(folder: pathlib.Path, config: dict) -> int:
    length = config.get("model_max_length") or _DEFAULT_LENGTH
    if not isinstance(length, int) or length < 3:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: model_max_length {length!r} must be an integer "
            f"of at least 3; Stable Diffusion's is {_DEFAULT_LENGTH}"
        )
    return length if length < _UNSET_LENGTH else _DEFAULT_LENGTH


def _read_json(path: pathlib.Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; copy it again")
    return content
