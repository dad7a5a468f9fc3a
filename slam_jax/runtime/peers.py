"""Ends this process where another one of the job has died or hangs, and says which.

JAX ends a job too, but only when a process is gone as a whole, with a crash's stack trace; where
one waits for its data forever, all others wait with it.
"""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax._src import distributed

_FOLDER = "slam_jax/beats/"
_BEAT_S = 1.0
_PATIENCE_MS = 24 * 3600 * 1000  # the watch ends a job much earlier
_NO_STEP = -1
_DONE, _FAILED = 0, -1  # instead of a beat's count


class _Beat(NamedTuple):
    """What a process tells the others, once a second."""

    count: int  # grows while the process lives
    step: int
    host: str


class _Heard(NamedTuple):
    """What the others told, and when."""

    beats: dict[int, tuple[_Beat, float]]  # process -> its last beat, and when it was new
    at: float


# The step this process is in and since when; None while its length is anybody's guess.
_now: deque[tuple[int, float] | None] = deque([None], maxlen=1)
_heard: deque[_Heard] = deque(maxlen=1)
_stop = threading.Event()
_failed = threading.Event()
_last_word = threading.Lock()


def known() -> bool:
    """Whether there are others."""
    return distributed.global_state.client is not None


def start(process_id: int, timeout_s: int) -> None:
    """Watches the others from now on: who is silent or behind for timeout_s ends the job."""
    # The first process keeps what all tell each other, so it is the last to give up.
    limit = timeout_s * (0.9 if process_id == 0 else 0.8)
    every = min(5.0, max(_BEAT_S, timeout_s / 20))
    _tell(process_id, 1)
    _heard.append(_Heard(_merged({}, _beats(), time.monotonic()), time.monotonic()))
    threads = [
        threading.Thread(target=_talk, args=(process_id, every), daemon=True),
        threading.Thread(target=_watch, args=(process_id, limit), daemon=True),
    ]
    for thread in threads:
        thread.start()
    sys.excepthook = _failing(sys.excepthook)

    # Registered after JAX's own end, so done before it.
    @atexit.register
    def end() -> None:
        _stop.set()
        for thread in threads:
            thread.join()


def agreed(about: str, choose: Callable[[], str]) -> str:
    """What the first process chose; the others wait for it."""
    client, key = distributed.global_state.client, f"slam_jax/agreed/{about}"
    if distributed.global_state.process_id == 0:
        client.key_value_set(key, choose())
    return client.blocking_key_value_get(key, _PATIENCE_MS)


def wait_for_all(until: str) -> None:
    """Returns when all processes have called it with that word, once each."""
    distributed.global_state.client.wait_at_barrier(f"slam_jax/{until}", _PATIENCE_MS)


def step(number: int | None) -> None:
    """To be called when a step's batch is there, before anything waits for other processes.

    From there to the next call must not take timeout_s. None: what comes now may, and others that
    wait for it are patient.
    """
    _now.append(None if number is None else (number, time.monotonic()))


def leave(status: int) -> None:
    """Ends this process at once, and what it started; the others learn that it failed."""
    _failed.set()
    try:
        _tell(distributed.global_state.process_id, _FAILED)
    except jax.errors.JaxRuntimeError as error:
        print(f"warning: the others do not learn of it: {error}", file=sys.stderr)
    _leave(status)


def _leave(status: int) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    if distributed.global_state.process_id == 0:
        time.sleep(3 * _BEAT_S)  # when it is gone JAX aborts the others before their last word
    os._exit(status)


def _end(message: str) -> None:
    _last_word.acquire()  # one is enough
    with contextlib.suppress(OSError):  # nobody may be left to read it
        print(
            f"error: {message}; this process ends too. Start the job again to go on from its last "
            "checkpoint", file=sys.stderr, flush=True,
        )  # fmt: skip
    _leave(1)


def _talk(process_id: int, every: float) -> None:
    """Thread: tells this process's beats, and hears those of the others."""
    count = 1
    try:
        while not _stop.wait(_BEAT_S):
            count += 1
            _tell(process_id, count)
            if time.monotonic() - _heard[0].at >= every:
                now = time.monotonic()
                _heard.append(_Heard(_merged(_heard[0].beats, _beats(), now), now))
        _tell(process_id, _DONE)
    except jax.errors.JaxRuntimeError:
        return  # process 0 is gone: JAX ends this one, or _watch does


