"""Flax folders of the hub's old branches, against flax's own reader and torch's weights."""

import json
import re
import shutil

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.weights import flaxfile, pretrained

PARTS = ("unet", "vae", "text_encoder")
FILES = {
    "unet": "unet/diffusion_flax_model.msgpack",
    "vae": "vae/diffusion_flax_model.msgpack",
    "text_encoder": "text_encoder/flax_model.msgpack",
}
# The VAE's attention of diffusers' FlaxAutoencoderKL.
VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}


def flax_params(net, part: str, dtype=jnp.float32) -> dict:
    """As diffusers 0.39's convert_pytorch_state_dict_to_flax, transformers 4's for the encoder."""
    params = {}
    for name, tensor in net.state_dict().items():
        if part == "text_encoder":
            modules = ["text_model", *name.split(".")]
        else:
            modules = re.sub(r"(\w+)\.(\d+)", r"\1_\2", name).split(".")
        if part == "vae":
            modules = [VAE_ATTENTION.get(module, module) for module in modules]
        array, kind = tensor.numpy(), modules.pop()
        if kind == "weight" and "embedding" in modules[-1]:
            kind = "embedding"
        elif kind == "weight" and array.ndim == 1:
            kind = "scale"
        elif kind == "weight":
            kind = "kernel"
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        at = params
        for module in modules:
            at = at.setdefault(module, {})
        at[kind] = jnp.asarray(array, dtype)
    return params


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write(path, params):
    path.write_bytes(flax.serialization.to_bytes(params))


@pytest.fixture
def make_flax(pipeline, torch_folder, tmp_path):
    """Makes a folder as FlaxStableDiffusionPipeline.save_pretrained did, in a dtype."""

    def make(dtype=jnp.float32):
        folder = shutil.copytree(torch_folder, tmp_path / "flax")
        for part, class_name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
            (folder / part / "diffusion_pytorch_model.safetensors").unlink()
            edit_json(folder / part / "config.json", _class_name=f"Flax{class_name}")
        (folder / "text_encoder" / "model.safetensors").unlink()
        edit_json(
            folder / "unet/config.json", use_memory_efficient_attention=False, split_head_dim=False
        )
        edit_json(
            folder / "model_index.json",
            _class_name="FlaxStableDiffusionPipeline",
            unet=["diffusers", "FlaxUNet2DConditionModel"],
            vae=["diffusers", "FlaxAutoencoderKL"],
            text_encoder=["transformers", "FlaxCLIPTextModel"],
        )
        edit_json(folder / "scheduler/scheduler_config.json", _class_name="FlaxPNDMScheduler")
        for part in PARTS:
            write(folder / FILES[part], flax_params(getattr(pipeline, part), part, dtype))
        return folder

    return make


@pytest.fixture
def flax_folder(make_flax):
    return make_flax()


def assert_same_params(one, other):
    for part in PARTS:
        ours, theirs = getattr(one, part).params, getattr(other, part).params
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_same_parameters_as_the_torch_folder(flax_folder, torch_folder):
    model = pretrained.read(flax_folder)
    assert_same_params(model, pretrained.read(torch_folder))
    assert model.scheduler["_class_name"] == "PNDMScheduler"


def test_half_precision_as_the_bf16_branches_have_it(make_flax, torch_folder):
    folder, torch_model = make_flax(jnp.bfloat16), pretrained.read(torch_folder)
    rounded = torch_model._replace(
        **{
            part: getattr(torch_model, part)._replace(
                params=jax.tree.map(
                    lambda leaf: leaf.astype(ml_dtypes.bfloat16), getattr(torch_model, part).params
                )
            )
            for part in PARTS
        }
    )
    assert_same_params(pretrained.read(folder, dtype=None), rounded)


@pytest.mark.parametrize("linear", [False, True])
def test_projections_as_dense_and_as_convolutions(tmp_path, linear):
    import diffusers

    net = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=4, attention_head_dim=2,
        norm_num_groups=4, use_linear_projection=linear,
    )  # fmt: skip
    net.save_pretrained(tmp_path / "torch")
    net.save_config(tmp_path / "flax")
    write(tmp_path / "flax/diffusion_flax_model.msgpack", flax_params(net, "unet"))
    ours, theirs = (
        pretrained.read_component(tmp_path / name, pretrained.UNET) for name in ("flax", "torch")
    )
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    kernel = ours.params["mid_block"]["attentions.0"]["proj_in"]["kernel"]
    assert kernel.ndim == (2 if linear else 4)
    edit_json(tmp_path / "flax/config.json", use_linear_projection=not linear)
    with pytest.raises(UserError, match="proj_in/kernel' has shape .* config.json asks for"):
        pretrained.read_component(tmp_path / "flax", pretrained.UNET)


