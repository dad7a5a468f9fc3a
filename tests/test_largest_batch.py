"""The largest batch that fits, of a step whose memory is known."""

import json
import pathlib
import sys

import pytest

from benchmarks import largest_batch
from slam_jax.runtime import topologies

ROOT = pathlib.Path(__file__).parents[1]


def test_the_largest_batch_fits_and_one_more_does_not(monkeypatch, capsys):
    """20 GB without an image, 2.5 GB each; 92 % of the memory may be used."""
    asked = []

    def memory(chosen, images, topology):
        asked.append((chosen.attention, chosen.student.remat, images, topology))
        return 20e9 + 2.5e9 * images

    monkeypatch.setattr(largest_batch, "memory", memory)
    arguments = ["--config", str(ROOT / "configs/sd15.py"), "--images", "2", "5"]
    monkeypatch.setattr(sys, "argv", ["largest_batch.py", *arguments])
    largest_batch.main()
    *_, table, line = capsys.readouterr().out.splitlines()
    assert asked == [("cudnn", "all", 2, "h200"), ("cudnn", "all", 5, "h200")]
    # 22.08, 36.8, 73.6 and 129.72 GB.
    assert table == "24: 0  40: 6  80: 21  141: 43"
    assert json.loads(line)["largest"] == {"24": 0, "40": 6, "80": 21, "141": 43}


def test_a_tpu_has_its_own_kernel_and_remat_may_be_chosen(monkeypatch):
    asked = []

    def memory(chosen, images, topology):
        asked.append((chosen.attention, chosen.student.remat, topology))
        return 1e9 * images

    monkeypatch.setattr(largest_batch, "memory", memory)
    arguments = ["--config", str(ROOT / "configs/sd15.py"), "--topology", "v5p:1x1x1"]
    monkeypatch.setattr(sys, "argv", ["largest_batch.py", *arguments, "--remat", "none"])
    largest_batch.main()
    assert asked == 2 * [("flash", "none", "v5p:1x1x1")]


def test_without_libtpu_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(topologies, "_version", lambda package: "")
    arguments = ["--config", str(ROOT / "configs/sd15.py"), "--topology", "v5p:1x1x1"]
    monkeypatch.setattr(sys, "argv", ["largest_batch.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        largest_batch.main()
    assert "pip install 'slam_jax[tpu-topology]'" in capsys.readouterr().err.splitlines()[-1]
