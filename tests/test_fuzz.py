"""A small, fixed part of what `make fuzz` gives to all that reads files, options and prompts."""

import importlib
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
fuzz = importlib.import_module("fuzz")
FEW = 30  # inputs of each target


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(fuzz._audit)


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS))
def test_whatever_comes_is_read_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    fuzz.run(name, FEW, tmp_path, derandomize=True)


def test_what_a_reader_must_not_do_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="outside"), fuzz.watched(tmp_path / "inside"):
        (tmp_path / "outside").write_bytes(b"")
    with fuzz.watched(tmp_path):
        (tmp_path / "outside").write_bytes(b"")
