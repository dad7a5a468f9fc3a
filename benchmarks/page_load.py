"""Ask a live page for pictures from many clients at once; each asks again when it has its answer.

    python benchmarks/page_load.py --url http://127.0.0.1:7860 --clients 8 --seconds 60

Prints how many pictures came and how many requests were lost, and the milliseconds from asking to
the picture. Every prompt is new, so that each has to be encoded too.
"""

import argparse
import base64
import io
import json
import statistics
import threading
import time
import urllib.error
import urllib.request

from PIL import Image

_STEPS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="where the page is")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    taken, lost = load(options.url.rstrip("/"), options.clients, options.seconds)
    print(f"{options.clients} clients, {options.seconds:g} s: {len(taken)} pictures, {lost} lost")
    if len(taken) > 1:
        cuts = statistics.quantiles(taken, n=20, method="inclusive")
        print(
            f"milliseconds: p50 {1e3 * cuts[9]:.0f}, p95 {1e3 * cuts[18]:.0f}, "
            f"most {1e3 * max(taken):.0f}"
        )


def load(url: str, clients: int, seconds: float) -> tuple[list[float], int]:
    """Seconds that each picture took, and the number of requests without one."""
    taken, lost, end = [], [], time.monotonic() + seconds

    def client(number: int) -> None:
        asked = 0
        while time.monotonic() < end:
            began = time.perf_counter()
            try:
                ask(url, f"client {number} asks {asked}", asked, _STEPS[asked % len(_STEPS)])
            except (OSError, ValueError) as error:
                lost.append(f"{type(error).__name__}: {error}")
                print(lost[-1])
            else:
                taken.append(time.perf_counter() - began)
            asked += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return taken, len(lost)


def ask(url: str, prompt: str, seed: int, steps: int) -> Image.Image:
    """The picture. OSError if the page cannot be reached, ValueError if it sends none."""
    request = urllib.request.Request(
        f"{url}/gradio_api/call/picture", json.dumps({"data": [prompt, seed, steps]}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/picture/{event}", timeout=60) as answer:
        told = answer.read().decode()
    # Lines "event: complete" and "data: [...]".
    name, _, data = told.strip().split("\n\n")[-1].partition("\n")
    if name != "event: complete":
        raise ValueError(f"no picture: {told[-300:]}")
    [found] = json.loads(data.removeprefix("data: "))
    image = Image.open(io.BytesIO(base64.b64decode(found["png"])))
    image.load()
    return image


if __name__ == "__main__":
    main()
