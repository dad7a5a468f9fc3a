"""What Weights & Biases is told, by a package of its name that writes it down (stand_ins/)."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.runtime import hosts, log, weights_and_biases

STAND_IN = pathlib.Path(__file__).parents[1] / "stand_ins" / "wandb.py"


@pytest.fixture(autouse=True)
def told(tmp_path, monkeypatch):
    """The file with what was told."""
    spec = importlib.util.spec_from_file_location("wandb", STAND_IN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def _calls(told, name):
    found = [json.loads(line) for line in told.read_text().splitlines()]
    return [call for call in found if call["call"] == name]


def _run(workdir, start, stop, project="student"):
    """Steps start + 1 to stop of a run, those of metrics.jsonl before; its warnings."""
    workdir.mkdir(exist_ok=True)
    warnings = []
    with (
        weights_and_biases.opened(project, workdir, {"seed": 0}, warnings.append) as track,
        log.bar(start, 10) as bar,
        log.started(workdir, start, track, bar) as running,
    ):
        for step in range(start + 1, stop + 1):
            log.write(running, step, {"loss": 0.5 * step})
    return warnings


def test_nothing_is_sent_unless_asked(tmp_path, told):
    assert _run(tmp_path / "run", 0, 2, project="") == []
    assert not told.exists() and not (tmp_path / "run" / "wandb.json").exists()


def test_the_first_host_alone_sends(tmp_path, told, monkeypatch):
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    assert _run(tmp_path / "run", 0, 2) == [] and not told.exists()


def test_numbers_and_pictures_come_with_their_step(tmp_path, told):
    with weights_and_biases.opened("student", tmp_path, {"a": {"b": 1}}, print) as track:
        track(3, {"loss": 0.5})
        track(3, {"samples": np.zeros((4, 6, 3), np.uint8)})
    (init,) = _calls(told, "init")
    assert (init["project"], init["name"], init["resume"]) == ("student", tmp_path.name, "allow")
    assert (init["config"], init["dir"]) == ({"a": {"b": 1}}, str(tmp_path))
    first, second = _calls(told, "log")
    assert (first["step"], first["values"]) == (3, {"loss": 0.5})
    assert (second["step"], second["values"]) == (3, {"samples": [4, 6, 3]})
    assert [call["exit_code"] for call in _calls(told, "finish")] == [0]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_is_the_same_and_tells_no_step_twice(tmp_path, told, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    for start, stop in ((0, 6), (4, 5), (4, 9)):
        assert _run(tmp_path / "run", start, stop) == []
    assert [call["step"] for call in _calls(told, "log")] == list(range(1, 10))
    assert len({call["id"] for call in _calls(told, "init")}) == 1


def test_a_run_that_goes_back_tells_no_step_twice(tmp_path, told):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with weights_and_biases.opened("student", workdir, {}, print) as track, log.bar(0, 10) as bar:
        for start, stop in ((0, 5), (2, 7)):
            with log.started(workdir, start, track, bar) as running:
                for step in range(start + 1, stop + 1):
                    log.write(running, step, {"loss": 0.5})
    assert [call["step"] for call in _calls(told, "log")] == list(range(1, 8))


def test_what_was_not_told_before_comes_first(tmp_path, told):
    """Of a run that is sent from its resumption on only."""
    _run(tmp_path / "run", 0, 3, project="")
    _run(tmp_path / "run", 2, 4)
    assert [(c["step"], c["values"]) for c in _calls(told, "log")] == [
        (step, {"loss": 0.5 * step}) for step in (1, 2, 3, 4)
    ]


def test_another_project_gets_a_run_of_its_own(tmp_path, told):
    _run(tmp_path / "run", 0, 2)
    _run(tmp_path / "run", 2, 3, project="other")
    one, other = _calls(told, "init")
    assert one["id"] != other["id"]


def test_a_failure_is_warned_of_once_and_made_up_for_later(tmp_path, told, monkeypatch):
    monkeypatch.setenv("FAILS", "3")
    (warning,) = _run(tmp_path / "run", 0, 6)
    assert warning.startswith("W&B gets nothing more of this run: BrokenPipeError: ")
    assert [call["step"] for call in _calls(told, "log")] == [1, 2]
    monkeypatch.delenv("FAILS")
    assert _run(tmp_path / "run", 6, 7) == []
    assert [call["step"] for call in _calls(told, "log")] == list(range(1, 8))


def test_a_server_that_does_not_answer_is_a_warning(tmp_path, told, monkeypatch):
    monkeypatch.setenv("FAILS", "server")
    (warning,) = _run(tmp_path / "run", 0, 6)
    assert "which goes on: CommError: Run initialization has timed out" in warning
    assert not told.exists()


def test_a_missing_key_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "key")
    with pytest.raises(UserError, match="W&B says: .*No API key.*WANDB_MODE=offline") as caught:
        _run(tmp_path / "run", 0, 6)
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_told_so(tmp_path, told):
    with (
        pytest.raises(ZeroDivisionError),
        weights_and_biases.opened("student", tmp_path, {}, print),
    ):
        raise ZeroDivisionError
    assert [call["exit_code"] for call in _calls(told, "finish")] == [1]


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    weights_and_biases.check("")
    with pytest.raises(UserError, match=r"package wandb: pip install 'slam_jax\[wandb\]'"):
        weights_and_biases.check("student")
