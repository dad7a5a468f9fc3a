"""The README's first hour: its commands and its Python, run as they stand there.

Installing is `make minimal`; training is tests/test_main.py; the page is tests/test_page.py.
"""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import shapes2d
from slam_jax.evaluation import classifier
from slam_jax.metrics import prompt_accuracy
from slam_jax.weights import embedded

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
documented = importlib.import_module("documented")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shows():
    """(picture, caption) -> whether the classifier of shapes2d finds all of it."""
    judge = classifier.extractor(classifier.read(ROOT / "assets" / "tiny_sd" / "classifier", 32))

    def answer(path, caption):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))[None]
        times = pixels.shape[1] // 32  # how much a small picture is enlarged
        pixels = pixels[:, ::times, ::times]
        assert pixels.shape == (1, 32, 32, 3)
        heads = classifier.heads(np.asarray(judge.apply(judge.prepare(pixels))["logits"]))
        labels = shapes2d.parse(caption).labels()[None]
        return prompt_accuracy.prompt_accuracy(heads, labels) == 1

    return answer


def _run(folder, *words):
    """What Python prints that is run there, where no file of the project is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=folder, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_picture_is_what_was_asked_for(shows, tmp_path):
    first = next(c for c in documented.commands(README) if "slam_jax.sample" in c)
    _, (_, *words) = documented.parts(first)
    assert "--model" not in words
    said = _run(tmp_path, *words)
    assert said == (
        "out.png: drawn in 4 steps by the embedded student, which knows two coloured shapes and no "
        "more\n"
    )
    caption = words[words.index("--prompt") + 1]
    assert shows(tmp_path / "out.png", caption)
    assert not shows(tmp_path / "out.png", "a green cross left of a yellow triangle")


def test_torch_draws_a_student_as_the_readme_says(shows, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "student").symlink_to(embedded.FOLDER)
    [block] = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    _run(tmp_path, "-c", block)
    assert shows(tmp_path / "torch.png", re.search(r'"(an? .*? an? .*?)"', block)[1])


def test_numbered_pictures_name_the_student_that_drew_them(tmp_path):
    _run(tmp_path, "-m", "slam_jax.sample", "--prompt=a red circle", "--steps=1", "--out=many")
    with Image.open(tmp_path / "many" / "000000.png") as picture:
        assert json.loads(picture.text["slam_jax"])["model"] == str(embedded.FOLDER)


def test_the_embedded_student_is_installed_with_the_package():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = tables["tool"]["setuptools"]["package-data"]["slam_jax"]
    installed = {path for pattern in patterns for path in (ROOT / "slam_jax").glob(pattern)}
    files = {path for path in embedded.FOLDER.rglob("*") if path.is_file()}
    assert len(files) > 8 and files <= installed


def test_its_card_says_how_it_was_made():
    card = (embedded.FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert any("configs/tiny.py" in command for command in documented.commands(card))
    assert re.search(r"commit [0-9a-f]{40}", card)
