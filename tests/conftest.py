"""Strict JAX for every test: no silent promotion of ranks or dtypes, no key used twice.

Four fake CPU devices; slam_jax's shape annotations are checked at every call.
"""

import importlib
import json
import os
import signal
import sys
import tempfile

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the tests' time goes into compiling: a quarter less so.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# What programs keep between runs would hide what they do the first time.
os.environ.setdefault("SLAM_JAX_CACHE", "")
# Its threads spin while they wait, and other processes want the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook("slam_jax", "beartype.beartype")
# Who starts the tests in the background may have them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_default_matmul_precision", "highest")
# A program that several tests build anew is compiled once. Processes that the tests start have no
# part in it: JAX does not write its files in one go, and another process could read half a file.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Of the files those that take longest come first, or one process would end with them alone.
LONGEST = (
    "test_main_on_hosts", "test_train", "test_main", "test_benchmarks", "test_configs",
    "test_hosts", "test_gs_run", "test_layouts", "test_unet", "test_bad_input", "test_dry_run",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def cloud():
    """A Cloud Storage with gs://bucket, for this process and those it starts (gcs_server.py)."""
    sys.path.insert(0, os.path.dirname(__file__))
    gcs_server = importlib.import_module("gcs_server")
    with gcs_server.running() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", running.url)  # of Google's own library and gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", running.url)
        # Or gcsfs asks for the kind of the bucket by gRPC.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield running


# As few blocks as have everything: a transformer between two resolutions.
TINY_UNET = dict(
    sample_size=16, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4,
    down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
    cross_attention_dim=16, attention_head_dim=2,
)  # fmt: skip
TINY_VAE = dict(
    block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
)  # fmt: skip
TINY_TEXT_ENCODER = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=77, layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
)  # fmt: skip
TINY_SCHEDULER = dict(
    _class_name="DDIMScheduler", beta_start=8.5e-4, beta_end=1.2e-2, num_train_timesteps=1000,
    beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip


def tiny_tokenizer(folder, **config) -> int:
    """Writes a tokenizer that knows letters alone into the folder; how many tokens it has."""
    from tokenizers import pre_tokenizers

    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, **config}))
    return len(words)


def random_component(rng, template, **config):
    """A network of that config, every parameter drawn at random."""
    from slam_jax.weights import pretrained

    def draw(shape):
        leaf = rng.normal(size=shape.shape) * max(1, np.prod(shape.shape[:-1])) ** -0.5
        return leaf.astype(np.float32)

    return pretrained.Component(config, jax.tree.map(draw, template(config)))


@pytest.fixture(scope="session", params=["quick_gelu", "gelu"])
def clip_folder(request, tmp_path_factory):
    """A CLIPModel as transformers saves it, random, for pictures of 24x24 pixels. Read only.

    In the manner of OpenAI's or of OpenCLIP's configs.
    """
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("clip") / f"tiny-{request.param}"
    vocab_size = tiny_tokenizer(folder)
    tower = dict(
        hidden_act=request.param, hidden_size=16, intermediate_size=40, num_attention_heads=2,
        num_hidden_layers=2,
    )  # fmt: skip
    eos_token_id = 2 if request.param == "gelu" else vocab_size - 1
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(tower, vocab_size=vocab_size, bos_token_id=0, eos_token_id=eos_token_id),
        vision_config=dict(tower, hidden_size=24, num_hidden_layers=3, image_size=24, patch_size=8),
        projection_dim=12,
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            parameter.normal_(0, 0.3).add_(1.0 if is_scale else 0.0)
    model.save_pretrained(folder)
    preprocessor = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Stable Diffusion folder with random weights, 32x32 pixels, latents 16x16x4, no torch."""
    from slam_jax.weights import pretrained, templates

    folder, rng = tmp_path_factory.mktemp("tiny_folder"), np.random.default_rng(0)
    vocab_size = tiny_tokenizer(folder / "tokenizer")
    text_encoder = {"vocab_size": vocab_size, **TINY_TEXT_ENCODER}
    model = pretrained.Pretrained(
        random_component(rng, templates.of_unet, **TINY_UNET),
        random_component(rng, templates.of_vae, **TINY_VAE),
        random_component(rng, templates.of_text_encoder, **text_encoder),
        TINY_SCHEDULER,
        folder / "tokenizer",
    )
    pretrained.write(folder / "model", model)
    return folder / "model"


@pytest.fixture(scope="session")
def small_folder(tiny_folder, tmp_path_factory):
    """The same with one resolution: its train step is compiled in half the time.

    For what does not depend on the network: processes that end, hosts, files.
    """
    from slam_jax.weights import pretrained, templates

    first = {
        name: TINY_UNET[name][:1]
        for name in ("block_out_channels", "down_block_types", "up_block_types")
    }
    unet = random_component(np.random.default_rng(0), templates.of_unet, **TINY_UNET | first)
    folder = tmp_path_factory.mktemp("small_folder") / "model"
    pretrained.write(folder, pretrained.read(tiny_folder)._replace(unet=unet))
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory):
    """The same for SDXL: two encoders, 16 + 24 wide, and a pooled text of width 12."""
    from slam_jax.weights import pretrained, templates

    folder, rng = tmp_path_factory.mktemp("tiny_sdxl_folder"), np.random.default_rng(1)
    vocab_size = tiny_tokenizer(folder / "tokenizer")
    tiny_tokenizer(folder / "tokenizer_2", pad_token="!")
    # One resolution: its train step is compiled in half the time.
    unet = TINY_UNET | dict(
        block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"],
        transformer_layers_per_block=[1], cross_attention_dim=16 + 24, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    text_encoder = {"vocab_size": vocab_size, **TINY_TEXT_ENCODER, "num_hidden_layers": 2}
    text_encoder_2 = text_encoder | dict(
        architectures=["CLIPTextModelWithProjection"], hidden_size=24, hidden_act="gelu",
        projection_dim=12, eos_token_id=2,
    )  # fmt: skip
    model = pretrained.Pretrained(
        random_component(rng, templates.of_unet, **unet),
        random_component(rng, templates.of_vae, **TINY_VAE),
        random_component(rng, templates.of_text_encoder, **text_encoder),
        TINY_SCHEDULER,
        folder / "tokenizer",
        random_component(rng, templates.of_text_encoder, **text_encoder_2),
        folder / "tokenizer_2",
    )
    pretrained.write(folder / "model", model)
    return folder / "model"
