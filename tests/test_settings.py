"""Configs: every key is there, of its type, and read."""

import pathlib
import re
import runpy

import pytest

from slam_jax import settings
from slam_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _config(path=ROOT / "configs" / "tiny.py"):
    return runpy.run_path(str(path))["get_config"]().to_dict()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_complete(path):
    config = _config(path)
    assert settings.as_dict(settings.from_config(config)) == config


def test_every_setting_is_read():
    modules = ("train", "program", "loop", "evaluation/final", "experiment", "main")
    source = "".join((ROOT / "slam_jax" / f"{name}.py").read_text() for name in modules)
    unread = []
    for group, kind in settings.Settings.__annotations__.items():
        if f"**settings.{group}._asdict()" in source:
            continue
        for name in getattr(kind, "_fields", ("",)):
            # _method and _dataset take the group itself, under its own name.
            path = rf"\b{group}\.{name}\b" if name else rf"\bsettings\.{group}\b"
            if not re.search(path, source):
                unread.append(f"{group}.{name}")
    assert not unread


def test_whole_numbers_and_lists_are_taken_for_floats_and_tuples():
    config = _config()
    config["distill"] |= {"w": 7, "gamma": ["mixture", 0.5]}
    found = settings.from_config(config).distill
    assert found.w == 7.0 and isinstance(found.w, float) and found.gamma == ("mixture", 0.5)


@pytest.mark.parametrize(
    "group, key, value",
    [
        ("distill", "w", "8"), ("distill", "length", 20.0), ("student", "remat", True),
        ("data", "num_images", True), ("eval", "prompts", "a cat"), ("teacher", "variant", None),
    ],
)  # fmt: skip
def test_values_of_other_types_are_refused(group, key, value):
    config = _config()
    config[group][key] = value
    with pytest.raises(UserError, match=rf"config\.{group}\.{key}={re.escape(repr(value))} must"):
        settings.from_config(config)


@pytest.mark.parametrize("key", ["eval.prompts", "student.lora.targets"])
def test_texts_are_strings(key):
    config = _config()
    *groups, name = key.split(".")
    group = config
    for each in groups:
        group = group[each]
    group[name] = ("a cat", 3)
    with pytest.raises(UserError, match=rf"config\.{re.escape(key)}=.* must be strings"):
        settings.from_config(config)
