"""The tokenizer against transformers' CLIPTokenizer, on a small BPE of CLIP's layout."""

import collections
import functools
import json
import pathlib
import pickle
import re

import numpy as np
import pytest
import transformers

from slam_jax import errors
from slam_jax.data import tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CORPUS = (
    "a red circle above a blue square a green triangle left of an orange cross "
    "a photograph of an astronaut riding a horse it's the dog's house they're "
    "a cat an owl on a white background the quick brown fox jumps over the lazy dog !! ... ?!"
)
PROMPTS = [
    "",
    " ",
    "a red circle above a blue square",
    "A Photograph OF an ASTRONAUT, riding a horse!!!",
    "it's the dog's house; they're here, I'd say we've won't we'll I'm",
    "12 dogs, 3.5 cats and 2024-01-31",
    "tabs\tand\nnewlines   and  spaces ",
    "naïve café, Ünïcödé, ÅÄÖ ß İstanbul",
    "decomposed: cafe\u0301 n\u0303",
    "日本語のテキスト и кириллица عربى",
    "emoji 🐶🐱 👩‍👩‍👧 flags 🇫🇷",
    "#hashtag @user $5.00 100% (parens) [brackets] {braces} <tag> a_b\\c/d ~`^|",
    "!",
    "wow! !! a!b",
    f"{END} x {START}y<|ENDOFTEXT|>",
    "half <|endoftext and </w> marks",
    "\x00\x07 control \u200b zero width",
    "a red circle " * 40,
    "🐶" * 90,
    "x" * 300,
    "a cat and " * 24 + "the tail that is cut",
]
FORMS = [("sd1", "hub"), ("sd1", "transformers5"), ("sd2", "hub"), ("sd2", "transformers5")]


def pairs_of(word: tuple) -> list[tuple[str, str]]:
    return list(zip(word, word[1:], strict=False))


def merged(word: tuple, pair: tuple[str, str]) -> tuple:
    out, i = [], 0
    while i < len(word):
        hit = word[i : i + 2] == pair
        out.append("".join(pair) if hit else word[i])
        i += 2 if hit else 1
    return tuple(out)


