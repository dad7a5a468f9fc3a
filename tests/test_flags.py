"""The flags in docs/howto/flags.md exist: XLA ends a program that is given an unknown one.

Those of TPUs are libtpu's, and are asked of it where it is installed.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Variable -> what reads it.
READERS = {
    "XLA_FLAGS": "import jax; jax.devices()",
    "LIBTPU_INIT_ARGS": "from slam_jax.runtime import topologies; topologies.devices('v5e:2x2')",
}
INSTALLED = [
    name for name in READERS if name != "LIBTPU_INIT_ARGS" or importlib.util.find_spec("libtpu")
]


def _flags(variable):
    """Of the page's sections whose headings name the variable."""
    page = (ROOT / "docs" / "howto" / "flags.md").read_text(encoding="utf-8")
    sections = [each for each in page.split("\n## ") if f"`{variable}`" in each.partition("\n")[0]]
    return re.findall(r"^\| `(--[^` ]+)` \|", "\n".join(sections), re.M)


def _read(variable, flags):
    return subprocess.run(
        [sys.executable, "-c", READERS[variable]], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, variable: " ".join(flags), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.parametrize("variable", READERS)
def test_the_page_has_flags_each_once(variable):
    flags = _flags(variable)
    assert len(flags) >= 8 and len({flag.partition("=")[0] for flag in flags}) == len(flags)


@pytest.mark.parametrize("variable", INSTALLED)
def test_xla_takes_every_flag(variable):
    done = _read(variable, _flags(variable))
    assert done.returncode == 0, done.stderr
    unknown = _read(variable, [*_flags(variable), "--xla_of_no_such_name=1"])
    assert unknown.returncode != 0 and "xla_of_no_such_name" in unknown.stderr
