"""Ctrl-C: what a terminal does to a program and the processes that it has started."""

import os
import signal
import subprocess
import sys
import time

from slam_jax import interrupt

# Says when it is ready; then is busy where Python hears nothing, as in XLA.
PROGRAM = """
import hashlib, sys, time

what = sys.argv.pop()
from slam_jax import command, errors, interrupt

def main():
    if what == "saves":
        with interrupt.told_as_sigterm():
            import signal
            told = []
            signal.signal(signal.SIGTERM, lambda *_: told.append(1))
            print("ready", flush=True)
            while not told:
                time.sleep(0.01)
            raise KeyboardInterrupt("saved after step 3") if interrupt.asked() else Exception
    print("ready", flush=True)
    if what == "busy":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
    time.sleep(20)

command.run(main, required=())
"""


def _interrupted(what: str, times: int) -> tuple[int, str, float]:
    """(exit status, stderr, seconds that it took to end)."""
    program = [sys.executable, "-c", PROGRAM, what]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, text=True, stdout=pipe, stderr=pipe) as process:
        process.stdout.readline()
        began = time.monotonic()
        for _ in range(times):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.5)
        _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - began


def test_the_first_ends_with_one_line():
    status, err, _ = _interrupted("idle", 1)
    assert status == interrupt.STATUS == 130
    (line,) = err.splitlines()
    assert line.startswith("interrupted: nothing is half-written")


def test_the_first_has_a_run_save():
    status, err, _ = _interrupted("saves", 1)
    assert status == 130
    lines = err.split("\n")
    assert lines[1:] == [
        "Ctrl-C: saving after this step; once more ends at once",
        "interrupted: saved after step 3",
        "",
    ]


def test_the_second_ends_what_hears_nothing():
    status, _, seconds = _interrupted("busy", 2)
    assert status == 130 and seconds < 10
