"""CLIP score from a folder, pictures and captions, against transformers from end to end."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from slam_jax.errors import UserError
from slam_jax.evaluation import clip
from slam_jax.metrics import clip_score
from slam_jax.runtime import mesh

CAPTIONS = ["a red cat!", "", "two dogs  on a SOFA", "x" * 90, "caf\u00e9"]


@pytest.fixture(scope="module")
def scorer(clip_folder):
    return clip.scorer(str(clip_folder), "A photo of ")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, 50, 37, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reference(clip_folder, pictures):
    """transformers' own embeddings, normalized, of the same pictures and captions."""
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)
    pixels = processor(list(pictures), return_tensors="pt").pixel_values
    tokens = transformers.CLIPTokenizer.from_pretrained(clip_folder)(
        [f"A photo of {caption}" for caption in CAPTIONS],
        padding="max_length", truncation=True, max_length=77, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def embed(scorer, pictures) -> np.ndarray:
    prepared = jax.device_put(scorer.pictures.prepare(pictures))
    return jax.device_get(scorer.pictures.apply(prepared))["embedding"]


def relative_error(ours, theirs) -> float:
    ours = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_embeddings_and_scores_match_transformers(scorer, pictures, reference):
    of_pictures, of_captions = embed(scorer, pictures), scorer.captions(CAPTIONS)
    assert of_pictures.shape == of_captions.shape == (5, 12)
    assert relative_error(of_pictures, reference[0]) <= 1e-5
    assert relative_error(of_captions, reference[1]) <= 1e-5
    cosines = 100 * (reference[0] * reference[1]).sum(axis=1)
    scores = clip_score.per_pair(of_pictures, of_captions)
    assert np.linalg.norm(scores - cosines) / np.linalg.norm(cosines) <= 1e-5
    # or any score would do: embeddings of random towers are alike
    assert cosines.std() > 1


def test_captions_come_in_batches_of_one_shape(scorer, monkeypatch):
    whole = scorer.captions(CAPTIONS)
    monkeypatch.setattr(clip, "_BATCH_SIZE", 2)
    np.testing.assert_allclose(scorer.captions(CAPTIONS), whole, rtol=1e-4, atol=1e-5)
    assert scorer.captions(CAPTIONS[:1]).shape == (1, 12)


def test_name_and_fingerprint_state_what_a_score_stands_on(clip_folder, scorer, tmp_path):
    assert scorer.pictures.name == f"CLIP score, {clip_folder.name}, prefix 'A photo of '"
    copied = shutil.copytree(clip_folder, tmp_path / "copied")
    assert clip.scorer(str(copied), "A photo of ").pictures.fingerprint == (
        scorer.pictures.fingerprint
    )
    found = {scorer.pictures.fingerprint, clip.scorer(str(copied), "").pictures.fingerprint}
    for file, old, new in (
        ("preprocessor_config.json", "}", ', "rescale_factor": 0.5}'),
        ("config.json", '"num_attention_heads": 2', '"num_attention_heads": 4'),
        ("tokenizer_config.json", "77", "76"),
    ):
        spoilt = shutil.copytree(clip_folder, tmp_path / file)
        text = (spoilt / file).read_text()
        (spoilt / file).write_text(new.join(text.rsplit(old, 1)))
        found.add(clip.scorer(str(spoilt), "").pictures.fingerprint)
    model = transformers.CLIPModel.from_pretrained(copied)
    with torch.no_grad():
        model.vision_model.embeddings.class_embedding[0] += 1
    model.save_pretrained(copied)
    found.add(clip.scorer(str(copied), "").pictures.fingerprint)
    assert len(found) == 6 and all(re.fullmatch("[0-9a-f]{64}", each) for each in found)


def test_products_are_of_full_precision_whatever_the_default(scorer, pictures):
    prepared = jax.device_put(scorer.pictures.prepare(pictures[:1]))
    apply = scorer.pictures.apply
    with jax.default_matmul_precision("default"):
        text = apply.func.lower(*apply.args, prepared).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*", text)
    assert products and all("HIGHEST" in product for product in products)


def test_parameters_go_where_they_are_placed(clip_folder, pictures):
    """And pictures spread over the devices are scored there."""
    devices = mesh.make((("data", -1),))
    place = functools.partial(jax.device_put, device=mesh.replicated(devices))
    rows = NamedSharding(devices, PartitionSpec("data"))
    spread = clip.scorer(str(clip_folder), "", place=place)
    prepared = spread.pictures.prepare(pictures[:4])
    out = spread.pictures.apply(jax.device_put(prepared, rows))["embedding"]
    assert out.sharding.is_equivalent_to(rows, 2)
    single = embed(clip.scorer(str(clip_folder), ""), pictures[:4])
    np.testing.assert_allclose(jax.device_get(out), single, rtol=1e-4, atol=1e-5)


def rewrite(path, tower: str | None, **changes) -> None:
    content = json.loads(path.read_text())
    (content if tower is None else content[tower]).update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, tower, changes, message",
    [
        (
            "preprocessor_config.json", None, {"crop_size": 16},
            r"cut to 16 pixels \(crop_size\), but the image tower's image_size is 24",
        ),
        (
            "config.json", "text_config", {"eos_token_id": 5},
            r"ends texts with id \d+, but the text tower reads its result where id 5 is",
        ),
        (
            "tokenizer_config.json", None, {"eos_token": "!"},
            r"ends texts with id \d+, but the text tower reads its result where id \d+ is",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(
    clip_folder, tmp_path, file, tower, changes, message
):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    rewrite(folder / file, tower, **changes)
    with pytest.raises(UserError, match=message):
        clip.scorer(str(folder), "")


def test_a_tokenizer_of_more_words_is_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "\u20ac": len(vocabulary)}))
    with pytest.raises(UserError, match="but the text tower's vocab_size is"):
        clip.scorer(str(folder), "")


def test_hpsv2_is_for_its_own_architecture_alone(clip_folder, tmp_path):
    with pytest.raises(UserError, match="hidden_size 16, not 1024, so it is no ViT-H/14"):
        clip.hps_scorer(str(clip_folder))
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors; remove what is not HPSv2's"):
        clip.hps_scorer(str(folder))
    pickle = tmp_path / "HPS_v2_compressed.pt"
    pickle.write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="pickle, which is never opened; convert it once"):
        clip.hps_scorer(str(pickle))


def test_hpsv2_is_the_cosine_without_prefix(clip_folder, pictures, monkeypatch):
    """Here of a small CLIP, as if it were the one that HPSv2 is made of."""
    monkeypatch.setattr(clip, "_HPS_TEXT", {})
    monkeypatch.setattr(clip, "_HPS_IMAGE", {})
    found, plain = clip.hps_scorer(str(clip_folder)), clip.scorer(str(clip_folder), "")
    np.testing.assert_array_equal(embed(found, pictures), embed(plain, pictures))
    np.testing.assert_array_equal(found.captions(CAPTIONS), plain.captions(CAPTIONS))
    assert found.pictures.name == f"HPSv2, {clip_folder.name}"
