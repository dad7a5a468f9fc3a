"""Images from prompts: a student's in a few steps, any other model's by DDIM.

    python -m slam_jax.sample --prompt "a red circle above a blue square" --out out.png
    python -m slam_jax.sample --model ORG/NAME --prompts prompts.txt --out pictures
    python -m slam_jax.sample --model runs/tiny/student --steps 2 --out out.png \
        --prompt "a green triangle left of a yellow cross"

On an NVIDIA GPU of Ampere or later: --compute_dtype=bfloat16 --attention=cudnn.
Without --model the student draws that comes with the package; it knows two coloured shapes.
"""

import io
import itertools
import json
import math
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8

from slam_jax import command, interactive, pipeline, settings, students
from slam_jax.data import image as image_file
from slam_jax.errors import UserError
from slam_jax.evaluation.noise import Noise
from slam_jax.nets import kernels, unet
from slam_jax.runtime import bucket, folder, images, log, mesh
from slam_jax.weights import embedded, hub, lora, pretrained

_MODEL = flags.DEFINE_string(
    "model", None,
    "Model folder in diffusers' layout, here or gs://BUCKET/FOLDER, ORG/NAME on the Hugging Face "
    "hub, or a single file; the embedded student unless given.",
)  # fmt: skip
_REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit on the hub.")
_VARIANT = flags.DEFINE_string("variant", "", "fp16 for files *.fp16.safetensors.")
_CONFIG = flags.DEFINE_string(
    "model_config", "", "For a single file: folder or ORG/NAME with its configs and tokenizer."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to draw.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with a prompt a line, instead of --prompt.")
_LORA = flags.DEFINE_multi_string("lora", [], "FILE:SCALE of a LoRA to add; may be repeated.")
_STEPS = flags.DEFINE_integer("steps", None, "Network calls per image: 4 for students, else 50.")
_W = flags.DEFINE_float("w", None, "Guidance of a model that is no student (guidance_scale - 1).")
_SEED = flags.DEFINE_integer("seed", 0, "Noise of image i depends on the seed and i alone.")
_NOISE = flags.DEFINE_string(
    "noise", None,
    "File.npy, [steps, B, h, w, C] float32: the starting latents, then the fresh noise of each "
    "later step, which DDIM ignores. Instead of --seed.",
)  # fmt: skip
_INIT_IMAGE = flags.DEFINE_string(
    "init_image", None, "Picture to start from (students only); its middle square is taken."
)
_STRENGTH = flags.DEFINE_float("strength", 0.8, "Of the noise on --init_image, in (0, 1].")
_OUT = flags.DEFINE_string(
    "out", None,
    "File.png, a grid; File.npy, [B, H, W, 3] float32 in [0, 1]; or a folder, for a numbered PNG "
    "per prompt with the settings in its text chunk.",
    allow_override=True,  # other programs have a flag of that name
)  # fmt: skip
_NETWORKS = command.network_flags(kernels.BY_NAME)

_COLUMNS = 4


def main() -> None:
    out = Path(_OUT.value)
    if out.suffix not in ("", ".png", ".npy"):
        raise UserError(f"--out {out} must end in .png or .npy, or name a folder")
    folder.check_writable(out if out.suffix == "" else out.parent)
    prompts = _read_prompts(_PROMPT.value, _PROMPTS.value)
    model, said = embedded.named(_MODEL.value)
    with bucket.copied("model", model) as name:
        steps = _sample(name, prompts, out)
    print(f"{out}: drawn in {steps} steps by {said}")


def _sample(model_name: str, prompts: list[str], out: Path) -> int:
    """Writes the pictures; how many steps they were drawn in."""
    pipeline.dtype(_NETWORKS()["dtype"])
    model = pretrained.load(hub.find(model_name, _REVISION.value, _VARIANT.value, _CONFIG.value))
    for path, scale in map(_file_and_scale, _LORA.value):
        model = lora.apply(model, path, scale)
    is_student = students.is_student(model)
    if is_student and _W.value is not None:
        raise UserError(f"--w {_W.value}: a student's guidance was fixed in training; leave it out")
    if _INIT_IMAGE.value is not None and not is_student:
        raise UserError(f"--init_image needs a few-step student, and {_MODEL.value} is none")
    steps = (4 if is_student else 50) if _STEPS.value is None else _STEPS.value
    strength = 1.0 if _INIT_IMAGE.value is None else _STRENGTH.value
    interactive.check_steps(model.scheduler, steps, strength)
    size, noise_of = _noise(_NOISE.value, model, steps, len(prompts))
    picture = _init_image(_INIT_IMAGE.value, size)
    drawer = interactive.start(model, size, **_NETWORKS(), devices=mesh.make((("data", -1),)))
    _save(out, _draw_all(drawer, prompts, steps, noise_of, picture), prompts, steps)
    return steps


def _read_prompts(prompt: str | None, path: str | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise UserError("give one of --prompt and --prompts")
    if path is None:
        if not settings.is_text(prompt):
            raise UserError(f"--prompt {prompt!a} is not UTF-8")
        return [prompt]
    try:
        prompts = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts {path}: {error}") from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; write one a line")
    return prompts


def _file_and_scale(value: str) -> tuple[Path, float]:
    path, _, scale = value.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise UserError(f"--lora {value} must be FILE:SCALE, such as style.safetensors:0.8")
    return Path(path), number


def _noise(
    path: str | None, model: pretrained.Pretrained, steps: int, count: int
) -> tuple[tuple[int, int], Callable[[np.ndarray], interactive.Seeds | Noise]]:
    """Height and width of images, and (their numbers) -> noise, or what it is drawn from."""
    if path is None:
        return interactive.trained_size(model), _seeds
    channels = unet.from_config(model.unet.config).in_channels
    noise, factor = (
        _read_noise(path, (steps, count, channels)),
        pipeline.pixels_per_latent(model),
    )
    size = (factor * noise.shape[2], factor * noise.shape[3])
    return size, partial(np.take, noise, axis=1)


def _read_noise(path: str, expected: tuple[int, int, int]) -> Noise:
    """The array in a file; UserError unless its steps, images and channels are those expected."""
    try:
        with open(path, "rb") as file:
            noise = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, tokenize.TokenError) as error:
        raise UserError(f"cannot read --noise {path}: {error}; write it with np.save") from None
    steps, count, channels = expected
    shape = noise.shape
    if noise.dtype.kind != "f" or len(shape) != 5 or (shape[0], shape[1], shape[4]) != expected:
        raise UserError(
            f"--noise {path} has {noise.dtype} {list(shape)}; {steps} steps and {count} prompts "
            f"need [{steps}, {count}, h, w, {channels}]"
        )
    return noise.astype(np.float32)


