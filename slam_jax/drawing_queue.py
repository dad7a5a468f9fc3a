"""Pictures that several people ask for, drawn one batch after another.

At most so many wait; of one session only the newest request does, and what it asked for before is
given up. What waits for the same model and number of steps is drawn together, so that eight people
need not wait eight times as long as one.
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from slam_jax.errors import UserError

_MOST_SESSIONS = 1000  # whose newest request is remembered


class Wanted(NamedTuple):
    """One picture that is asked for."""

    model: str  # which of those served, such as "student"
    prompt: str
    seed: int
    steps: int


class Picture(NamedTuple):
    """It drawn, and how many seconds it waited for others and was drawn."""

    pixels: UInt8[np.ndarray, "H W 3"]
    waited: float
    drawing: float


class Waiting(NamedTuple):
    """A picture that is still to be drawn."""

    wanted: Wanted
    session: Hashable
    since: float
    answer: futures.Future  # of a Picture; None if a newer request of the session made it stale


@dataclasses.dataclass(frozen=True)
class Queue:
    """What waits, the oldest first, and who draws it."""

    waiting: list[Waiting]
    changed: threading.Condition  # guards `waiting` and `closed`
    closed: threading.Event
    newest: collections.OrderedDict[tuple[Hashable, str], float]  # `order` of session and model
    most: int  # pictures that may wait
    batch: int  # pictures that may be drawn at once


def start(
    draw: Callable[[Sequence[Wanted]], UInt8[np.ndarray, "B H W 3"]], most: int, batch: int
) -> Queue:
    """A queue with a thread that draws from it, until it is closed.

    draw: pictures of at most `batch` wanted ones, all of the same model and steps.
    """
    queue = Queue(
        [], threading.Condition(), threading.Event(), collections.OrderedDict(), most, batch
    )
    threading.Thread(target=_draw_all, args=(queue, draw), daemon=True).start()
    return queue


def put(
    queue: Queue, session: Hashable, wanted: Sequence[Wanted], order: float | None = None
) -> list[futures.Future]:
    """Asks for these, all of one model, in place of what the session still waits for of it.

    Each answer is a Picture, or None once a newer request has made it stale. order: grows from
    request to request of a session, for such as overtake each other on their way. UserError if too
    many wait already; then the older request stands.
    """
    now = time.perf_counter()
    new = [Waiting(each, session, now, futures.Future()) for each in wanted]
    key = (session, wanted[0].model)
    with queue.changed:
        if order is not None and order < queue.newest.get(key, order):
            _give_up(new)
            return [each.answer for each in new]
        stale = [each for each in queue.waiting if (each.session, each.wanted.model) == key]
        if queue.closed.is_set() or len(queue.waiting) - len(stale) + len(new) > queue.most:
            raise UserError(f"{len(queue.waiting)} pictures wait already; try again in a moment")
        queue.waiting[:] = [each for each in queue.waiting if each not in stale] + new
        if order is not None:
            queue.newest[key] = order
            queue.newest.move_to_end(key)
        while len(queue.newest) > _MOST_SESSIONS:
            queue.newest.popitem(last=False)
        queue.changed.notify()
    _give_up(stale)
    return [each.answer for each in new]


def cancel(queue: Queue, answers: Sequence[futures.Future]) -> None:
    """Of these, those that still wait are not drawn: nobody will look at them."""
    with queue.changed:
        stale = [each for each in queue.waiting if each.answer in answers]
        queue.waiting[:] = [each for each in queue.waiting if each not in stale]
    _give_up(stale)


def close(queue: Queue) -> None:
    """Draws nothing more; what waits is given up."""
    with queue.changed:
        queue.closed.set()
        stale = [*queue.waiting]
        queue.waiting.clear()
        queue.changed.notify()
    _give_up(stale)


def _give_up(stale: Sequence[Waiting]) -> None:
    for each in stale:
        each.answer.set_result(None)


def _take(queue: Queue) -> list[Waiting]:
    """The oldest one and others like it, as soon as there is one; none once it is closed."""
    with queue.changed:
        queue.changed.wait_for(lambda: queue.waiting or queue.closed.is_set())
        if not queue.waiting:
            return []
        kind = _kind(queue.waiting[0])
        alike = (each for each in queue.waiting if _kind(each) == kind)
        batch = list(itertools.islice(alike, queue.batch))
        queue.waiting[:] = [each for each in queue.waiting if each not in batch]
    return batch


def _kind(waiting: Waiting) -> tuple[str, int]:
    return waiting.wanted.model, waiting.wanted.steps


def _draw_all(queue: Queue, draw: Callable[[Sequence[Wanted]], Any]) -> None:
    """Thread. Whatever goes wrong with a batch is told those who asked for it."""
    with futures.ThreadPoolExecutor(1, "drawing") as pool:
        while batch := _take(queue):
            began = time.perf_counter()
            drawn = pool.submit(draw, [each.wanted for each in batch])
            error, drawing = drawn.exception(), time.perf_counter() - began
            for number, each in enumerate(batch):
                if error is not None:
                    each.answer.set_exception(error)
                else:
                    pixels = drawn.result()[number]
                    each.answer.set_result(Picture(pixels, began - each.since, drawing))