def _tell(process_id: int, count: int) -> None:
    now = _now[0]
    count = _FAILED if _failed.is_set() else count
    beat = f"{count} {_NO_STEP if now is None else now[0]} {socket.gethostname()}"
    distributed.global_state.client.key_value_set(
        f"{_FOLDER}{process_id}", beat, allow_overwrite=True
    )


def _beats() -> dict[int, _Beat]:
    found = {}
    for key, value in distributed.global_state.client.key_value_dir_get(_FOLDER):
        count, number, host = value.split(" ", 2)
        found[int(key.rpartition("/")[2])] = _Beat(int(count), int(number), host)
    return found


def _merged(seen: dict, beats: dict[int, _Beat], now: float) -> dict[int, tuple[_Beat, float]]:
    return {
        process: (beat, seen[process][1])
        if process in seen and seen[process][0].count == beat.count
        else (beat, now)
        for process, beat in beats.items()
    }


def _watch(process_id: int, limit: float) -> None:
    """Thread: ends this process if the others, or what it hears of them, leave no other choice."""
    free_until = 0.0  # others did until then what may take its time
    while not _stop.wait(_BEAT_S):
        heard, here, now = _heard[0], _now[0], time.monotonic()
        if _any_is_free(heard):
            free_until = now
        if here is not None:
            here = (here[0], max(here[1], free_until))
        if now - heard.at > limit:
            _end(f"process 0 at {distributed.global_state.coordinator_address}: {_silence(limit)}")
        if verdict := _verdict(heard, here, limit, now):
            message, names_this_one = verdict[0], process_id in verdict[1]
            if names_this_one:
                # Where it hangs is what its user wants to know.
                with contextlib.suppress(OSError):
                    faulthandler.dump_traceback(sys.__stderr__)
            _end(message)


def _any_is_free(heard: _Heard) -> bool:
    """Whether some process is compiling, drawing or saving, for which all others wait."""
    return any(beat.count > _DONE and beat.step == _NO_STEP for beat, _ in heard.beats.values())


def _verdict(
    heard: _Heard, here: tuple[int, float] | None, limit: float, now: float
) -> tuple[str, list[int]] | None:
    """What is wrong with which processes, as seen by one that is at step `here`; None if nothing.

    One that hangs still beats, but at an earlier step than those that wait for it.
    """
    failed = {p: beat for p, (beat, _) in heard.beats.items() if beat.count == _FAILED}
    if failed:
        return f"{_names(failed)}: failed, its own messages say why", list(failed)
    alive = {p: told for p, told in heard.beats.items() if told[0].count != _DONE}
    hangs = here is not None and now - here[1] > limit
    silent = {
        p: beat
        for p, (beat, since) in alive.items()
        if heard.at - since > (limit / 2 if hangs else limit)
    }
    if silent:
        return f"{_names(silent)}: {_silence(limit)}", list(silent)
    if not hangs:
        return None
    behind = min(beat.step for beat, _ in alive.values())
    late = {p: beat for p, (beat, _) in alive.items() if beat.step == behind}
    return f"{_names(late)}: not past step {max(behind, 0)} for {limit:.0f} s", list(late)


def _names(beats: dict[int, _Beat]) -> str:
    return ", ".join(f"process {process} on {beat.host}" for process, beat in sorted(beats.items()))


def _silence(seconds: float) -> str:
    return f"not a sign of life for {seconds:.0f} s"


def _failing(before: Callable) -> Callable:
    """An excepthook: a collective fails where another process died, so says which, then leaves."""

    def hook(kind, error, trace) -> None:
        before(kind, error, trace)
        if issubclass(kind, KeyboardInterrupt):
            leave(130)
        _blame(3 * _BEAT_S)
        leave(1)

    return hook


def _blame(seconds: float) -> None:
    """Ends this process if others failed before, or do not beat while it waits."""
    try:
        first = _beats()
        time.sleep(seconds)
        last = _beats()
    except jax.errors.JaxRuntimeError:
        return  # process 0 is gone: JAX ends this one
    failed = {p: beat for p, beat in last.items() if beat.count == _FAILED}
    if failed:
        _end(f"{_names(failed)}: failed, its own messages say why")
    silent = {
        p: beat
        for p, beat in last.items()
        if beat.count != _DONE and p in first and first[p].count == beat.count
    }
    if silent:
        _end(f"{_names(silent)}: {_silence(seconds)}")
