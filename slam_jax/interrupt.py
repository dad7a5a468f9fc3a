"""Ctrl-C: the first ends a program in good order, the second at once.

Python's own answer waits until a call into XLA returns, and compiling or drawing may take minutes.
Here a thread hears of the signal, whatever the main thread does.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# What shells make of a program that Ctrl-C has ended.
STATUS = 128 + signal.SIGINT
_SAVING = b"\nCtrl-C: saving after this step; once more ends at once\n"

_asked = threading.Event()
_saves = threading.Event()


def listen() -> None:
    """From now on; to be called once, by the main thread.

    Not where somebody else has a say: in the background of a script the signal is ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _raise)
    threading.Thread(target=_hear, args=(heard,), daemon=True).start()


def asked() -> bool:
    """Whether Ctrl-C was pressed."""
    return _asked.is_set()


@contextlib.contextmanager
def told_as_sigterm() -> Iterator[None]:
    """Within it Ctrl-C raises nothing: the process gets SIGTERM, on which it is to save and end.

    KeyboardInterrupt at the end, if it came too late for that.
    """
    _saves.set()
    try:
        yield
    finally:
        _saves.clear()
    if asked():
        raise KeyboardInterrupt


def _raise(_number, _frame) -> None:
    if not _saves.is_set():
        raise KeyboardInterrupt


def _hear(pipe: int) -> None:
    """Thread: Python writes the number of every signal into the pipe."""
    while True:
        for number in os.read(pipe, 64):
            if number == signal.SIGINT and asked():
                os._exit(STATUS)
            elif number == signal.SIGINT:
                _asked.set()
                if _saves.is_set():
                    os.write(2, _SAVING)  # print might be in the middle of something
                    os.kill(os.getpid(), signal.SIGTERM)
