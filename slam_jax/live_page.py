"""The live page, made with Gradio: the image changes while one types."""

import asyncio
import base64
import collections
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from slam_jax import drawing_queue, live
from slam_jax.errors import UserError
from slam_jax.runtime import images

# Requests overtake each other on their way; this says when one was made, in ms.
_ORDERED = "(...given) => [...given.slice(0, -1), performance.now()]"


class Shown(NamedTuple):
    """What the page is about."""

    said: str  # which model draws, in Markdown
    prompt: str  # that it begins with
    steps: Sequence[int]  # of the pictures side by side
    teacher_steps: int | None  # None if there is no teacher to compare with


def build(queue: drawing_queue.Queue, shown: Shown, folder: str) -> Callable[..., Awaitable[None]]:
    """The page as an ASGI app; folder: where the library may write."""
    # It reads these when it is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    import fastapi
    import gradio

    with gradio.Blocks(title="slam_jax", analytics_enabled=False) as blocks:
        _lay_out(gradio, blocks, queue, shown)
        gradio.api(
            _endpoint(gradio, queue, shown.steps), api_name="picture", concurrency_limit=None
        )
    # Our own queue is the bound; theirs would let one person's stale requests wait in line.
    blocks.queue(max_size=4 * queue.most, default_concurrency_limit=None)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), blocks, "/", footer_links=[], show_error=True,
        allowed_paths=[], blocked_paths=["/"], max_file_size=1, ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, css=live.STYLE,
        # Fonts by name alone are the reader's own; a font object would be fetched.
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    )  # fmt: skip
    return live.guarded(app)


def _lay_out(gradio: Any, blocks: Any, queue: drawing_queue.Queue, shown: Shown) -> None:
    gradio.Markdown(shown.said)
    prompt = gradio.Textbox(
        shown.prompt, label="Prompt", max_lines=2, max_length=live.MOST_LETTERS, autofocus=True,
        elem_id="prompt",
    )  # fmt: skip
    has_teacher = shown.teacher_steps is not None
    with gradio.Row(equal_height=True):
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed")
        locked = gradio.Checkbox(True, label="Keep the seed", min_width=100)
        renew = gradio.Button("New seed", size="md", min_width=100, elem_id="new_seed")
        ask_teacher = gradio.Button(
            "Draw the teacher's", size="md", min_width=100, elem_id="compare", visible=has_teacher
        )
    with gradio.Row():
        panels = [
            gradio.HTML(live.empty("student", steps), min_width=120, elem_id=f"steps_{steps}")
            for steps in shown.steps
        ]
        teacher = gradio.HTML(_no_teacher(shown), visible=has_teacher, elem_id="teacher")
    status = gradio.Markdown("", elem_id="status")
    gradio.Markdown("**History** (prompt and seed draw the same picture again)")
    history = gradio.HTML(live.history([]), elem_id="history")
    draw, compare = _drawing(gradio, queue, shown), _comparison(gradio, queue, shown)
    common: dict[str, Any] = {
        "outputs": [*panels, teacher, status, history, seed], "show_progress": "hidden",
        "trigger_mode": "multiple", "concurrency_limit": None, "api_visibility": "private",
    }  # fmt: skip
    order = gradio.Number(0, visible=False)
    given, always, never = [prompt, seed, locked], gradio.State(True), gradio.State(False)
    # Not "input", which pasting and input methods do not raise.
    prompt.change(draw, [*given, never, order], **common, js=_ORDERED)
    seed.input(draw, [prompt, seed, always, never, order], **common, js=_ORDERED)
    renew.click(draw, [prompt, seed, locked, always, order], **common, js=_ORDERED)
    blocks.load(draw, [prompt, seed, always, never, order], **common, js=_ORDERED)
    ask_teacher.click(compare, [prompt, seed], **common | {"outputs": [teacher, status]})


def _no_teacher(shown: Shown) -> str:
    return "" if shown.teacher_steps is None else live.empty("teacher", shown.teacher_steps)


def _drawing(gradio: Any, queue: drawing_queue.Queue, shown: Shown) -> Callable:
    """(prompt, seed, whether it stays or is to be a new one, when) -> what changes, bit by bit.

    Nothing more comes once a newer request of the session has made it stale.
    """
    histories: live.Histories = collections.OrderedDict()

    async def draw(
        prompt: str, seed: float, locked: bool, renew: bool, order: float, request: gradio.Request
    ) -> AsyncIterator[list]:
        session, same = request.session_hash, gradio.skip()
        seed = live.new_seed() if renew or not locked else seed
        panels: list[Any] = [same] * len(shown.steps)
        teacher = _no_teacher(shown)
        try:
            wanted = live.wanted("student", prompt, seed, shown.steps)
            answers = drawing_queue.put(queue, session, wanted, order)
        except UserError as error:
            yield [*panels, same, f"{error}", same, same]
            return
        # Everything again every time, since browsers may leave out what is followed at once.
        rest = [teacher, "drawing …", same, wanted[0].seed]
        yield [*panels, *rest]
        try:
            for number, (asked, answer) in enumerate(zip(wanted, answers, strict=True)):
                picture = await asyncio.wrap_future(answer)
                if picture is None:
                    return
                panels[number] = live.shown(asked, picture)
                yield [*panels, *rest]
            kept = live.remember(histories, session, asked, picture.pixels)
            took = f"all {len(wanted)} after {1e3 * (picture.waited + picture.drawing):.0f} ms"
            yield [*panels, teacher, took, live.history(kept), wanted[0].seed]
        finally:
            drawing_queue.cancel(queue, answers)

    return draw


def _comparison(gradio: Any, queue: drawing_queue.Queue, shown: Shown) -> Callable:
    """(prompt, seed) -> the teacher's picture and what is said of it."""

    async def compare(prompt: str, seed: float, request: gradio.Request) -> AsyncIterator[list]:
        try:
            [asked] = live.wanted("teacher", prompt, seed, [shown.teacher_steps])
            [answer] = drawing_queue.put(queue, request.session_hash, [asked])
        except UserError as error:
            yield [gradio.skip(), f"{error}"]
            return
        yield [live.empty("teacher", asked.steps, "drawing …"), gradio.skip()]
        picture = await _awaited(queue, answer)
        if picture is not None:
            yield [live.shown(asked, picture), gradio.skip()]

    return compare


def _endpoint(gradio: Any, queue: drawing_queue.Queue, prepared: Sequence[int]) -> Callable:
    """The HTTP API: every request counts as a session of its own, so none makes another stale."""

    async def draw(prompt: str, seed: int, steps: int) -> dict:
        """A picture of the prompt: PNG in base64, and the milliseconds waited and drawing."""
        try:
            [asked] = live.wanted("student", prompt, seed, [steps])
            if steps not in prepared:  # each might be compiled first
                raise UserError(f"{steps} steps; ask for one of {', '.join(map(str, prepared))}")
            [answer] = drawing_queue.put(queue, object(), [asked])
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        picture = await _awaited(queue, answer)
        if picture is None:
            raise gradio.Error("the page is being closed", print_exception=False)
        return {
            "png": base64.b64encode(images.png(picture.pixels)).decode(),
            "waited_ms": 1e3 * picture.waited,
            "drawing_ms": 1e3 * picture.drawing,
        }

    return draw


async def _awaited(
    queue: drawing_queue.Queue, answer: futures.Future
) -> drawing_queue.Picture | None:
    """The answer; no longer wanted if whoever waits for it leaves."""
    try:
        return await asyncio.wrap_future(answer)
    finally:
        drawing_queue.cancel(queue, [answer])
