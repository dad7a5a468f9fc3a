"""A model at work on this host's devices: numbers of images in, pictures out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from slam_jax import pipeline
from slam_jax.data import text_inputs
from slam_jax.evaluation import noise, protocol, samplers
from slam_jax.evaluation.samplers import Entry
from slam_jax.runtime import apart, executables, images
from slam_jax.weights import fingerprint, pretrained

Pictures = UInt8[np.ndarray, "B H W 3"]


class Candidate(NamedTuple):
    """A model that is compared, and how it is sampled."""

    name: str
    model: pretrained.Pretrained  # its parameters read or unread
    dtype: str  # in which it computes
    attention: str  # how the UNet's is computed
    entries: tuple[Entry, ...]
    identity: str  # sha256 of all of it that an image depends on, but the entries


class Artist(NamedTuple):
    """A model on the devices, with what it is told of all images."""

    model: pretrained.Pretrained  # its parameters on the devices
    dtype: np.dtype
    attention: str
    encoded: Mapping[str, np.ndarray]  # [N, ...], the captions
    null_text: Any
    latent_shape: tuple[int, int, int]
    devices: Mesh
    seed: int


def candidate(
    name: str, model: pretrained.Pretrained, dtype: str, attention: str, entries: Sequence[Entry]
) -> Candidate:
    """Reads every parameter once, for the sake of its identity."""
    tokens = text_inputs.read(model.tokenizer, model.tokenizer_2)
    told = {
        "unet": [model.unet.config, fingerprint.of_params(model.unet.params)],
        "vae": [model.vae.config, fingerprint.of_params(model.vae.params)],
        "text": [_of_text_encoder(each) for each in (model.text_encoder, model.text_encoder_2)],
        "scheduler": model.scheduler,
        "tokenizers": text_inputs.fingerprints(tokens),
        "zeros": model.force_zeros_for_empty_prompt,
        "dtype": dtype,
        "attention": attention,
    }
    return Candidate(name, model, dtype, attention, tuple(entries), protocol.of_json(told))


def _of_text_encoder(encoder: pretrained.Component | None) -> list | None:
    return encoder and [encoder.config, fingerprint.of_params(encoder.params)]


def start(
    candidate: Candidate, captions: list[str], image_size: int, seed: int, devices: Mesh
) -> Artist:
    """The model, whole on every device; UserError if its attention is not for them."""
    apart.check_attention(candidate.attention, devices)
    everywhere = NamedSharding(devices, P())
    dtype = pipeline.dtype(candidate.dtype)
    at_rest = pipeline.at_rest(dtype)
    model = pretrained.load(
        candidate.model, place=lambda path, x: jax.device_put(at_rest(path, x), everywhere)
    )
    # What was read before was not placed.
    model = model._replace(
        unet=model.unet._replace(params=jax.device_put(model.unet.params, everywhere)),
        vae=model.vae._replace(params=jax.device_put(model.vae.params, everywhere)),
    )
    tokens = text_inputs.read(model.tokenizer, model.tokenizer_2)
    size = (image_size, image_size)
    encode_null_text = jax.jit(pipeline.encode_null_text(model, dtype), out_shardings=everywhere)
    empty = jax.device_put(tokens.encode([""], size), everywhere)
    return Artist(
        model=model,
        dtype=dtype,
        attention=candidate.attention,
        encoded=tokens.encode(captions, size),
        null_text=encode_null_text(pipeline.text_params(model), empty),
        latent_shape=pipeline.latent_shape(model, image_size),
        devices=devices,
        seed=seed,
    )


def drawer(artist: Artist, entry: Entry, batch_size: int) -> Callable[[np.ndarray], Pictures]:
    """(numbers of batch_size images) -> the images, 8 bits; compiled here, so that time counts.

    A program is kept for models that differ in parameters alone, such as the students of a run.
    """
    model = artist.model
    rows, columns = (NamedSharding(artist.devices, P(*axes)) for axes in (["data"], [None, "data"]))
    noise_of = noise.of_images(artist.seed, samplers.num_noises(entry), artist.latent_shape)
    encode_text = jax.jit(pipeline.encode_text(model, artist.dtype), out_shardings=rows)
    text_params = pipeline.text_params(model)
    fixed = (model.unet.params, model.vae.params)

    def inputs(numbers: np.ndarray) -> tuple:
        chosen = {name: each[numbers] for name, each in artist.encoded.items()}
        text = encode_text(text_params, jax.device_put(chosen, rows))
        return *fixed, text, artist.null_text, jax.device_put(noise_of(numbers), columns)

    first = inputs(np.zeros(batch_size, np.int64))
    given = (pretrained.without_params(model), entry, artist.dtype.name, artist.attention)
    with apart.scope(artist.devices):
        compiled = executables.load(samplers.build, given, *first)
    return lambda numbers: images.quantize(jax.device_get(compiled(*inputs(numbers))))
