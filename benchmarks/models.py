"""The models that are measured, as the project runs them, with random weights."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slam_jax import pipeline, students
from slam_jax.diffusion import parameterization, schedule
from slam_jax.distill import step
from slam_jax.nets import kernels, lora
from slam_jax.shapes import SDXLText
from slam_jax.weights import architectures, pretrained

GAMMA_DIM = 256
# Of configs/sdxl_lora.py.
_LORA_TARGETS = (
    "to_[qkv]", r"to_out\.0", "proj_(in|out)", r"ff\.net\.0\.proj", r"ff\.net\.2", "conv[12]",
    "conv_shortcut", r"(down|up)samplers\.0\.conv", "time_emb_proj",
)  # fmt: skip
_TINY = {
    "unet": dict(
        block_out_channels=[48, 96], layers_per_block=1, attention_head_dim=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=64, norm_num_groups=8,
    ),
    "vae": dict(
        block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    ),
    "text_encoder": dict(
        vocab_size=700, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    ),
}  # fmt: skip
# The demo's as SDXL: a second text encoder, pooled, sizes of images, transformers two blocks deep.
_TINY_SDXL = {
    "unet": _TINY["unet"] | dict(
        sample_size=8, attention_head_dim=[4, 8], transformer_layers_per_block=[1, 2],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=64 + 96,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48 + 6 * 16,
    ),
    "vae": _TINY["vae"],
    "text_encoder": _TINY["text_encoder"],
    "text_encoder_2": _TINY["text_encoder"] | dict(
        hidden_size=96, projection_dim=48, hidden_act="gelu",
        architectures=["CLIPTextModelWithProjection"],
    ),
}  # fmt: skip


class Lora(NamedTuple):
    """What a LoRA adds, and to which modules."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class Size(NamedTuple):
    """A model, its parameters as shapes, and the side of its images in pixels."""

    model: pretrained.Pretrained
    image_size: int
    lora: Lora | None  # None: all of the student is trained


class Start(NamedTuple):
    """The parameters that a run starts with."""

    student: Any  # what is trained of it
    teacher: Any
    vae: Any
    text_encoder: Any  # a pair in SDXL


def _tiny() -> Size:
    """The networks of the demo."""
    like = architectures.find("stable-diffusion-v1-5/stable-diffusion-v1-5")
    return Size(_with(like, _TINY), 32, None)


def _tiny_sdxl_lora() -> Size:
    like = architectures.find("stabilityai/stable-diffusion-xl-base-1.0")
    return Size(_with(like, _TINY_SDXL), 32, Lora(4, 4.0, _LORA_TARGETS))


def _with(like: pretrained.Pretrained, configs: Mapping[str, dict]) -> pretrained.Pretrained:
    """The model with networks of these configs."""
    parts = (
        pretrained.UNET, pretrained.VAE, pretrained.TEXT_ENCODER, pretrained.TEXT_ENCODER_2
    )  # fmt: skip
    networks = {
        part.name: pretrained.Component(configs[part.name], part.template(configs[part.name]))
        for part in parts if part.name in configs
    }  # fmt: skip
    return like._replace(**networks)


def _sd15() -> Size:
    return Size(architectures.find("stable-diffusion-v1-5/stable-diffusion-v1-5"), 512, None)


def _sd21() -> Size:
    return Size(architectures.find("stabilityai/stable-diffusion-2-1"), 768, None)


def _sdxl_lora() -> Size:
    found = architectures.find("stabilityai/stable-diffusion-xl-base-1.0")
    return Size(found, 1024, Lora(64, 64.0, _LORA_TARGETS))


SIZES: dict[str, Callable[[], Size]] = {
    "tiny": _tiny, "tiny_sdxl_lora": _tiny_sdxl_lora, "sd15": _sd15, "sd21": _sd21,
    "sdxl_lora": _sdxl_lora,
}  # fmt: skip


def nets(size: Size, dtype: DTypeLike, remat: str = "none", attention: str = "xla") -> step.Nets:
    """The networks as the train step takes them; remat, a key of unet.REMAT, is the student's."""
    attend = kernels.BY_NAME[attention]
    config = students.student_config(size.model.unet.config, GAMMA_DIM)
    student, student_params = pipeline.student, step.all_trained
    if size.lora:
        student = pipeline.lora_student
        student_params = partial(lora.merge, scale=size.lora.alpha / size.lora.rank)
    return step.Nets(
        student=student(config, dtype, remat, attend),
        student_params=student_params,
        teacher=pipeline.teacher(size.model.unet.config, dtype, attend),
        encode_image=pipeline.encode_image(size.model.vae.config, dtype),
        encode_text=pipeline.encode_text(size.model, dtype),
    )


