"""The live page without its library: the queue, the limits, the history, what is served."""

import asyncio
import base64
import collections
import html.parser
import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slam_jax import drawing_queue, live, serve
from slam_jax.drawing_queue import Picture, Wanted
from slam_jax.errors import UserError

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


class Artist:
    """Draws pictures whose every value is their seed, a batch whenever it is let."""

    def __init__(self):
        self.batches, self.begun, self.let = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, wanted):
        self.batches.append([each.prompt for each in wanted])
        self.begun.release()
        assert self.let.acquire(timeout=10)
        if wanted[0].prompt == "broken":
            raise ZeroDivisionError("so it is")
        return np.stack([np.full((2, 2, 3), each.seed, np.uint8) for each in wanted])


@pytest.fixture
def artist():
    return Artist()


@pytest.fixture
def queue(artist):
    queue = drawing_queue.start(artist, most=5, batch=3)
    yield queue
    drawing_queue.close(queue)
    artist.let.release(100)


def ask(queue, session, prompt, seed=0, steps=4, model="student"):
    return drawing_queue.put(queue, session, [Wanted(model, prompt, seed, steps)])[0]


def test_the_latest_of_a_session_wins_and_others_keep_theirs(artist, queue):
    being_drawn = ask(queue, "a", "a", 1)
    assert artist.begun.acquire(timeout=10)
    stale, other, teacher = (
        ask(queue, "a", "a c"), ask(queue, "b", "dog", 2), ask(queue, "a", "x", model="teacher")
    )  # fmt: skip
    newest = ask(queue, "a", "a cat", 3)
    assert stale.result(0) is None  # at once, not when its turn would have come
    artist.let.release(100)
    for answer, seed in ((being_drawn, 1), (other, 2), (newest, 3), (teacher, 0)):
        assert (answer.result(10).pixels == seed).all()
    assert artist.batches == [["a"], ["dog", "a cat"], ["x"]]


def test_a_request_that_was_overtaken_is_stale(artist, queue):
    def put(order, model="student", session="a"):
        return drawing_queue.put(queue, session, [Wanted(model, f"{order}", 0, 4)], order)[0]

    artist.let.release(100)
    assert put(2.0).result(10) is not None
    assert put(1.0).result(0) is None  # though the newer one is drawn already
    assert put(1.0, "teacher").result(10) is not None
    assert put(1.0, session="b").result(10) is not None
    assert put(3.0).result(10) is not None


def test_like_pictures_are_drawn_together_up_to_a_batch(artist, queue):
    first = ask(queue, 0, "first")
    assert artist.begun.acquire(timeout=10)
    answers = [ask(queue, n, f"{n}", n, steps=1 + (n == 2)) for n in range(1, 6)]
    artist.let.release(100)
    for n, answer in enumerate(answers, 1):
        picture = answer.result(10)
        assert (picture.pixels == n).all() and picture.waited > 0 and picture.drawing >= 0
    assert first.result(0).pixels.shape == (2, 2, 3)
    assert artist.batches == [["first"], ["1", "3", "4"], ["2"], ["5"]]


def test_a_full_queue_refuses_and_keeps_what_stood(artist, queue):
    ask(queue, 0, "being drawn")
    assert artist.begun.acquire(timeout=10)
    answers = [ask(queue, n, f"{n}") for n in range(5)]
    with pytest.raises(UserError, match="5 pictures wait already"):
        ask(queue, "new", "x")
    again = ask(queue, 4, "in place of its own")  # takes no more room
    assert answers[4].result(0) is None
    drawing_queue.cancel(queue, answers[:2])
    assert answers[0].result(0) is answers[1].result(0) is None
    artist.let.release(100)
    assert answers[2].result(10) is not None and again.result(10) is not None


def test_an_error_is_told_who_asked_and_the_next_is_drawn(artist, queue):
    artist.let.release(100)
    with pytest.raises(ZeroDivisionError, match="so it is"):
        ask(queue, 0, "broken").result(10)
    assert ask(queue, 0, "whole", 7).result(10).pixels.max() == 7


def test_a_closed_queue_gives_up_all(artist, queue):
    ask(queue, 0, "being drawn")
    assert artist.begun.acquire(timeout=10)
    waits = ask(queue, 1, "x")
    drawing_queue.close(queue)
    assert waits.result(0) is None
    with pytest.raises(UserError):
        ask(queue, 1, "x")


