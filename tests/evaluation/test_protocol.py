"""Protocol files, and the hash that stands beside every number."""

import pathlib
import re
import runpy

import pytest

from slam_jax import settings
from slam_jax.errors import UserError
from slam_jax.evaluation import final, prompts, protocol
from slam_jax.evaluation.protocol import Hashed

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "eval").glob("*.py"))
HASHED = Hashed("captions", ("network",), "references")


def _config(path=ROOT / "configs" / "eval" / "tiny.py"):
    return runpy.run_path(str(path))["get_config"]().to_dict()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_complete_and_consistent(path):
    config = _config(path)
    assert settings.as_dict(protocol.from_config(config)) == config


def test_a_run_of_the_demo_ends_with_the_tiny_protocol():
    run = settings.from_config(_config(ROOT / "configs" / "tiny.py"))
    tiny = protocol.from_config(_config())
    ours = final.of_run(run)
    assert protocol.digest(ours, HASHED) == protocol.digest(tiny, HASHED)
    assert (
        ours.reference == tiny.reference
        and ours.prompts._replace(sha256=tiny.prompts.sha256) == tiny.prompts
    )
    assert ours.comparison._replace(models=tiny.comparison.models) == tiny.comparison
    assert prompts.choose(tiny.prompts, None).sha256 == tiny.prompts.sha256


# What changes a number, and what does not.
CHANGES = {
    "seed": 2, "metrics": ("fid",), "kid_subset": 16, "bootstrap": 10, "images.size": 64,
    "images.resize": 16, "images.filter": "bicubic",
}  # fmt: skip
FREE = {
    "comparison.batch_size": 3, "comparison.models": ("a",), "comparison.w": (1.0,),
    "features.weights": "elsewhere", "reference.file": "elsewhere", "clip.model": "",
}  # fmt: skip


def _changed(values):
    config = _config()
    for name, value in values.items():
        *group, key = name.split(".")
        (config[group[0]] if group else config)[key] = value
    return protocol.from_config(config)


def test_the_hash_depends_on_what_changes_a_number_alone():
    before = protocol.digest(_changed({}), HASHED)
    assert re.fullmatch("[0-9a-f]{12}", before)
    digests = [protocol.digest(_changed({name: value}), HASHED) for name, value in CHANGES.items()]
    digests += [
        protocol.digest(_changed({}), HASHED._replace(**{field: value}))
        for field, value in {"prompts": "x", "networks": ("x",), "reference": "x"}.items()
    ]
    assert len({before, *digests}) == 1 + len(digests)
    for name, value in FREE.items():
        assert protocol.digest(_changed({name: value}), HASHED) == before, name


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("sed", 1, r"protocol\.sed is not known"),
        ("seed", 2**32, "less than 2"),
        ("seed", "1", r"protocol\.seed='1' must be of type int"),
        ("metrics", ("fid", "is"), "'is' is not known; there are 'fid'"),
        ("metrics", (), "metrics '' is not known"),
        ("prompts.source", "imagenet", "'imagenet' is not known"),
        ("prompts.count", 1, r"prompts\.count 1 must be an integer of at least 2"),
        ("images.filter", "box", "'box' is not known"),
        ("images.resize", 0, r"images\.resize 0 must be"),
        ("features.mode", "clean", r"features\.mode 'clean' is not known; there are ''"),
        ("features.network", "inception", r"features\.mode '' .*'clean', 'legacy'"),
        ("reference.crop", "random", "'random' is not known"),
        ("reference.count", 0, "shapes2d has no end"),
        ("comparison.student_steps", (4, 0), "steps 0 must be"),
        ("comparison.spacing", "karras", "'karras' is not known"),
        ("comparison.attention", "flash2", "there are 'xla', 'flash', 'cudnn'"),
        ("clip.model", "folder", r"clip\.model 'folder': give clip and its network, or neither"),
        ("metrics", ("fid", "clip"), r"clip\.model '': give clip and its network"),
    ],
)
def test_what_cannot_be_is_refused(name, value, said):
    with pytest.raises(UserError, match=said):
        _changed({name: value})


def test_prompt_accuracy_is_for_captions_of_shapes2d():
    with pytest.raises(UserError, match="prompt_accuracy"):
        _changed({"prompts.source": "lines"})
