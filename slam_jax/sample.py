"""Images from prompts: a student's in a few steps, any other model's by DDIM.

    python -m slam_jax.sample --model runs/tiny/student --steps 4 --out out.png \
        --prompt "a red circle above a blue square"
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Float

from slam_jax import command, pipeline
from slam_jax.data import text_inputs
from slam_jax.diffusion import parameterization, schedule
from slam_jax.errors import UserError
from slam_jax.nets import unet
from slam_jax.runtime import folder, images, log
from slam_jax.weights import pretrained

_MODEL = flags.DEFINE_string("model", None, "Model folder in diffusers' layout.")
_VARIANT = flags.DEFINE_string("variant", None, "fp16 for files *.fp16.safetensors.")
_PROMPT = flags.DEFINE_string("prompt", None, "What to draw.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with a prompt a line, instead of --prompt.")
_STEPS = flags.DEFINE_integer("steps", None, "Network calls per image: 4 for students, else 50.")
_W = flags.DEFINE_float("w", None, "Guidance of a model that is no student (guidance_scale - 1).")
_SEED = flags.DEFINE_integer("seed", 0, "Noise of image i depends on the seed and i alone.")
_NOISE = flags.DEFINE_string(
    "noise", None,
    "File.npy, [steps, B, h, w, C] float32: the starting latents, then the fresh noise of each "
    "later step, which DDIM ignores. Instead of --seed.",
)  # fmt: skip
_OUT = flags.DEFINE_string(
    "out", None, "File.png, a grid; or File.npy, [B, H, W, 3] float32 in [0, 1]."
)

_BATCH_SIZE = 16
_COLUMNS = 4
_DEFAULT_W = 6.5
_ORIGINAL_STEPS = 50
_Noise = Float[np.ndarray, "S B h w C"]


def main() -> None:
    out = Path(_OUT.value)
    if out.suffix not in (".png", ".npy"):
        raise UserError(f"--out {out} must end in .png or .npy")
    folder.check_writable(out.parent)
    prompts = _read_prompts(_PROMPT.value, _PROMPTS.value)
    model = pretrained.read(_MODEL.value, variant=_VARIANT.value)
    is_student = pipeline.is_student(model.unet.config)
    if is_student and _W.value is not None:
        raise UserError(f"--w {_W.value}: a student's guidance was fixed in training; leave it out")
    steps = (4 if is_student else 50) if _STEPS.value is None else _STEPS.value
    draw = _few_step(model, steps) if is_student else _ddim(model, steps, _W.value)
    noise = _read_noise(_NOISE.value, model, steps, len(prompts), _SEED.value)
    drawn = _draw_all(draw, model, prompts, noise)
    if out.suffix == ".npy":
        np.save(out, drawn)
    else:
        folder.write_atomic(out, images.png(images.grid(_in_rows(drawn))))


def _read_prompts(prompt: str | None, path: str | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise UserError("give one of --prompt and --prompts")
    if path is None:
        return [prompt]
    try:
        prompts = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts {path}: {error}") from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; write one a line")
    return prompts


def _read_noise(
    path: str | None, model: pretrained.Pretrained, steps: int, count: int, seed: int
) -> _Noise:
    """From the file, or normal: image i's from (seed, i), so that batches do not matter."""
    channels = unet.from_config(model.unet.config).in_channels
    if path is not None:
        try:
            noise = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read --noise {path}: {error}") from None
        shape = noise.shape
        if len(shape) != 5 or (shape[0], shape[1], shape[4]) != (steps, count, channels):
            raise UserError(
                f"--noise {path} has shape {list(shape)}; {steps} steps and {count} prompts "
                f"need [{steps}, {count}, h, w, {channels}]"
            )
        return noise.astype(np.float32)
    size = {"sample_size": None, **model.unet.config}["sample_size"]
    if size is None:
        raise UserError(f"{_MODEL.value}/unet/config.json lacks sample_size; give --noise")
    height, width = (size, size) if isinstance(size, int) else size
    key = jax.random.key(seed)
    each = [
        jax.random.normal(jax.random.fold_in(key, i), (steps, height, width, channels))
        for i in range(count)
    ]
    return np.stack(each, axis=1)


def _few_step(model: pretrained.Pretrained, steps: int) -> Callable:
    """(unet_params, vae_params, text, null_text, noise) -> images."""
    original = {"original_inference_steps": _ORIGINAL_STEPS, **model.scheduler}
    sample = pipeline.few_step(
        pipeline.student(model.unet.config, np.float32, remat=False),
        *_shared(model), steps, original["original_inference_steps"],
    )  # fmt: skip

    def draw(unet_params, vae_params, text, null_text, noise):
        del null_text
        return sample(unet_params, vae_params, text, noise)

    return draw


def _ddim(model: pretrained.Pretrained, steps: int, w: float | None) -> Callable:
    """(unet_params, vae_params, text, null_text, noise) -> images."""
    sample = pipeline.ddim(
        pipeline.teacher(model.unet.config, np.float32), *_shared(model),
        steps, _ORIGINAL_STEPS, _DEFAULT_W if w is None else w,
    )  # fmt: skip

    def draw(unet_params, vae_params, text, null_text, noise):
        return sample(unet_params, vae_params, text, null_text, noise[0])

    return draw


def _shared(model: pretrained.Pretrained) -> tuple:
    return (
        pipeline.decode(model.vae.config, np.float32),
        schedule.from_config(model.scheduler),
        parameterization.prediction_from_config(model.scheduler),
    )


def _draw_all(
    draw: Callable, model: pretrained.Pretrained, prompts: list[str], noise: _Noise
) -> Float[np.ndarray, "B H W 3"]:
    """Batch by batch, the last one filled up, so that all have one shape and compile once."""
    tokens = text_inputs.read(model.tokenizer, model.tokenizer_2)
    command.warn_of_cut(prompts, tokens.cut(prompts), tokens.first.length)
    factor = pipeline.pixels_per_latent(model)
    image_size = (factor * noise.shape[2], factor * noise.shape[3])
    encoded = tokens.encode(prompts, image_size)
    unet_params, vae_params, text_params = jax.device_put(
        (model.unet.params, model.vae.params, pipeline.text_params(model))
    )
    encode_text = jax.jit(pipeline.encode_text(model, np.float32))
    encode_null_text = jax.jit(pipeline.encode_null_text(model, np.float32))
    null_text = encode_null_text(text_params, tokens.encode([""], image_size))
    draw = jax.jit(draw)
    size = min(_BATCH_SIZE, len(prompts))
    drawn = []
    with log.bar(0, len(prompts)) as progress, log.phase(progress, "drawing"):
        for start in range(0, len(prompts), size):
            chosen = np.arange(start, start + size) % len(prompts)
            text = encode_text(text_params, {name: rows[chosen] for name, rows in encoded.items()})
            drawn.append(
                np.asarray(draw(unet_params, vae_params, text, null_text, noise[:, chosen]))
            )
            progress.bar.update(min(size, len(prompts) - start))
    return np.concatenate(drawn)[: len(prompts)]


def _in_rows(drawn: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "R C H W 3"]:
    """Rows of up to _COLUMNS images, the last filled up with white."""
    columns = min(_COLUMNS, len(drawn))
    missing = -len(drawn) % columns
    filled = np.concatenate([drawn, np.ones((missing, *drawn.shape[1:]), drawn.dtype)])
    return filled.reshape(-1, columns, *drawn.shape[1:])


if __name__ == "__main__":
    command.run(main, required=("model", "out"))
