"""A model that draws whenever it is asked: prompts and seeds in, pictures out.

    drawer = interactive.start(pretrained.find("runs/tiny/student"))
    pixels = interactive.pictures(drawer, ["a red circle above a blue square"], [0], steps=4)

Nothing is compiled for a new prompt, seed or guidance, nor for another number of a student's steps
up to MOST_STEPS: one program serves all of them. There is one for each of BATCH_SIZES, to which a
request is filled up. In fact there are two, from token ids to what the UNet is told, and from there
to pixels, so that a prompt that was there before is not encoded again. Several threads may ask.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from slam_jax import drawing_programs, pipeline, students
from slam_jax.data import text_inputs
from slam_jax.diffusion import sampler, schedule
from slam_jax.drawing_programs import ORIGINAL_STEPS, Drawn, Seeds, Start
from slam_jax.errors import UserError
from slam_jax.evaluation.noise import Noise
from slam_jax.nets import unet
from slam_jax.runtime import apart, executables, mesh
from slam_jax.weights import pretrained

BATCH_SIZES = (1, 2, 4, 8, 16)  # on each device
MOST_STEPS = 8  # of the program that serves few; others serve up to 16, 32, ...
DEFAULT_W = 6.5
_MOST_TEXTS = 1024  # prompts whose encoding is remembered, 236 kB each of Stable Diffusion 1.x's


@dataclasses.dataclass(frozen=True)
class Drawer:
    """A model on the devices, and what it has compiled and encoded so far."""

    model: pretrained.Pretrained  # its parameters on the devices
    tokens: text_inputs.Tokenizers
    image_size: tuple[int, int]  # height and width, pixels
    latent_shape: tuple[int, int, int]
    dtype: str
    attention: str
    devices: Mesh
    is_student: bool
    programs: dict[tuple, jax.stages.Compiled]
    texts: collections.OrderedDict[bytes, Any]  # by token ids, the ones used last at the end
    lock: Any


def start(
    model: pretrained.Pretrained, image_size: tuple[int, int] | None = None,
    dtype: str = "float32", attention: str = "xla", devices: Mesh | None = None,
) -> Drawer:  # fmt: skip
    """The model, its parameters read or unread, whole on every device.

    image_size: height and width, pixels; those that the model was trained for unless given. dtype:
    in which it computes. attention: how the UNet's is computed, as in a config; UserError if that
    is not for the devices. devices: along one axis, "data"; the first of this machine unless given.
    """
    at_rest = pipeline.at_rest(pipeline.dtype(dtype))
    devices = mesh.make((("data", -1),), jax.devices()[:1]) if devices is None else devices
    apart.check_attention(attention, devices)
    everywhere = mesh.replicated(devices)
    model = pretrained.load(
        model, place=lambda path, x: jax.device_put(at_rest(path, x), everywhere)
    )
    placed = {
        name: part._replace(params=jax.device_put(part.params, everywhere))
        for name, part in model._asdict().items()
        if isinstance(part, pretrained.Component)
    }
    height, width = trained_size(model) if image_size is None else image_size
    factor = pipeline.pixels_per_latent(model)
    channels = unet.from_config(model.unet.config).in_channels
    return Drawer(
        model=model._replace(**placed),
        tokens=text_inputs.read(model.tokenizer, model.tokenizer_2),
        image_size=(height, width),
        latent_shape=(height // factor, width // factor, channels),
        dtype=dtype,
        attention=attention,
        devices=devices,
        is_student=students.is_student(model),
        programs={},
        texts=collections.OrderedDict(),
        lock=threading.RLock(),
    )


def trained_size(model: pretrained.Pretrained) -> tuple[int, int]:
    """Height and width in pixels of the images that the model was trained for."""
    size = {"sample_size": None, **model.unet.config}["sample_size"]
    if size is None:
        raise UserError("unet/config.json lacks sample_size, which says how large images are")
    height, width = (size, size) if isinstance(size, int) else size
    factor = pipeline.pixels_per_latent(model)
    return factor * height, factor * width


def check_steps(scheduler: Mapping, steps: int, strength: float = 1.0) -> None:
    """UserError for steps that a model with that scheduler cannot make. Touches no device."""
    _times(scheduler, steps, strength)


def _times(scheduler: Mapping, steps: int, strength: float) -> np.ndarray:
    """The training times that a student visits, or guided DDIM."""
    known = {"original_inference_steps": ORIGINAL_STEPS, **scheduler}
    return sampler.host_times(
        steps, known["original_inference_steps"], schedule.num_timesteps(known), strength
    )


def pictures(
    drawer: Drawer, prompts: Sequence[str], seeds: Sequence[int], steps: int, w: float = DEFAULT_W
) -> UInt8[np.ndarray, "B H W 3"]:
    """A picture of each prompt: the one that `sample --prompt PROMPT --seed SEED` draws.

    steps: network calls. w: guidance of a model that is no student (guidance_scale - 1). UserError
    for steps that the model cannot make.
    """
    most, drawn = most_at_once(drawer), []
    for first in range(0, len(prompts), most):
        seed = np.array([each % 2**32 for each in seeds[first : first + most]], np.uint32)
        some = draw(
            drawer, prompts[first : first + most], Seeds(seed, np.zeros_like(seed)), steps, w
        )
        drawn.append(jax.device_get(some.pixels)[: len(seed)])
    return np.concatenate(drawn)


def prepare(drawer: Drawer, batch_sizes: Iterable[int] = BATCH_SIZES, steps: int = 4) -> None:
    """Compiles what so many pictures at once need, or reads it from the user's cache folder."""
    for size in batch_sizes:
        # As many prompts, none of which was there before, so that they are encoded in one batch.
        pictures(drawer, [f"{size}.{number}" for number in range(size)], [0] * size, steps)


