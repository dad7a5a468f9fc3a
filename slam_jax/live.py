"""The live page without its library: what may be asked for, what is shown, what is served."""

import base64
import collections
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from slam_jax import page
from slam_jax.drawing_queue import Picture, Wanted
from slam_jax.errors import UserError
from slam_jax.runtime import images

MOST_LETTERS = 500
MOST_PICTURES = 8  # of one request
MOST_STEPS = 100
MOST_KEPT = 24  # pictures of a session's history
_MOST_SESSIONS = 200
_THUMBNAIL = 128  # pixels
_MOST_BYTES = 64 * 1024  # of a request's body
# What the page asks the server for; nothing else is answered: no uploads, no files, no proxy.
_SERVED = re.compile(
    r"/(|config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static|svelte)/.+"
    r"|gradio_api/(info|startup-events|app_id|theme\.css|cancel|reset|heartbeat/\w+"
    r"|queue/(join|data)|call/picture(/\w+)?))/?"
)
# The browser fetches nothing from elsewhere, whatever the page's library would like.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
STYLE = """
.html-container:has(.picture){padding:0!important}
.picture{margin:0;text-align:center}
.picture img,.picture .none{width:100%;aspect-ratio:1;object-fit:contain;background:#8882;
border-radius:6px;image-rendering:pixelated}
.picture figcaption{font-size:.85rem;margin-top:.3rem}
.history{display:flex;flex-wrap:wrap;gap:8px}
.history figure{margin:0;width:84px;font-size:.65rem;line-height:1.2;overflow-wrap:anywhere}
.history img{width:84px;height:84px;object-fit:cover;border-radius:4px;image-rendering:pixelated}
"""


class Kept(NamedTuple):
    """A picture of the history."""

    prompt: str
    seed: int
    png: bytes  # small


Histories = collections.OrderedDict[str, list[Kept]]  # by session, the ones used last at the end


def wanted(model: str, prompt: object, seed: object, steps: Iterable[object]) -> list[Wanted]:
    """Pictures of a prompt with each of these numbers of steps; UserError beyond the limits.

    All values may come from anybody. The size of a picture is the model's, nobody asks for it.
    """
    text, counts = _prompt(prompt), list(steps)
    number = _whole(seed, "the seed", 0, 2**32 - 1)
    if len(counts) > MOST_PICTURES:
        raise UserError(f"{len(counts)} pictures at once; ask for {MOST_PICTURES} at most")
    return [Wanted(model, text, number, _whole(each, "steps", 1, MOST_STEPS)) for each in counts]


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"the prompt must be text, and it is a {type(value).__name__}")
    if len(value) > MOST_LETTERS:
        raise UserError(f"the prompt has {len(value)} letters; give {MOST_LETTERS} at most")
    # Among what is not printable are lone surrogates, which cannot be written anywhere.
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _whole(value: object, name: str, low: int, high: int) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        raise UserError(f"{name} must be a whole number from {low} to {high}")
    return int(value)


def new_seed() -> int:
    """One that nobody can guess; small enough to be read aloud."""
    return secrets.randbelow(100_000)


def shown(asked: Wanted, picture: Picture) -> str:
    """The picture as HTML, with its steps, its milliseconds, and a link to keep it."""
    notes = f"{asked.prompt!r}, seed {asked.seed}, {asked.steps} steps"
    source = _data(images.png(picture.pixels, slam_jax=notes))
    took = f"{1e3 * (picture.waited + picture.drawing):.0f} ms"
    name = page.text(f"{asked.model}_{asked.steps}_steps_seed_{asked.seed}.png")
    # The bytes are on the page already; a second copy would double what is sent.
    keep = "this.href=this.closest('figure').querySelector('img').src"
    return (
        f"<figure class='picture'><img alt='{page.text(notes)}' src='{source}'>"
        f"<figcaption><b>{_name(asked.model, asked.steps)}</b>, {took} "
        f"<a href='#' download='{name}' onclick=\"{keep}\">download</a></figcaption></figure>"
    )


def empty(model: str, steps: int, said: str = "") -> str:
    """Where a picture will be."""
    return (
        "<figure class='picture'><div class='none'></div>"
        f"<figcaption><b>{_name(model, steps)}</b> {page.text(said)}</figcaption></figure>"
    )


def _name(model: str, steps: int) -> str:
    count = f"{steps} step" if steps == 1 else f"{steps} steps"
    return f"teacher, {count}" if model == "teacher" else count


def remember(
    histories: Histories, session: str, asked: Wanted, pixels: UInt8[np.ndarray, "H W 3"]
) -> list[Kept]:
    """The session's history with this picture first; while one types, the prompts so far go.

    Only the sessions used last have one.
    """
    small = Image.fromarray(pixels)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    new = Kept(asked.prompt, asked.seed, images.png(np.asarray(small)))
    before = histories.pop(session, [])
    if before and before[0].seed == new.seed and _continues(before[0].prompt, new.prompt):
        before = before[1:]
    histories[session] = [new, *before][:MOST_KEPT]
    while len(histories) > _MOST_SESSIONS:
        histories.popitem(last=False)
    return histories[session]


def _continues(before: str, after: str) -> bool:
    """Whether one is the other as it is being typed or deleted."""
    return before.startswith(after) or after.startswith(before)


def history(kept: Sequence[Kept]) -> str:
    """The grid as HTML."""
    figures = (
        f"<figure title='{page.text(each.prompt)}'><img alt='{page.text(each.prompt)}' "
        f"src='{_data(each.png)}'><figcaption>{page.text(each.prompt[:40])} · "
        f"{each.seed}</figcaption></figure>"
        for each in kept
    )
    return f"<div class='history'>{''.join(figures)}</div>"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def guarded(app: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The ASGI app, answering what the page needs and no more, with headers that keep it alone."""

    async def serve(scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        status = _refusal(scope) if scope["type"] != "lifespan" else None
        if status is None:
            await app(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            await send_with_headers({"type": "http.response.start", "status": status})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close"})

    return serve


def _refusal(scope: dict) -> int | None:
    """The HTTP status with which a request is refused."""
    if scope["type"] != "http" or ".." in scope["path"] or not _SERVED.fullmatch(scope["path"]):
        return 404
    if scope["method"] in ("GET", "HEAD"):
        return None
    # Without its length (chunked) a body could go on for ever.
    length = dict(scope["headers"]).get(b"content-length", b"")
    if not length.isdigit():
        return 411
    return 413 if int(length) > _MOST_BYTES else None
