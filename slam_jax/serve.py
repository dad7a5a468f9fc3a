"""A live page: type a prompt, and the images change as you type.

    python -m slam_jax.serve
    python -m slam_jax.serve --model runs/tiny/student --teacher assets/tiny_sd --w 8

Without --model the student draws that comes with the package; it knows two coloured shapes. Needs
pip install 'slam_jax[serve]'. Ctrl-C ends it.
"""

import contextlib
import importlib.util
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from absl import flags
from jaxtyping import UInt8

from slam_jax import command, drawing_queue, interactive, live_page
from slam_jax.drawing_queue import Wanted
from slam_jax.errors import UserError
from slam_jax.nets import kernels
from slam_jax.runtime import bucket
from slam_jax.weights import embedded, hub

_MODEL = flags.DEFINE_string(
    "model", None, "Model folder in diffusers' layout, here or gs://BUCKET/FOLDER, or ORG/NAME on "
    "the Hugging Face hub; the embedded student unless given.",
    allow_override=True,  # other programs have a flag of that name
)  # fmt: skip
_TEACHER = flags.DEFINE_string("teacher", None, "Model to compare with, drawn by DDIM in 50 steps.")
_W = flags.DEFINE_float(
    "w", None, "Guidance of models that are no students (guidance_scale - 1); 6.5 unless given.",
    allow_override=True,
)  # fmt: skip
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets everybody in who reaches this machine."
)
_PORT = flags.DEFINE_integer(
    "port", 7860, "Port to listen at; 0 for one that is free.", lower_bound=0, upper_bound=65535
)
_BATCH = flags.DEFINE_enum("batch", "4", ["1", "2", "4", "8", "16"], "Pictures drawn at once.")
_WAITING = flags.DEFINE_integer("waiting", 64, "Pictures that may wait; more are refused.")
_NETWORKS = command.network_flags(kernels.BY_NAME)

_EXAMPLE = "a red circle above a blue square"
_STUDENT_STEPS = (1, 2, 4, 8)
_PLAIN_STEPS = (4, 8, 20, 50)  # of a model that is no student
_TEACHER_STEPS = 50


def main() -> None:
    _check_installed()
    if _WAITING.value < len(_STUDENT_STEPS):
        raise UserError(
            f"--waiting {_WAITING.value}: a page asks for {len(_STUDENT_STEPS)} at once"
        )
    model, said = embedded.named(_MODEL.value)
    with listening(_HOST.value, _PORT.value) as heard:
        drawers = {"student": _started(model)}
        if _TEACHER.value is not None:
            drawers["teacher"] = _started(_TEACHER.value)
        if "teacher" in drawers and drawers["teacher"].is_student:
            raise UserError(f"--teacher {_TEACHER.value} is a few-step student; give its teacher")
        shown = _shown(said, drawers)
        _prepare(drawers, shown.steps)
        _serve(drawers, shown, heard)


def _check_installed() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the live page needs Gradio: pip install 'slam_jax[serve]'")


def listening(host: str, port: int) -> socket.socket:
    """A socket bound there, which answers nobody yet. UserError if that cannot be."""
    try:
        [family, kind, protocol, _, address], *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        with contextlib.ExitStack() as stack:
            heard = stack.enter_context(socket.socket(family, kind, protocol))
            heard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            heard.bind(address)
            stack.pop_all()
    except OSError as error:
        raise UserError(
            f"cannot listen at --host {host} --port {port}: {error}; another --port may be free"
        ) from None
    return heard


def _started(name: str) -> interactive.Drawer:
    with bucket.copied("model", name) as folder:
        return interactive.start(hub.find(folder, "", "", ""), **_NETWORKS())


def _shown(name: str, drawers: Mapping[str, interactive.Drawer]) -> live_page.Shown:
    drawer = drawers["student"]
    height, width = drawer.image_size
    said = f"### {name}, {width} × {height}"
    if not drawer.is_student:
        said += (
            f"\n**This model is no few-step student**: it is drawn by DDIM with guidance "
            f"w = {_w():g}, for which few steps are too few. `make demo` trains a student."
        )
    steps = _STUDENT_STEPS if drawer.is_student else _PLAIN_STEPS
    return live_page.Shown(said, _EXAMPLE, steps, _TEACHER_STEPS if "teacher" in drawers else None)


def _prepare(drawers: Mapping[str, interactive.Drawer], steps: Sequence[int]) -> None:
    """Compiles all that the page may ask for, so that nobody waits for it later.

    Each number of steps of a model that is no student is a program: those draw one by one.
    """
    print("preparing (seconds to minutes the first time; kept for the next) …", flush=True)
    sizes = [size for size in interactive.BATCH_SIZES if size <= int(_BATCH.value)]
    for name, drawer in drawers.items():
        if drawer.is_student:
            interactive.prepare(drawer, sizes)
            continue
        for count in steps if name == "student" else (_TEACHER_STEPS,):
            interactive.prepare(drawer, [1], count)


def _serve(
    drawers: Mapping[str, interactive.Drawer], shown: live_page.Shown, heard: socket.socket
) -> None:
    import uvicorn

    def draw(wanted: Sequence[Wanted]) -> UInt8[np.ndarray, "B H W 3"]:
        drawer = drawers[wanted[0].model]
        batches = [wanted] if drawer.is_student else [[each] for each in wanted]
        return np.concatenate([_pictures(drawer, batch) for batch in batches])

    queue = drawing_queue.start(draw, _WAITING.value, int(_BATCH.value))
    with tempfile.TemporaryDirectory(prefix="slam_jax_page") as folder:
        app = live_page.build(queue, shown, folder)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        )
        ended = _in_thread(partial(server.run, [heard]))
        try:
            while not server.started and not ended.wait(0.05):
                pass
            host, port = heard.getsockname()[:2]
            print(f"ready: http://{host}:{port} (Ctrl-C ends it)", flush=True)
            ended.wait()
        except KeyboardInterrupt:
            drawing_queue.close(queue)
            server.should_exit = True
            ended.wait()
            raise KeyboardInterrupt("the page is closed") from None


def _in_thread(run: Callable[[], None]) -> threading.Event:
    """Runs it in a thread, since the server would send itself a Ctrl-C again that it has caught.

    What is set when it has ended: a join that Ctrl-C has interrupted takes the thread for ended.
    """
    ended = threading.Event()

    def run_and_tell() -> None:
        try:
            run()
        finally:
            ended.set()

    threading.Thread(target=run_and_tell, daemon=True).start()
    return ended


def _pictures(drawer: interactive.Drawer, wanted: Sequence[Wanted]) -> UInt8[np.ndarray, "B H W 3"]:
    prompts, seeds = [each.prompt for each in wanted], [each.seed for each in wanted]
    return interactive.pictures(drawer, prompts, seeds, wanted[0].steps, _w())


def _w() -> float:
    return interactive.DEFAULT_W if _W.value is None else _W.value


if __name__ == "__main__":
    command.run(main, required=())