@functools.cache
def small_bpe(num_merges: int = 80) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout: 256 bytes, the same ending a word, merges, start, end."""
    words = collections.Counter(re.findall(r"'s|'re|\w+|[^\s\w]+", CORPUS))
    words = {(*w[:-1], w[-1] + "</w>"): n for w, n in words.items()}
    merges = []
    for _ in range(num_merges):
        counts = collections.Counter()
        for word, n in words.items():
            counts.update({pair: n * k for pair, k in collections.Counter(pairs_of(word)).items()})
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        words = {merged(word, best): n for word, n in words.items()}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*characters, *(c + "</w>" for c in characters)]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    tokens = list(dict.fromkeys(tokens))  # two merges may make the same token
    return {token: i for i, token in enumerate(tokens)}, merges


def write_hub_folder(folder: pathlib.Path, pad: str) -> None:
    vocab, merges = small_bpe()
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    flags = dict(lstrip=False, normalized=True, rstrip=False, single_word=False)
    start, end = dict(content=START, **flags), dict(content=END, **flags)
    special = dict(bos_token=start, eos_token=end, unk_token=end, pad_token=pad)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        name: {"__type": "AddedToken", **value} if isinstance(value, dict) else value
        for name, value in special.items()
    }
    config |= dict(model_max_length=77, do_lower_case=True, tokenizer_class="CLIPTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], pathlib.Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for family, pad in (("sd1", END), ("sd2", "!")):
        hub, saved = root / family, root / f"{family}_transformers5"
        write_hub_folder(hub, pad)
        transformers.CLIPTokenizer.from_pretrained(hub).save_pretrained(saved)
        assert not (saved / "vocab.json").exists()
        found |= {(family, "hub"): hub, (family, "transformers5"): saved}
    return found


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_matches_transformers(folders, form):
    ours = tokenizer.Tokenizer.from_folder(folders[form])
    theirs = transformers.CLIPTokenizer.from_pretrained(folders[form])
    ids = ours.encode(PROMPTS)
    reference = theirs(PROMPTS, padding="max_length", truncation=True, max_length=77).input_ids
    assert ids.dtype == np.int32 and ids.shape == (len(PROMPTS), 77)
    for prompt, row, expected in zip(PROMPTS, ids.tolist(), reference, strict=True):
        assert row == expected, prompt
    assert ours.pad == (theirs.get_vocab()[END] if form[0] == "sd1" else 0)


def test_says_what_was_cut(folders):
    ours = tokenizer.Tokenizer.from_folder(folders["sd1", "hub"])
    whole = " ".join(["a"] * 75)
    prompts = ["a cat", whole, whole + " Red\u00a0Circle, the end", "🐶" * 30]
    ids, cut = ours.encode_with_cut(prompts)
    assert cut[:3] == ["", "", "Red\u00a0Circle, the end"]
    assert prompts[3].endswith(cut[3]) and 0 < len(cut[3]) < 30
    np.testing.assert_array_equal(ids[1], ids[2])
    assert (ids[2, 0], ids[2, -1]) == (ours.bos, ours.eos)
    assert ours.encode([]).shape == (0, 77)


def edit_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_length_comes_from_the_folder(tmp_path):
    write_hub_folder(tmp_path / "t", END)
    edit_config(tmp_path / "t", model_max_length=16)
    assert tokenizer.Tokenizer.from_folder(tmp_path / "t").encode(["a cat"]).shape == (1, 16)
    edit_config(tmp_path / "t", model_max_length=int(1e30))  # transformers: "none was given"
    assert tokenizer.Tokenizer.from_folder(tmp_path / "t").length == 77
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "t" / name).unlink()
    ours = tokenizer.Tokenizer.from_folder(tmp_path / "t")
    assert (ours.length, ours.pad) == (77, ours.eos)


@pytest.mark.parametrize("form", ["hub", "transformers5"])
def test_words_that_a_fine_tune_added(folders, tmp_path, form):
    theirs = transformers.CLIPTokenizer.from_pretrained(folders["sd1", "hub"])
    theirs.add_tokens(["<my-cat>"])
    folder = tmp_path / "t"
    if form == "hub":
        write_hub_folder(folder, END)
        (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": len(theirs) - 1}))
    else:
        theirs.save_pretrained(folder)
    prompt = "a photograph of <my-cat> riding"
    row = tokenizer.Tokenizer.from_folder(folder).encode([prompt])[0].tolist()
    assert row == theirs(prompt, padding="max_length", max_length=77).input_ids
    assert len(theirs) - 1 in row


def test_travels_to_another_process(folders):
    ours = tokenizer.Tokenizer.from_folder(folders["sd2", "hub"])
    copy = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(copy.encode(PROMPTS), ours.encode(PROMPTS))


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(errors.UserError) as caught:
        tokenizer.Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(tmp_path, name):
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    write_hub_folder(tmp_path / "t", END)
    (tmp_path / "t" / name).unlink()
    assert str(tmp_path / "t" / name) in refusal(tmp_path / "t")


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, name, keep):
    write_hub_folder(tmp_path / "t", END)
    path = tmp_path / "t" / name
    content = path.read_bytes()
    path.write_bytes(content[: min(int(keep * len(content)), len(content) - 2)])
    assert str(path) in refusal(tmp_path / "t")


def test_merges_cut_at_the_end_of_a_line_are_noticed(tmp_path):
    write_hub_folder(tmp_path / "t", END)
    path = tmp_path / "t" / "merges.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert str(path) in refusal(tmp_path / "t")


def test_a_broken_or_foreign_tokenizer_json_is_named(folders, tmp_path):
    content = (folders["sd1", "transformers5"] / "tokenizer.json").read_text()
    path = tmp_path / "tokenizer.json"
    foreign = json.dumps({"model": {"type": "WordPiece", "vocab": {}}})
    for broken in (content[: len(content) // 2], "[]", "{}", foreign):
        path.write_text(broken)
        assert str(path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_max_length="long"), ["model_max_length", "long", "77"]),
        (dict(model_max_length=2), ["model_max_length", "2", "77"]),
        (dict(pad_token="<pad>"), ["<pad>", "pad_token"]),
        (dict(pad_token={"text": "x"}), ["special token"]),
        (dict(added_tokens_decoder={"9999": {"content": "<new>"}}), ["<new>", "9999"]),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, changes, words):
    write_hub_folder(tmp_path / "t", END)
    (tmp_path / "t" / "special_tokens_map.json").unlink()
    edit_config(tmp_path / "t", **changes)
    message = refusal(tmp_path / "t")
    assert str(tmp_path / "t") in message and all(word in message for word in words)