def most_at_once(drawer: Drawer) -> int:
    """Images in the largest batch that is drawn at once."""
    return BATCH_SIZES[-1] * drawer.devices.size


def draw(
    drawer: Drawer, prompts: Sequence[str], noise: Seeds | Noise, steps: int,
    w: float = DEFAULT_W, begin: Start | None = None, strength: float = 1.0,
) -> Drawn:  # fmt: skip
    """An image of each of at most most_at_once prompts, and after them such as fill up the batch.

    noise: [steps, B, h, w, C], the starting latents, then the fresh noise of each later step, which
    DDIM ignores; or what that is drawn from. begin: for students, a picture to start from;
    strength: of the noise on it, in (0, 1].
    """
    fill = partial(_filled, _batch_size(drawer, len(prompts)))
    rows, everywhere = mesh.rows_sharding(drawer.devices), mesh.replicated(drawer.devices)
    text = jax.device_put(fill(_stacked(_texts(drawer, prompts))), rows)
    if isinstance(noise, Seeds):
        noise = jax.device_put(fill(noise), rows)
    if not drawer.is_student:
        return _guided(drawer, text, noise, steps, w)
    if begin is not None:
        seeds = jax.device_put(fill(begin.seeds), rows)
        begin = Start(jax.device_put(begin.picture, everywhere), seeds)
    return _few_step(drawer, text, noise, steps, begin, strength)


def _few_step(
    drawer: Drawer, text, noise: Seeds | Noise, steps: int, begin: Start | None, strength: float
) -> Drawn:
    visited = _times(drawer.model.scheduler, steps, strength)
    slots = max(MOST_STEPS, 1 << (steps - 1).bit_length())
    times = np.pad(visited, (0, slots - steps))
    if not isinstance(noise, Seeds):
        noise = _columns(drawer, noise, slots, len(jax.tree.leaves(text)[0]))
    known = jax.device_put((times, np.int32(steps)), mesh.replicated(drawer.devices))
    return _run(drawer, drawing_programs.few_step, (), text, noise, *known, begin)


