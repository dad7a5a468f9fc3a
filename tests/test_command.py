"""What the programs say on stderr."""

import os
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import pytest

from slam_jax import command

ROOT = pathlib.Path(__file__).parents[1]

FAILS_WITH_WORK_LEFT_OVER = """
from slam_jax import command, errors

def main():
    async def not_begun(): pass
    in_a_cycle = [not_begun()]
    in_a_cycle.append(in_a_cycle)
    del in_a_cycle  # is found when Python ends
    raise errors.UserError("this")

command.run(main, required=())
"""


def test_a_cut_prompt_is_told_with_what_was_lost(capsys):
    command.warn_of_cut(["a cat", "a very long prompt about a dog"], ["", "about a dog"], 77)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: prompt 'a very long") and "77 tokens" in line
    assert line.endswith("left out: 'about a dog'")


def test_an_error_message_of_many_lines_becomes_one():
    assert command.one_line(OSError("no\n  file")) == "OSError: no file"


def test_names_of_flags_may_have_dashes():
    assert command.underscored("--extract-lora=a-b") == "--extract_lora=a-b"
    assert command.underscored("--init-image") == "--init_image"
    for unchanged in ("a-b", "-v", "--", "--config.data.source=a-b"):
        assert command.underscored(unchanged) == unchanged


def test_an_error_is_the_last_line():
    command = [sys.executable, "-c", FAILS_WITH_WORK_LEFT_OVER]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: this\n")


def test_the_package_lists_its_programs():
    done = subprocess.run([sys.executable, "-m", "slam_jax"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for name in ("main", "sample", "report", "env"):
        assert f"python -m slam_jax.{name} " in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "slam_jax", "sample"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stderr.endswith("run python -m slam_jax.sample\n")


def test_env_tells_what_a_report_needs():
    program = [sys.executable, "-m", "slam_jax.env", "--config=configs/tiny.py"]
    first, other = (
        subprocess.run([*program, *more], capture_output=True, text=True, cwd=ROOT,
                       env={**os.environ, "SECRET": "hidden", "JAX_PLATFORMS": "cpu"})
        for more in ((), ("--config.distill.w=3",))
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    for told in ("slam_jax ", "jax ", "devices: ", "memory: ", "JAX_PLATFORMS=cpu", "hash "):
        assert told in first.stdout
    assert "hidden" not in first.stdout and first.stdout != other.stdout


@pytest.mark.parametrize("chosen", [None, "theirs"])
def test_what_jax_compiles_is_kept_where_the_user_has_it_or_in_our_folder(
    chosen, tmp_path, monkeypatch
):
    settings = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: jax.config.values[name] for name in settings}
    monkeypatch.setenv("SLAM_JAX_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", chosen)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which it replaces
    try:
        command._keep_compiled()
        where, most = (jax.config.values[name] for name in settings)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    if chosen:
        assert where == chosen
    else:
        assert (tmp_path / "xla").is_dir() and where.startswith(f"{tmp_path}/xla/")
        assert 2**30 <= most < 2**34


# Compiles three programs, or reads them from where _keep_compiled has JAX keep them.
KEEPER = """
import jax, numpy
from slam_jax import command
command._keep_compiled()
for size in (2, 3, 4):
    jax.jit(lambda x: x @ x)(numpy.eye(size, dtype=numpy.float32))
"""


def test_damaged_programs_are_told_of_once_and_kept_anew(tmp_path):
    environment = {
        **os.environ, "SLAM_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def said():
        program = [sys.executable, "-c", KEEPER]
        done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert said() == ""
    files = sorted((tmp_path / "xla").glob("*/*-cache"))
    whole = [path.read_bytes() for path in files]
    flipped = bytearray(whole[0])
    flipped[len(flipped) // 2] ^= 1
    for path, content in zip(files, (flipped, whole[1][:-9], b""), strict=False):
        path.write_bytes(content)
    assert re.fullmatch("warning: a kept program in .* was damaged.* kept anew\n", said())
    assert sorted((tmp_path / "xla").glob("*/*-cache")) == files
    assert all(path.stat().st_size > 100 for path in files)
    assert said() == ""
