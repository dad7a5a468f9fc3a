"""Runs slam_jax.prepare in processes that kill themselves at given moments: a program of the tests.

    python killed_prepare.py REFERENCE OUT MOMENT[,MOMENT…] OPTION…

First a whole run into REFERENCE; then one into OUT for each moment, killed by SIGKILL there; then
one to the end. A moment is a number of steps, where each record and each side of each rename is a
step; or the end of a file's name, which means right before that file appears. Each run is a fork,
since importing takes longer than running.
"""

import os
import signal
import sys

from absl import flags

from slam_jax import prepare
from slam_jax.data import cache


def main(reference, out, moments, *options):
    assert _run(reference, None, options) == 0
    for moment in moments.split(","):
        status = _run(out, moment, options)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
    assert _run(out, None, options) == 0


def _run(out, moment, options):
    """How a run in a process of its own ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if moment is not None:
                _die_at(moment)
            flags.FLAGS(["prepare", f"--out={out}", *options])
            prepare.main()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def _die_at(moment):
    steps = 0
    encode, replace = cache.encode, os.replace

    def step(name=""):
        nonlocal steps
        steps += 1
        if str(name).endswith(moment) or str(steps) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_encode(record):
        step()
        return encode(record)

    def counted_replace(source, target):
        step(target)
        replace(source, target)
        step()

    cache.encode, os.replace = counted_encode, counted_replace


if __name__ == "__main__":
    main(*sys.argv[1:])