@pytest.mark.parametrize("prompt, seed, steps, told", [
    ("x" * 501, 0, [1], "501 letters; give 500"),
    (["x"], 0, [1], "must be text"),
    ("x", -1, [1], "seed must be a whole number from 0 to 4294967295"),
    ("x", 2**32, [1], "seed"),
    ("x", 0.5, [1], "seed"),
    ("x", float("nan"), [1], "seed"),
    ("x", True, [1], "seed"),
    ("x", None, [1], "seed"),
    ("x", 0, [0], "steps must be a whole number from 1 to 100"),
    ("x", 0, [101], "steps"),
    ("x", 0, [1] * 9, "9 pictures at once; ask for 8"),
])  # fmt: skip
def test_what_is_beyond_the_limits_is_refused(prompt, seed, steps, told):
    with pytest.raises(UserError, match=told):
        live.wanted("student", prompt, seed, steps)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(), max_size=60) | st.none() | st.integers(),
    st.floats() | st.integers() | st.text(max_size=3) | st.booleans(),
    st.lists(st.integers(-5, 200) | st.floats() | st.none(), max_size=9),
)
def test_whatever_comes_is_a_request_or_refused(prompt, seed, steps):
    try:
        found = live.wanted("student", prompt, seed, steps)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for each in found:
            each.prompt.encode("utf-8")
            assert each.prompt.isprintable() and 0 <= each.seed < 2**32 and 1 <= each.steps <= 100


class _Sources(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name == "src"]


def test_a_picture_is_in_the_page_itself_whatever_the_prompt_is():
    asked = Wanted("student", "<script>'\"&", 5, 1)
    text = live.shown(asked, Picture(PIXELS, 0.002, 0.010))
    read = _Sources(text)
    assert "script" not in read.tags and "12 ms" in text and "<b>1 step</b>" in text
    [source] = read.found
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
        assert "seed 5" in image.text["slam_jax"]


def test_history_keeps_what_was_meant_and_no_more():
    histories = collections.OrderedDict()

    def keep(prompt, seed=0, session="s"):
        return live.remember(histories, session, Wanted("student", prompt, seed, 4), PIXELS)

    for prompt in ("a", "a c", "a cat", "a ca", "a cat"):  # as one types
        keep(prompt)
    keep("a cat", 1)
    assert [(k.prompt, k.seed) for k in keep("a dog", 1)] == [
        ("a dog", 1), ("a cat", 1), ("a cat", 0)
    ]  # fmt: skip
    for seed in range(40):
        kept = keep("x", seed)
    assert len(kept) == live.MOST_KEPT and live.history(kept).count("<img") == live.MOST_KEPT
    for n in range(300):
        keep("y", session=f"{n}")
    assert len(histories) == 200 and "s" not in histories


def answered(path, method="GET", headers=(), kind="http"):
    """The status, or None if the app behind is asked; and the headers of its answer."""
    sent = []

    async def behind(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 0, "headers": [(b"a", b"b")]})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": list(headers)}
    asyncio.run(live.guarded(behind)(scope, None, send))
    return sent[0].get("status"), dict(sent[0].get("headers", ()))


@pytest.mark.parametrize("path", [
    "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/file=x", "/gradio_api/file/x",
    "/gradio_api/proxy=https://a.example", "/gradio_api/stream/x", "/static/../../x",
    "/gradio_api/vibe-edit", "/monitoring", "/gradio_api/call/other", "/gradio_api/run/picture",
    "/login", "/gradio_api/component_server", "//evil",
])  # fmt: skip
def test_nothing_else_is_served(path):
    assert answered(path)[0] == 404
    assert answered(path, "POST", [(b"content-length", b"2")])[0] == 404


def test_the_page_is_served_alone():
    for path in ("/", "/config", "/assets/index.js", "/gradio_api/queue/data"):
        status, headers = answered(path)
        assert status == 0 and headers[b"a"] == b"b", path
        assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert answered("/", kind="websocket")[0] is None


def test_long_bodies_are_refused():
    join = "/gradio_api/queue/join"
    assert answered(join, "POST", [(b"content-length", b"65536")])[0] == 0
    assert answered(join, "POST", [(b"content-length", b"65537")])[0] == 413
    assert answered(join, "POST")[0] == 411
    assert answered(join, "POST", [(b"content-length", b"-1")])[0] == 411


def test_a_port_in_use_is_a_mistake():
    with (
        serve.listening("127.0.0.1", 0) as heard,
        pytest.raises(UserError, match="cannot listen at"),
    ):
        heard.listen()
        serve.listening("127.0.0.1", heard.getsockname()[1])
    with pytest.raises(UserError, match="--host no.such.host.invalid"):
        serve.listening("no.such.host.invalid", 1)


def test_without_its_library_the_page_says_which_extra(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"slam_jax\[serve\]"):
        serve.main()
