"""The log: no step twice and none missing after a resume; a bar that never freezes."""

import io
import json
import sys
import time
from collections import deque

import pytest
import tqdm

from slam_jax.runtime import log, weights_and_biases


def _steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / log.METRICS).read_text().splitlines()]


def _run(workdir, start, stop):
    nowhere = weights_and_biases.nowhere
    with log.bar(start, 10) as bar, log.started(workdir, start, nowhere, bar) as running:
        for step in range(start + 1, stop + 1):
            log.write(running, step, {"loss": 0.5 * step})
            log.advance(running.progress, batch_size=4, loss=0.5)


def test_resume_drops_the_lines_after_its_step(tmp_path):
    _run(tmp_path, 0, 6)
    _run(tmp_path, 4, 10)
    assert _steps(tmp_path) == list(range(1, 11))


def test_resume_drops_a_half_written_line(tmp_path):
    _run(tmp_path, 0, 3)
    with open(tmp_path / log.METRICS, "a") as file:
        file.write('{"step": 4, "lo')
    _run(tmp_path, 3, 5)
    assert _steps(tmp_path) == [1, 2, 3, 4, 5]


def test_starting_over_empties_the_file(tmp_path):
    _run(tmp_path, 0, 3)
    _run(tmp_path, 0, 1)
    assert _steps(tmp_path) == [1]


def test_lines_hold_the_values_and_events_are_written(tmp_path):
    _run(tmp_path, 0, 1)
    assert json.loads((tmp_path / log.METRICS).read_text()) == {"step": 1, "loss": 0.5}
    (events,) = (tmp_path / "events").iterdir()
    assert b"loss" in events.read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_the_bar_is_shown_on_a_terminal_alone(tmp_path, monkeypatch, screen):
    monkeypatch.setattr(sys, "stderr", screen)
    with log.bar(0, 10) as bar:
        with log.phase(bar, "drawing"):
            pass
        for _ in range(10):
            log.advance(bar, batch_size=4, loss=0.5)
        log.say(bar, "this is told anyhow")
    shown = screen.getvalue()
    assert "warning: this is told anyhow\n" in shown
    assert ("10/10 [00:00<00:00" in shown) == ("drawing" in shown) == screen.isatty()
    assert screen.isatty() or shown == "warning: this is told anyhow\n"


def _progress(screen):
    return log.Progress(tqdm.tqdm(total=100, file=screen, mininterval=0.3), deque(maxlen=32), [])


def test_phase_keeps_ticking():
    screen = io.StringIO()
    progress = _progress(screen)
    with log.phase(progress, "compiling the step"):
        time.sleep(1.5)
    assert screen.getvalue().count("compiling the step") >= 3
    progress.bar.close()


def test_images_per_second_and_the_time_to_come_leave_phases_out():
    progress = _progress(io.StringIO())
    progress.bar.mininterval = 0.0
    assert log.advance(progress, batch_size=4, loss=0.5) == 0
    for step in range(12):
        if step == 6:
            with log.phase(progress, "drawing samples"):
                time.sleep(0.7)
        time.sleep(0.02)
        rate = log.advance(progress, batch_size=4, loss=0.5)
    assert 4 / 0.1 < rate <= 4 / 0.02
    assert progress.bar.format_dict["rate"] > 10
    progress.bar.close()