def _guided(drawer: Drawer, text, noise: Seeds | Noise, steps: int, w: float) -> Drawn:
    if not isinstance(noise, Seeds):
        noise = _columns(drawer, noise[:1], 1, len(jax.tree.leaves(text)[0]))
    weight = jax.device_put(np.float32(w), mesh.replicated(drawer.devices))
    return _run(drawer, drawing_programs.guided, (steps,), text, _null_text(drawer), noise, weight)


def _run(drawer: Drawer, build: Callable, given: tuple, text, *arguments) -> Drawn:
    params = (drawer.model.unet.params, drawer.model.vae.params)
    known = (drawer.attention, drawer.latent_shape, *given)
    return _program(drawer, build, known, params, text, *arguments)


def _program(drawer: Drawer, build: Callable, given: tuple, params: tuple, *arguments) -> Any:
    """The result of the program that `build` makes, compiled if it was not yet for such shapes."""
    leaves, tree = jax.tree.flatten(arguments)
    key = (build, given, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    with drawer.lock:
        if key not in drawer.programs:
            bare = pretrained.without_params(drawer.model)
            with apart.scope(drawer.devices):
                drawer.programs[key] = executables.load(
                    build, (bare, drawer.dtype, *given), *params, *arguments
                )
    return drawer.programs[key](*params, *arguments)


def memory(drawer: Drawer) -> int:
    """Bytes on each device that the largest program so far needs, parameters included."""
    found = (program.memory_analysis() for program in drawer.programs.values())
    needed = (
        each.argument_size_in_bytes + each.output_size_in_bytes + each.temp_size_in_bytes
        + each.generated_code_size_in_bytes
        for each in found
    )  # fmt: skip
    return max(needed, default=0)


def _texts(drawer: Drawer, prompts: Sequence[str]) -> list:
    """What the UNet is told of each prompt, on the host; those that are new are encoded."""
    tokens = drawer.tokens.encode(list(prompts), drawer.image_size)
    keys = [b"".join(each[i].tobytes() for each in tokens.values()) for i in range(len(prompts))]
    with drawer.lock:
        new = {key: i for i, key in enumerate(keys) if key not in drawer.texts}
        if new:
            fill = partial(_filled, _batch_size(drawer, len(new)))
            chosen = fill({name: each[list(new.values())] for name, each in tokens.items()})
            chosen = jax.device_put(chosen, mesh.rows_sharding(drawer.devices))
            params = (pipeline.text_params(drawer.model),)
            found = jax.device_get(_program(drawer, drawing_programs.text, (), params, chosen))
            for i, key in enumerate(new):
                drawer.texts[key] = jax.tree.map(lambda each, i=i: each[i], found)
        for key in keys:
            drawer.texts.move_to_end(key)
        texts = [drawer.texts[key] for key in keys]
        while len(drawer.texts) > _MOST_TEXTS:
            drawer.texts.popitem(last=False)
    return texts


def _null_text(drawer: Drawer) -> Any:
    tokens = drawer.tokens.encode([""], drawer.image_size)
    empty = jax.device_put(tokens, mesh.replicated(drawer.devices))
    params = (pipeline.text_params(drawer.model),)
    return _program(drawer, drawing_programs.null_text, (), params, empty)


def _batch_size(drawer: Drawer, count: int) -> int:
    """Of the smallest batch that holds so many."""
    devices = drawer.devices.size
    return devices * next(size for size in BATCH_SIZES if size * devices >= count)


def _stacked(texts: list) -> Any:
    return jax.tree.map(lambda *rows: np.stack(rows), *texts)


def _filled(size: int, tree: Any) -> Any:
    """Arrays [B, ...] as [size, ...], the examples over and over."""
    return jax.tree.map(lambda each: each[np.arange(size) % len(each)], tree)


def _columns(drawer: Drawer, noise: Noise, slots: int, size: int) -> jax.Array:
    """Noise as [slots, size, h, w, C], with zeros for steps that are not made."""
    padded = np.pad(noise, ((0, slots - len(noise)), *[(0, 0)] * 4))
    columns = NamedSharding(drawer.devices, P(None, "data"))
    return jax.device_put(padded[:, np.arange(size) % noise.shape[1]], columns)