def test_what_is_written_from_it_is_a_torch_folder(flax_folder, torch_folder, tmp_path):
    pretrained.write(tmp_path / "out", pretrained.read(flax_folder))
    for path in ("unet/config.json", "vae/config.json"):
        ours, theirs = (
            json.loads((f / path).read_text()) for f in (tmp_path / "out", torch_folder)
        )
        assert ours == theirs
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert "Flax" not in json.dumps(index)
    assert_same_params(pretrained.read(tmp_path / "out"), pretrained.read(torch_folder))


def test_safetensors_go_first(flax_folder, torch_folder):
    name = "unet/diffusion_pytorch_model.safetensors"
    shutil.copyfile(torch_folder / name, flax_folder / name)
    (flax_folder / FILES["unet"]).write_bytes(b"never opened")
    pretrained.read(flax_folder)


def test_reads_what_flax_writes(tmp_path, monkeypatch):
    """Every length of header, short and long arrays, whole and in pieces."""
    rng = np.random.default_rng(0)
    tree = {
        f"{length}_x": {"bias": rng.standard_normal(length).astype(np.float32)}
        for length in (1, 2, 3, 70, 300, 20_000)
    }
    tree["half"] = {"bias": rng.standard_normal(1).astype(ml_dtypes.bfloat16)}
    tree["scalar"] = {"bias": np.asarray(np.float32(2))}
    tree["empty"] = {"bias": np.zeros((0, 3), np.float16)}
    tree["n" * 40] = {f"{'m' * 300}{i}": {"bias": np.ones(1, np.float64)} for i in range(20)}
    for chunk in (2**30, 64):
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
        write(tmp_path / "file", tree)
        theirs = flax.serialization.msgpack_restore((tmp_path / "file").read_bytes())
        expected = {
            "/".join(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(theirs)
        }
        ours = {stored.name: stored for stored in flaxfile.read(tmp_path / "file").values()}
        assert ours.keys() == expected.keys()
        for name, stored in ours.items():
            assert stored.shape == expected[name].shape
            assert np.asarray(stored).dtype == expected[name].dtype
            np.testing.assert_array_equal(np.asarray(stored), expected[name])


# What is refused.


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        pretrained.read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("end", [0, 1, 100, 10_000, -1])
def test_a_truncated_file_is_named(flax_folder, end):
    path = flax_folder / FILES["vae"]
    path.write_bytes(path.read_bytes()[:end])
    assert refusal(flax_folder).startswith(f"{path} is cut short")


@pytest.mark.parametrize(
    "content",
    [
        b"text, and no weights",
        b"\x80\x04\x95 a pickle",
        msgpack.packb([1, 2]),
        msgpack.packb({"a": 1.5}),
        msgpack.packb({"a": -1}),
        msgpack.packb({"a": msgpack.ExtType(3, b"x" * 16)}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"12345")))}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"1234")) + b"x")}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": {}}}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
        msgpack.packb({}) + b"more",
        b"\x81\xa1a" * 100_000 + b"\x80",
        b"\xdf\xff\xff\xff\xff",
    ],
    ids=range(13),
)
def test_other_bytes_are_no_weights(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(
        UserError, match=f"^{tmp_path}/file is cut short or not a Flax msgpack file"
    ):
        flaxfile.read(tmp_path / "file")


def test_a_pointer_to_the_weights_is_known(tmp_path):
    (tmp_path / "file").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        flaxfile.read(tmp_path / "file")


BROKEN = {
    "lacks tensor 'conv_in.bias'": lambda params: params["conv_in"].pop("bias"),
    ": tensor 'conv_in/more' is unknown": lambda params: params["conv_in"].update(more=jnp.ones(2)),
    ": tensor 'conv_in/bias' has shape [9], config.json asks for [8]": lambda params: params[
        "conv_in"
    ].update(bias=jnp.ones(9)),
    ": tensor 'conv_in/bias' is int32": lambda params: params["conv_in"].update(
        bias=jnp.ones(8, jnp.int32)
    ),
    "holds 'conv_in/embedding' and 'conv_in/kernel', which are the same": lambda params: params[
        "conv_in"
    ].update(embedding=jnp.ones(2)),
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_arrays_are_named_with_their_file(pipeline, flax_folder, words):
    params = flax_params(pipeline.unet, "unet")
    BROKEN[words](params)
    write(flax_folder / FILES["unet"], params)
    message = refusal(flax_folder)
    assert message.startswith(str(flax_folder / FILES["unet"])) and words in message


def test_there_is_no_variant_of_it(flax_folder):
    with pytest.raises(UserError, match="but diffusion_flax_model.msgpack; .* or to none"):
        pretrained.read(flax_folder, variant="fp16")
