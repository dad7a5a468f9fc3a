"""The page that a run leaves: whole, alone, and with what the run's files say."""

import base64
import html.parser
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from slam_jax import run_report
from slam_jax.errors import UserError
from slam_jax.evaluation import table
from slam_jax.evaluation.table import Protocol, Row, Score

ROWS = [
    Row("teacher|<x>", "ddim", steps, 8.0, 2 * steps, 0.1, 64, {"FID": Score(value, 0.5)})
    for steps, value in ((50, 10.0), (4, 31.25))
]


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.texts, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture
def run(tmp_path):
    """A run killed once, rolled back once, with 12 sample grids and a cut last line."""
    workdir = tmp_path / "run<1>"
    (workdir / "samples").mkdir(parents=True)
    config = {
        "num_steps": 40, "batch_size": 8, "teacher": {"model": "a/model"},
        "data": {"source": "photos"}, "eval": {"prompts": ["a <b>"]},
    }  # fmt: skip
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": n, "loss": 1 / n, "grad_norm": 2.0, "update_norm": 0.1,
         "images_per_second": 5.0 * n, "bad_samples": 1, "filtered_samples": 0,
         "skipped_updates": n % 2}
        for n in range(1, 13)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 13, "lo')
    (workdir / "revision.txt").write_text("2026-01-01 abc\n2026-01-02 def\n")
    (workdir / "rollbacks.jsonl").write_text('{"step": 9, "back_to": 5, "offset": 4}\n')
    bad = {"step": 1, "shard": "a.tar", "key": "k", "reason": "no picture"}
    (workdir / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    (workdir / "bad_samples.1.jsonl").write_text(json.dumps(bad) + "\n")
    for n in range(1, 13):
        pixels = np.full((30, 20, 3), n, np.uint8)
        Image.fromarray(pixels).save(workdir / "samples" / f"step_{n:06d}.png")
    return workdir


def _read(run):
    page = _Page()
    page.feed(run_report.write(run).read_text())
    page.close()
    assert not page.open
    return page


def test_the_page_tells_what_the_files_say(run):
    (run / "results.json").write_text(table.as_json(ROWS, Protocol("p", "0123456789"), "today"))
    (run / "student").mkdir()
    page = _read(run)
    for text in (
        "a/model distilled: run<1>", "12 of 40", "32.5", "photos", "teacher|<x>", "31.25 ± 0.50",
        "Protocol p, hash 0123456789.", "2026-01-02", "def", "a.tar", "no picture", '["a <b>"]',
    ):  # fmt: skip
        assert text in page.texts, text
    shown = iter(page.texts)
    for name, value in (("starts in all", "2"), ("dropped updates", "6"), ("bad samples", "2")):
        assert name in shown and next(each for each in shown if each) == value
    steps = [text for text in page.texts if text.startswith("Step ")]
    assert steps[-1] == "Step 12" and 4 <= len(steps) <= 8
    assert page.links.count("student/") == 1
    pictures = [link for link in page.links if link != "student/"]
    assert all(link.startswith("data:image/") for link in pictures)
    last = base64.b64decode(pictures[-1].partition(",")[2])
    assert abs(int(np.asarray(Image.open(io.BytesIO(last))).mean()) - 12) <= 2


def test_a_run_that_just_began_and_damaged_files_do_not_stop_it(run):
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("config.json", "step_000012.png"):
            path.unlink()
    (run / "samples" / "step_000012.png").write_bytes(b"no picture")
    (run / "results.json").write_text('[{"name": "of an old version"}]')
    texts = _read(run).texts
    assert "0 of 40" in texts and "not written yet" in texts
    assert any("step_000012.png cannot be read" in text for text in texts)
    assert any("results.json cannot be shown" in text for text in texts)


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        run_report.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_program_says_where_it_is(run):
    done = subprocess.run(
        [sys.executable, "-m", "slam_jax.report", f"--workdir={run}"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html"), done.stderr


def test_results_are_read_as_they_were_written():
    text = table.as_json(ROWS, Protocol("p", "0123456789"), "today")
    assert table.from_json(text) == (ROWS, Protocol("p", "0123456789"))
