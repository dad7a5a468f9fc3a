"""The live page in a browser: type, and the picture changes. Run with make page."""

import asyncio
import importlib
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
browser = importlib.import_module("browser")
pytestmark = pytest.mark.page
PICTURE = "document.querySelector('#steps_{} img')?.src"
SCREENSHOT = ROOT / "assets" / "page.png"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a page with the embedded student, beside its teacher."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: make page installs it")
    folder = tmp_path_factory.mktemp("served")
    command = [
        sys.executable, "-m", "slam_jax.serve", "--port=0", "--w=8",
        f"--teacher={ROOT / 'assets' / 'tiny_sd'}",
    ]  # fmt: skip
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    process = subprocess.Popen(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)  # fmt: skip
    said = iter(process.stdout.readline, "")
    url = next((found[1] for line in said if (found := re.search(r"ready: (\S+)", line))), None)
    assert url, process.stderr.read()
    yield url
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and told == "interrupted: the page is closed\n", told


def in_browser(url, folder, act):
    """Runs act(page) on the page once it has drawn; what the browser was told to fetch."""
    if browser.path() is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")

    async def run():
        async with browser.opened(url, folder, (1200, 800)) as page:
            await page.until("document.querySelectorAll('figure.picture img').length == 4")
            await act(page)
            return [
                event["params"]["request"]["url"]
                for event in page.events
                if event["method"] == "Network.requestWillBeSent"
            ]

    try:
        return asyncio.run(run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def steps_of(page):
    shown = "[...document.querySelectorAll('figure.picture')].map(f => f.innerText)"
    return [int(re.search(r"(\d+) step", text)[1]) for text in await page.value(shown)]


async def select_prompt(page):
    await page.value("document.querySelector('#prompt textarea').select()")


def test_the_picture_changes_as_one_types(served, tmp_path):
    async def act(page):
        counts = (await steps_of(page))[:4]
        before = [await page.value(PICTURE.format(count)) for count in counts]
        await select_prompt(page)
        await page.type("a green triangle left of a yellow circle")
        await page.until("document.querySelector('#history img')?.alt.endsWith('yellow circle')")
        await asyncio.sleep(1)
        alts = "[...document.querySelectorAll('figure.picture img')].map(i => i.alt)"
        assert all("left of a yellow circle'" in alt for alt in await page.value(alts))
        for count, picture in zip(counts, before, strict=True):
            assert await page.value(PICTURE.format(count)) != picture
        assert re.search(r"all 4 after \d+ ms", await page.value("document.body.innerText"))
        kept = await page.value("document.querySelectorAll('#history img').length")
        assert kept <= 3, "what was half typed stays in the history"

        drawn = PICTURE.format(counts[2])
        before = await page.value(drawn)
        await page.value("document.querySelector('#new_seed').click()")
        await page.until(f"{drawn} != {before!r}")
        await page.until(f"document.querySelectorAll('#history img').length == {kept + 1}")
        assert await page.value("document.querySelector('#seed input').value") != "0"

        await page.value("document.querySelector('#compare').click()")
        await page.until("document.querySelector('#teacher img')")
        for prompt in (
            "a blue square above a red circle",
            "a yellow triangle below a green square",
        ):
            await select_prompt(page)
            await page.paste(prompt)
            await page.until(f"document.querySelector('#history img')?.alt == {prompt!r}")
        await page.value("document.querySelector('#compare').click()")
        await page.until("document.querySelector('#teacher img')")
        await page.screenshot(SCREENSHOT)

    fetched = in_browser(served, tmp_path / "browser", act)
    elsewhere = [url for url in fetched if not url.startswith((served, "data:", "about:"))]
    assert not elsewhere
    with Image.open(SCREENSHOT) as image:
        assert image.size == (1200, 800)
    assert SCREENSHOT.stat().st_size < 300_000


def test_a_picture_can_be_downloaded(served, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()

    async def act(page):
        await page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        await page.value("document.querySelector('#steps_8 figcaption a').click()")
        for _ in range(100):
            if [*folder.glob("*.png")]:
                return
            await asyncio.sleep(0.1)

    in_browser(served, tmp_path / "browser", act)
    [path] = folder.glob("*.png")
    with Image.open(path) as image:
        assert image.size == (32, 32)
        assert "a red circle above a blue square" in image.text["slam_jax"]


def test_clients_get_their_pictures_and_files_stay_shut(served):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "page_load.py"), f"--url={served}",
         "--clients=4", "--seconds=3"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.search(r"4 clients, 3 s: [1-9]\d* pictures, 0 lost", done.stdout), done.stdout
    assert "p95" in done.stdout
    page_load = runpy.run_path(str(ROOT / "benchmarks" / "page_load.py"))
    with pytest.raises(ValueError, match="7 steps; ask for one of"):
        page_load["ask"](served, "x", 0, 7)
    for path in ("upload", "file=/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{served}/gradio_api/{path}")
