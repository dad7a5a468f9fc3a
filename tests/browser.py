"""A headless Chromium, driven over its DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

SECONDS = 60  # until something that a page is to do has failed


class Page(NamedTuple):
    """One tab."""

    socket: aiohttp.ClientWebSocketResponse
    numbers: itertools.count
    events: list[dict]  # what the browser has told unasked

    async def call(self, method: str, **parameters: Any) -> dict:
        """The result of a method of the protocol."""
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            told = await self.socket.receive_json(timeout=SECONDS)
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    async def value(self, expression: str) -> Any:
        """Of JavaScript."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until it is true; elements are."""
        end = time.monotonic() + SECONDS
        while not await self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            await asyncio.sleep(0.05)

    async def type(self, text: str) -> None:
        """Letter by letter, into what has the focus."""
        for letter in text:
            await self.call("Input.dispatchKeyEvent", type="keyDown", key=letter, text=letter)
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=letter)
            await asyncio.sleep(0.03)

    async def paste(self, text: str) -> None:
        """All at once."""
        await self.call("Input.insertText", text=text)

    async def screenshot(self, path: Path) -> None:
        """As PNG."""
        found = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


def path() -> str | None:
    """Of the program, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.asynccontextmanager
async def opened(url: str, folder: Path, size: tuple[int, int]) -> AsyncIterator[Page]:
    """The page at url in a window of that width and height; folder: for the browser's own."""
    process = await asyncio.create_subprocess_exec(
        path(), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
        "--no-first-run", f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}",
        "about:blank", stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as http:
            root = await asyncio.wait_for(_listening(process.stderr), SECONDS)
            async with http.put(f"{root}/json/new?about:blank") as answer:
                target = json.loads(await answer.text())
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket, itertools.count(), [])
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=size[0], height=size[1], deviceScaleFactor=1, mobile=False,
                )  # fmt: skip
                await page.call("Page.navigate", url=url)
                yield page
    finally:
        process.terminate()
        await process.wait()


async def _listening(stderr: asyncio.StreamReader) -> str:
    while line := (await stderr.readline()).decode():
        if found := re.search(r"DevTools listening on ws://([^/]+)/", line):
            return f"http://{found[1]}"
    raise AssertionError("Chromium has ended")
