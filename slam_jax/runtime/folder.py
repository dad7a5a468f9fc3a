"""The run folder: its config.json, the code's revision, and whether a run may go on in it."""

import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import traverse_util

from slam_jax.errors import UserError

CONFIG = "config.json"
REVISION = "revision.txt"


def check_writable(workdir: Path) -> None:
    """Makes the folder and a file in it, which is removed again; UserError if that fails."""
    if "gs:" in workdir.parts:
        raise UserError(f"cannot write to {workdir}: give a folder on this machine, and copy it")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to workdir {workdir}: {error.strerror}; choose another --workdir"
        ) from None


def check_same(workdir: Path, settings: Mapping[str, Any], free: Sequence[str]) -> None:
    """Refuses settings that differ from those the run was started with, `free` keys excepted.

    A free key stands for its group too: "eval" frees eval.every_steps.
    """
    try:
        before = traverse_util.flatten_dict(json.loads((workdir / CONFIG).read_text()), sep=".")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir} holds checkpoints but no readable {CONFIG} ({error}); "
            "choose another --workdir"
        ) from None
    after = traverse_util.flatten_dict(json.loads(json.dumps(settings)), sep=".")
    for key in sorted(before.keys() | after.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        old, new = (json.dumps(values[key]) if key in values else "absent" for values in
                    (before, after))  # fmt: skip
        if old != new:
            raise UserError(
                f"{workdir} was trained with {key}={old} and now asks for {key}={new}; "
                "give the old value or choose another --workdir"
            )


def start(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Writes config.json, and adds a line with the time and the code's revision."""
    write_atomic(workdir / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(workdir / REVISION, "a") as file:
        file.write(f"{now} {revision()}\n")


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """The file appears whole or not at all, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def revision() -> str:
    """The git commit of this code, "+changes" if the working tree differs, or "unknown"."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
