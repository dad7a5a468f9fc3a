"""How the hosts agree that a save is complete, where one of them may be unable to write.

Orbax has all of them wait for each other twice: when the arrays are written, and when the step has
its final name. Who fails never comes, and the others wait for 20 minutes, from the next save on in
their main threads too. Here who fails says so, and all give up the save at once.
"""

import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

from jax._src import distributed

# Parts of Orbax's names for these waits, and for those around each save: of the main thread before
# it, of another after it, whether it failed or not.
_WRITTEN, _NAMED = "async_write_complete", "async_commit_complete"
_BEGIN, _END = "set_value_start", "set_value_end"


_numbers = itertools.count()  # of saves, into whatever folder


class _Save(NamedTuple):
    """The save under way; its parts change."""

    number: list[int]
    owed: list[str]  # waits that this process has not come to yet


def barrier() -> Callable[..., None]:
    """What Orbax's AsyncOptions take: barrier(key=..., timeout_ms=...), called by all processes.

    It raises OSError where the save is to be given up, since one of them could not write.
    """
    save = _Save([0], [])

    def wait(*, key: str, timeout_ms: int) -> None:
        if _WRITTEN in key or _NAMED in key:
            _agree(save, _WRITTEN if _WRITTEN in key else _NAMED, timeout_ms)
            return
        if _BEGIN in key:
            while save.owed:
                _vote(save, save.owed.pop(), "no")
        distributed.global_state.client.wait_at_barrier(f"slam_jax/{key}", timeout_ms)
        if _END in key and threading.current_thread() is threading.main_thread():
            save.number[0] = next(_numbers)
            save.owed[:] = [_WRITTEN, _NAMED]

    return wait


def _agree(save: _Save, about: str, timeout_ms: int) -> None:
    save.owed.remove(about)
    _vote(save, about, "yes")
    for process in range(distributed.global_state.num_processes):
        vote = distributed.global_state.client.blocking_key_value_get(
            _key(save, about, process), timeout_ms
        )
        if vote == "no":
            raise OSError(f"process {process} could not write its part")


def _vote(save: _Save, about: str, vote: str) -> None:
    key = _key(save, about, distributed.global_state.process_id)
    distributed.global_state.client.key_value_set(key, vote)


def _key(save: _Save, about: str, process: int) -> str:
    return f"slam_jax/saves/{save.number[0]}/{about}/{process}"
