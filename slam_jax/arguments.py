"""What the train step takes, as shapes with their places on a mesh: no array among them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slam_jax import experiment, pipeline
from slam_jax.data import cache, manifest
from slam_jax.distill import state
from slam_jax.nets import clip
from slam_jax.runtime import mesh
from slam_jax.settings import Settings
from slam_jax.weights import architectures, hub, pretrained

_TIME_IDS = 6


def teacher(settings: Settings) -> tuple[pretrained.Pretrained, str]:
    """The teacher, its parameters as shapes, and where its configs were found.

    Of a folder or a model of the hub the configs alone are read; those that configs/ name are
    known without.
    """
    name, revision, _, config, _ = settings.teacher
    if architectures.known(name) and not revision and not Path(name).exists():
        return architectures.find(name), "built-in table"
    root = hub.locate_configs(config or name, "" if config else revision)
    networks, others = pretrained.describe(root)
    components = {
        part: pretrained.Component(found.config, found.shapes) for part, found in networks.items()
    }
    return pretrained.Pretrained(**components, **others), str(root)


def frozen(settings: Settings, teacher: pretrained.Pretrained, devices: Mesh) -> state.Frozen:
    """The parameters that never change, as training lays them out."""
    cast = pipeline.at_rest(pipeline.dtype(settings.teacher.dtype))

    def at_rest(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = tuple(each.key for each in path)
        # One number of as many dimensions: the dtype depends on no more.
        dtype = cast(names, np.ones((1,) * len(leaf.shape), np.float32)).dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    networks = {
        name: part
        for name, part in teacher._asdict().items()
        if isinstance(part, pretrained.Component)
    }
    params = {name: part.params for name, part in networks.items()}
    bare = jax.tree_util.tree_map_with_path(at_rest, params)
    placed = mesh.placed(bare, devices, settings.mesh.rules)
    text_encoder = pipeline.text_params(
        teacher._replace(
            **{name: part._replace(params=placed[name]) for name, part in networks.items()}
        )
    )
    encode = pipeline.encode_null_text(teacher, pipeline.dtype(settings.teacher.dtype))
    null_text = jax.eval_shape(encode, text_encoder, tokens(teacher, (1,)))
    everywhere = mesh.replicated(devices)
    null_text = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), null_text)
    return state.Frozen(placed["unet"], placed["vae"], text_encoder, null_text)


def batch(
    settings: Settings, teacher: pretrained.Pretrained, devices: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as mesh.put_batch lays it out: pictures, or a cache's moments, and tokens."""
    rows = (settings.accumulate, settings.batch_size // settings.accumulate)
    arrays = pictures(settings, teacher, rows) | tokens(teacher, rows)
    spread = mesh.batch_sharding(devices)
    return {name: leaf.update(sharding=spread) for name, leaf in arrays.items()}


def pictures(
    settings: Settings, teacher: pretrained.Pretrained, rows: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """ "image" of the config's size, or "moments" where data.source is a cache."""
    source = Path(settings.data.source)
    if not cache.is_cache(source):
        shape = (*rows, *experiment.image_size(settings), 3)
        return {"image": jax.ShapeDtypeStruct(shape, np.uint8)}
    height, width, channels = pipeline.latent_shape(teacher, settings.data.size)
    dtype = np.dtype(manifest.read(source).plan.dtype)
    return {"moments": jax.ShapeDtypeStruct((*rows, height, width, 2 * channels), dtype)}


def tokens(
    teacher: pretrained.Pretrained, rows: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """As text_inputs.Tokenizers.encode gives them; as long as the text encoder can take."""
    length = clip.from_config(teacher.text_encoder.config).max_position_embeddings
    ids = jax.ShapeDtypeStruct((*rows, length), np.int32)
    if teacher.text_encoder_2 is None:
        return {"input_ids": ids}
    sizes = jax.ShapeDtypeStruct((*rows, _TIME_IDS), np.int32)
    return {"input_ids": ids, "input_ids_2": ids, "time_ids": sizes}


def key(devices: Mesh) -> jax.ShapeDtypeStruct:
    """The run's key."""
    return jax.eval_shape(lambda: jax.random.key(0)).update(sharding=mesh.replicated(devices))