def diffusion(size: Size) -> tuple[schedule.Schedule, parameterization.Prediction]:
    """The model's schedule and parameterization."""
    scheduler = size.model.scheduler
    return schedule.from_config(scheduler), parameterization.prediction_from_config(scheduler)


def parameter_shapes(size: Size) -> dict[str, Any]:
    """Trees of ShapeDtypeStruct, one for each frozen network; nothing is allocated."""
    return {
        "teacher": size.model.unet.params,
        "vae": size.model.vae.params,
        "text_encoder": pipeline.text_params(size.model),
    }


def random_parameters(shapes: Any) -> Any:
    """Numbers of mean 0 and deviation 1 / sqrt(fan in): activations neither vanish nor grow.

    Drawn on the host: on a device each of the hundred shapes would be compiled first.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.random(leaf.shape, np.float32)
        values -= np.float32(0.5)
        values *= np.float32((12 / np.prod(leaf.shape[:-1])) ** 0.5)
        return values

    return jax.tree.map(draw, shapes)


def start(size: Size, dtype: DTypeLike, parameters: Mapping[str, Any]) -> Start:
    """What training starts with: frozen networks as they are kept, the student as the teacher.

    parameters: float32, like parameter_shapes.
    """
    teacher = size.model.unet._replace(params=parameters["teacher"])
    rng = np.random.default_rng(0)
    student = students.student_of(teacher, GAMMA_DIM, students.random_cond_proj, rng)
    if size.lora:
        student = students.lora_of(teacher, student, size.lora.targets, size.lora.rank, rng)
    return Start(student.params, **at_rest(dtype)(dict(parameters)))


def at_rest(dtype: DTypeLike) -> Callable[[Any], Any]:
    """Trees of frozen networks' parameters -> as they are kept on the devices."""
    keep = pipeline.at_rest(dtype)

    def kept(path: tuple, parameter: Any) -> Any:
        # A tuple's entries have no key: SDXL's two text encoders are one.
        names = tuple(each.key for each in path if hasattr(each, "key"))
        # Asked with one number of as many dimensions, since shapes have no values to be cast.
        kind = keep(names, np.ones((1,) * parameter.ndim, np.float32)).dtype
        return parameter if parameter.dtype == kind else parameter.astype(kind)

    return partial(jax.tree_util.tree_map_with_path, kept)


def examples(size: Size, batch: int, cached: bool) -> dict[str, np.ndarray]:
    """A batch of random tokens, and pixels or, as a cache holds them, moments of latents."""
    rng = np.random.default_rng(1)
    side = size.image_size
    if cached:
        height, width, channels = pipeline.latent_shape(size.model, side)
        moments = rng.standard_normal((batch, height, width, 2 * channels), np.float32)
        pictures = {"moments": moments.astype(jnp.bfloat16)}
    else:
        pictures = {"image": rng.integers(0, 256, (batch, side, side, 3), np.uint8)}
    return pictures | tokens(size, batch)


def tokens(size: Size, batch: int) -> dict[str, np.ndarray]:
    """Random prompts as the tokenizers give them."""
    ids = np.random.default_rng(2).integers(0, 700, (batch, 77), np.int32)
    if size.model.text_encoder_2 is None:
        return {"input_ids": ids}
    sizes = np.array([size.image_size, size.image_size, 0, 0] + 2 * [size.image_size], np.int32)
    return {"input_ids": ids, "input_ids_2": ids, "time_ids": np.tile(sizes, (batch, 1))}


def null_text(size: Size, nets: step.Nets) -> np.ndarray | SDXLText:
    """Random numbers in the place of the empty prompt's text; zeros in SDXL."""
    shape = jax.eval_shape(
        nets.encode_text, pipeline.text_params(size.model), tokens(size, 1)
    )  # fmt: skip
    if isinstance(shape, SDXLText):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shape)
    return np.random.default_rng(3).standard_normal(shape.shape, np.float32)


def counts(size: Size) -> dict[str, int]:
    """Numbers in each network; student: in what is trained of it."""
    trees = jax.eval_shape(partial(start, size, jnp.float32), parameter_shapes(size))
    return {name: count(tree) for name, tree in trees._asdict().items()}


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