def _draw_all(
    drawer: interactive.Drawer, prompts: list[str], steps: int,
    noise_of: Callable[[np.ndarray], interactive.Seeds | Noise],
    picture: UInt8[np.ndarray, "1 H W 3"] | None,
) -> Iterator[Float[np.ndarray, "B H W 3"]]:  # fmt: skip
    """Batch by batch over all devices."""
    command.warn_of_cut(prompts, drawer.tokens.cut(prompts), drawer.tokens.first.length)
    size = interactive.most_at_once(drawer)
    w = interactive.DEFAULT_W if _W.value is None else _W.value
    with log.bar(0, len(prompts)) as progress, log.phase(progress, "drawing"):
        for first in range(0, len(prompts), size):
            numbers = np.arange(first, min(first + size, len(prompts)))
            begin = picture if picture is None else interactive.Start(picture, _seeds(numbers))
            drawn = interactive.draw(
                drawer, prompts[first : first + size], noise_of(numbers), steps, w, begin,
                1.0 if begin is None else _STRENGTH.value,
            )  # fmt: skip
            progress.bar.update(len(numbers))
            yield jax.device_get(drawn.images)[: len(numbers)]


def _seeds(numbers: np.ndarray) -> interactive.Seeds:
    """Of images of those numbers."""
    seed = np.full(numbers.shape, _SEED.value % 2**32, np.uint32)
    return interactive.Seeds(seed, numbers.astype(np.uint32))


def _init_image(
    path: str | None, image_size: tuple[int, int]
) -> UInt8[np.ndarray, "1 H W 3"] | None:
    """The picture, cut and resized to the model's size."""
    if path is None:
        return None
    height, width = image_size
    if height != width:
        raise UserError(f"--init_image is for square images; the noise is for {height} x {width}")
    return image_file.read(Path(path), height)[None]


def _save(
    out: Path, batches: Iterator[Float[np.ndarray, "B H W 3"]], prompts: list[str], steps: int
) -> None:
    """A grid, an array, or a folder of pictures, each written as soon as it is drawn."""
    if out.suffix == "":
        for number, drawn in enumerate(itertools.chain.from_iterable(batches)):
            notes = _settings(number, prompts[number], steps)
            content = images.png(images.quantize(drawn), slam_jax=notes)
            folder.write_atomic(out / f"{number:06d}.png", content)
        return
    drawn = np.concatenate(list(batches))
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, drawn)
        folder.write_atomic(out, buffer.getbuffer())
    else:
        folder.write_atomic(out, images.png(images.grid(_in_rows(drawn))))


def _settings(number: int, prompt: str, steps: int) -> str:
    """What would draw picture `number` again, as JSON."""
    given = (_REVISION, _VARIANT, _CONFIG, _LORA, _W, _SEED, _NOISE, _INIT_IMAGE, _STRENGTH)
    values = {flag.name: flag.value for flag in given if flag.value not in (None, "", [])}
    values |= {"compute_dtype": _NETWORKS()["dtype"], "attention": _NETWORKS()["attention"]}
    model, _ = embedded.named(_MODEL.value)
    about = {"prompt": prompt, "number": number, "steps": steps, "model": model}
    return json.dumps({**about, **values})


def _in_rows(drawn: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "R C H W 3"]:
    """Rows of up to _COLUMNS images, the last filled up with white."""
    columns = min(_COLUMNS, len(drawn))
    missing = -len(drawn) % columns
    filled = np.concatenate([drawn, np.ones((missing, *drawn.shape[1:]), drawn.dtype)])
    return filled.reshape(-1, columns, *drawn.shape[1:])


if __name__ == "__main__":
    command.run(main, required=("out",))
