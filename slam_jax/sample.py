"""Images from prompts: a student's in a few steps, any other model's by DDIM.

    python -m slam_jax.sample --model runs/tiny/student --steps 4 --out out.png \
        --prompt "a red circle above a blue square"
    python -m slam_jax.sample --model ORG/NAME --prompts prompts.txt --out pictures
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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, UInt8

from slam_jax import command, pipeline, students
from slam_jax.data import image as image_file
from slam_jax.data import text_inputs
from slam_jax.diffusion import parameterization, schedule
from slam_jax.errors import UserError
from slam_jax.evaluation import noise as image_noise
from slam_jax.evaluation.noise import Noise
from slam_jax.nets import unet
from slam_jax.runtime import bucket, folder, images, log, mesh
from slam_jax.weights import hub, lora, pretrained

_MODEL = flags.DEFINE_string(
    "model", None,
    "Model folder in diffusers' layout, here or gs://BUCKET/FOLDER, ORG/NAME on the Hugging Face "
    "hub, or a single file.",
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

_BATCH_SIZE = 16  # on each device
_COLUMNS = 4
_DEFAULT_W = 6.5
_ORIGINAL_STEPS = 50
# Apart from those of the images, whose numbers are the first keys.
_POSTERIOR_STREAM = 2**32 - 1


def main() -> None:
    out = Path(_OUT.value)
    if out.suffix not in ("", ".png", ".npy"):
        raise UserError(f"--out {out} must end in .png or .npy, or name a folder")
    folder.check_writable(out if out.suffix == "" else out.parent)
    prompts = _read_prompts(_PROMPT.value, _PROMPTS.value)
    with bucket.copied("model", _MODEL.value) as name:
        _sample(name, prompts, out)


def _sample(model_name: str, prompts: list[str], out: Path) -> None:
    model = pretrained.load(hub.find(model_name, _REVISION.value, _VARIANT.value, _CONFIG.value))
    for path, scale in map(_file_and_scale, _LORA.value):
        model = lora.apply(model, path, scale)
    is_student = students.is_student(model)
    if is_student and _W.value is not None:
        raise UserError(f"--w {_W.value}: a student's guidance was fixed in training; leave it out")
    if _INIT_IMAGE.value is not None and not is_student:
        raise UserError(f"--init_image needs a few-step student, and {_MODEL.value} is none")
    steps = (4 if is_student else 50) if _STEPS.value is None else _STEPS.value
    size, noise_of = _noise(_NOISE.value, model, steps, len(prompts), _SEED.value)
    image = _init_image(_INIT_IMAGE.value, size)
    draw = _few_step(model, steps) if is_student else _ddim(model, steps, _W.value)
    _save(out, _draw_all(draw, model, prompts, size, noise_of, image), prompts, steps)


def _read_prompts(prompt: str | None, path: str | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise UserError("give one of --prompt and --prompts")
    if path is None:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
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
    path: str | None, model: pretrained.Pretrained, steps: int, count: int, seed: int
) -> tuple[tuple[int, int], Callable[[np.ndarray], Noise]]:
    """Height and width of images, and (their numbers) -> noise.

    From the file, or normal, from (seed, number) alone, so that batches do not matter.
    """
    channels, factor = (
        unet.from_config(model.unet.config).in_channels,
        pipeline.pixels_per_latent(model),
    )
    if path is not None:
        noise = _read_noise(path, (steps, count, channels))
        size = (factor * noise.shape[2], factor * noise.shape[3])
        return size, partial(np.take, noise, axis=1)
    size = {"sample_size": None, **model.unet.config}["sample_size"]
    if size is None:
        raise UserError(f"{_MODEL.value}/unet/config.json lacks sample_size; give --noise")
    height, width = (size, size) if isinstance(size, int) else size
    noise_of = image_noise.of_images(seed, steps, (height, width, channels))
    return (factor * height, factor * width), noise_of


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


def _few_step(model: pretrained.Pretrained, steps: int) -> Callable:
    """(unet_params, vae_params, text, null_text, noise, image, keys) -> images.

    image: None, or uint8 [1, H, W, 3] to start from; keys, one an image, draw its latents.
    """
    original = {"original_inference_steps": _ORIGINAL_STEPS, **model.scheduler}
    strength = 1.0 if _INIT_IMAGE.value is None else _STRENGTH.value
    sample = pipeline.few_step(
        pipeline.student(model.unet.config, np.float32, remat=False),
        *_shared(model), steps, original["original_inference_steps"], strength,
    )  # fmt: skip
    encode = pipeline.encode_image(model.vae.config, np.float32)

    def draw(unet_params, vae_params, text, null_text, noise, image, keys):
        del null_text
        start = image
        if image is not None:
            start = jax.vmap(lambda key: encode(vae_params, {"image": image}, key)[0])(keys)
        return sample(unet_params, vae_params, text, noise, start)

    return draw


def _ddim(model: pretrained.Pretrained, steps: int, w: float | None) -> Callable:
    """(unet_params, vae_params, text, null_text, noise, None, keys) -> images."""
    sample = pipeline.ddim(
        pipeline.teacher(model.unet.config, np.float32), *_shared(model),
        steps, _ORIGINAL_STEPS, _DEFAULT_W if w is None else w,
    )  # fmt: skip

    def draw(unet_params, vae_params, text, null_text, noise, image, keys):
        del image, keys
        return sample(unet_params, vae_params, text, null_text, noise[0])

    return draw


def _shared(model: pretrained.Pretrained) -> tuple:
    return (
        pipeline.decode(model.vae.config, np.float32),
        schedule.from_config(model.scheduler),
        parameterization.prediction_from_config(model.scheduler),
    )


def _draw_all(
    draw: Callable,
    model: pretrained.Pretrained,
    prompts: list[str],
    image_size: tuple[int, int],
    noise_of: Callable[[np.ndarray], Noise],
    image: UInt8[np.ndarray, "1 H W 3"] | None,
) -> Iterator[Float[np.ndarray, "B H W 3"]]:
    """Batch by batch over all devices, the last one filled up, so that it compiles once."""
    tokens = text_inputs.read(model.tokenizer, model.tokenizer_2)
    command.warn_of_cut(prompts, tokens.cut(prompts), tokens.first.length)
    encoded = tokens.encode(prompts, image_size)
    devices = mesh.make((("data", -1),))
    params = (model.unet.params, model.vae.params, pipeline.text_params(model))
    (unet_params, vae_params, text_params), image = jax.device_put(
        (params, image), mesh.replicated(devices)
    )
    encode_text = jax.jit(pipeline.encode_text(model, np.float32))
    encode_null_text = jax.jit(pipeline.encode_null_text(model, np.float32))
    null_text = encode_null_text(text_params, tokens.encode([""], image_size))
    posterior_key = jax.random.fold_in(jax.random.key(_SEED.value), _POSTERIOR_STREAM)

    draw = jax.jit(draw)
    size = devices.size * min(_BATCH_SIZE, -(-len(prompts) // devices.size))
    rows, columns = (NamedSharding(devices, P(*axes)) for axes in (("data",), (None, "data")))
    with log.bar(0, len(prompts)) as progress, log.phase(progress, "drawing"):
        for first in range(0, len(prompts), size):
            numbers = np.arange(first, first + size)
            chosen = numbers % len(prompts)
            text = encode_text(
                text_params, jax.device_put({k: v[chosen] for k, v in encoded.items()}, rows)
            )
            noise = jax.device_put(noise_of(chosen), columns)
            keys = image_noise.keys(posterior_key, chosen)
            drawn = draw(unet_params, vae_params, text, null_text, noise, image, keys)
            count = min(size, len(prompts) - first)
            progress.bar.update(count)
            yield jax.device_get(drawn)[:count]


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
    given = (_MODEL, _REVISION, _VARIANT, _CONFIG, _LORA, _W, _SEED, _NOISE, _INIT_IMAGE, _STRENGTH)
    values = {flag.name: flag.value for flag in given if flag.value not in (None, "", [])}
    return json.dumps({"prompt": prompt, "number": number, "steps": steps, **values})


def _in_rows(drawn: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "R C H W 3"]:
    """Rows of up to _COLUMNS images, the last filled up with white."""
    columns = min(_COLUMNS, len(drawn))
    missing = -len(drawn) % columns
    filled = np.concatenate([drawn, np.ones((missing, *drawn.shape[1:]), drawn.dtype)])
    return filled.reshape(-1, columns, *drawn.shape[1:])


if __name__ == "__main__":
    command.run(main, required=("model", "out"))
