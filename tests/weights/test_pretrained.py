"""Whole folders: read what torch's libraries write, write what they load, bit for bit."""

import filecmp
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from slam_jax.errors import UserError
from slam_jax.runtime import mesh
from slam_jax.weights import pretrained, tensorfile, translate

PARTS = ("unet", "vae", "text_encoder")


def assert_same_tree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def params_of(model: pretrained.Pretrained) -> dict:
    return {part: getattr(model, part).params for part in PARTS}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def torch_tensors(pipeline, part: str) -> dict[str, np.ndarray]:
    """Part's state dict with the hub's names."""
    prefix = "text_model." if part == "text_encoder" else ""
    state = getattr(pipeline, part).state_dict()
    return {prefix + name: t.float().numpy() for name, t in state.items()}


def assert_holds(model: pretrained.Pretrained, pipeline):
    for part in PARTS:
        ours = translate.to_tensors(getattr(model, part).params)
        theirs = torch_tensors(pipeline, part)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_reads_what_diffusers_writes(pipeline, torch_folder):
    model = pretrained.read(torch_folder)
    assert_holds(model, pipeline)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params_of(model)))
    assert model.unet.config["block_out_channels"] == [8, 16]
    assert model.scheduler["_class_name"] == "DDIMScheduler"
    assert model.tokenizer == torch_folder / "tokenizer"


def test_reads_the_hubs_older_names_shapes_and_files(pipeline, hub_folder):
    old = tensorfile.read(hub_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert old["decoder.mid_block.attentions.0.proj_attn.weight"].shape == (16, 16, 1, 1)
    model = pretrained.read(hub_folder)
    assert_holds(model, pipeline)
    assert model.scheduler["_class_name"] == "PNDMScheduler"


def test_round_trip_gives_the_same_files(torch_folder, tmp_path):
    pretrained.write(tmp_path / "copy", pretrained.read(torch_folder))
    assert files(tmp_path / "copy") == files(torch_folder)
    for name in files(torch_folder) - {"model_index.json"}:
        assert filecmp.cmp(torch_folder / name, tmp_path / "copy" / name, shallow=False), name
    index = json.loads((torch_folder / "model_index.json").read_text())
    ours = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert ours | {"_diffusers_version": index["_diffusers_version"]} == index


def test_round_trip_of_the_hubs_names(hub_folder, tmp_path):
    model = pretrained.read(hub_folder)
    pretrained.write(tmp_path / "copy", model)
    assert_same_tree(params_of(pretrained.read(tmp_path / "copy")), params_of(model))
    written = tensorfile.read(tmp_path / "copy" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in written)
    assert files(tmp_path / "copy" / "tokenizer") == {"vocab.json", "merges.txt"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_round_trip_in_every_dtype(torch_folder, tmp_path, dtype):
    model = pretrained.read(torch_folder)
    pretrained.write(tmp_path / "one", model, dtype=dtype)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params_of(model))
    one = pretrained.read(tmp_path / "one", dtype=None)
    assert_same_tree(params_of(one), cast)
    assert one.text_encoder.config["dtype"] == np.dtype(dtype).name
    pretrained.write(tmp_path / "two", one)
    for name in files(tmp_path / "one"):
        assert filecmp.cmp(tmp_path / "one" / name, tmp_path / "two" / name, shallow=False), name
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), cast)
    assert_same_tree(params_of(pretrained.read(tmp_path / "one")), in_float32)


def test_half_precision_variant_of_torch(pipeline, torch_folder, tmp_path):
    half = diffusers.StableDiffusionPipeline.from_pretrained(
        torch_folder, torch_dtype=torch.float16, safety_checker=None
    )
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_holds(pretrained.read(tmp_path / "half", variant="fp16"), half)
    pretrained.write(
        tmp_path / "ours", pretrained.read(torch_folder), dtype=np.float16, variant="fp16"
    )
    assert files(tmp_path / "ours") == files(tmp_path / "half")
    weights = {name for name in files(tmp_path / "half") if name.endswith(".fp16.safetensors")}
    assert len(weights) == 3
    for name in weights:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "half" / name
        assert filecmp.cmp(ours, theirs, shallow=False), name


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_reads_shards(pipeline, torch_folder, tmp_path, variant):
    shutil.copytree(torch_folder, tmp_path / "model")
    for part in PARTS:
        shutil.rmtree(tmp_path / "model" / part)
        net = getattr(pipeline, part)
        net.save_pretrained(tmp_path / "model" / part, max_shard_size="30KB", variant=variant)
        assert len(list((tmp_path / "model" / part).glob("*-of-*.safetensors"))) > 1
    assert_holds(pretrained.read(tmp_path / "model", variant=variant), pipeline)


def test_diffusers_loads_what_is_written_and_draws_the_same(pipeline, torch_folder, tmp_path):
    pretrained.write(tmp_path / "ours", pretrained.read(torch_folder))
    assert_pipelines_agree(load(tmp_path / "ours"), pipeline)


def test_diffusers_loads_what_came_from_the_hub(pipeline, hub_folder, tmp_path):
    pretrained.write(tmp_path / "ours", pretrained.read(hub_folder))
    assert_pipelines_agree(load(tmp_path / "ours"), pipeline, same_scheduler=False)


def load(folder: Path) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def assert_pipelines_agree(ours, theirs, same_scheduler=True):
    for part in PARTS:
        one, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == torch.float32
            assert torch.equal(one[name], other[name]), (part, name)
    assert isinstance(ours.tokenizer, transformers.CLIPTokenizer)
    assert ours.tokenizer("at a").input_ids == theirs.tokenizer("at a").input_ids
    if same_scheduler:
        assert_same_image(ours, theirs)


def assert_same_image(ours, theirs):
    images = []
    for each in (ours, theirs):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        out = each("at a", num_inference_steps=2, generator=generator, output_type="np")
        images.append(out.images)
    np.testing.assert_array_equal(*images)


def test_reading_starts_no_device(torch_folder):
    program = (
        "import sys; from jax._src import xla_bridge; from slam_jax.weights import pretrained;"
        f"pretrained.read({str(torch_folder)!r});"
        "assert not xla_bridge.backends_are_initialized();"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_parameters_go_straight_to_the_mesh(torch_folder):
    on_host = pretrained.read(torch_folder)
    devices = mesh.make((("data", -1),))
    rules = (("unet/.*/conv1/kernel", (None, None, None, "data")), (".*", ()))
    found = pretrained.find(torch_folder)
    model = pretrained.load(found, place=mesh.placer(devices, rules))
    jax.tree.map(np.testing.assert_array_equal, params_of(model), params_of(on_host))
    split = [leaf for leaf in jax.tree.leaves(params_of(model)) if not leaf.is_fully_replicated]
    kernel = model.unet.params["down_blocks.0"]["resnets.0"]["conv1"]["kernel"]
    assert any(kernel is leaf for leaf in split) and len(split) == 8
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 8, 2)}
    pretrained.load(found, place=mesh.placer(devices, ((".*", ()),)))  # as often as one likes


def test_one_parameter_at_a_time_is_on_the_host(torch_folder):
    found = pretrained.find(torch_folder)
    tracemalloc.start()
    pretrained.load(found, place=lambda path, array: array.size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(params_of(found))]
    assert peak < sum(sizes) / 4


def test_reads_one_network_from_any_folder(pipeline, torch_folder, tmp_path):
    shutil.copytree(torch_folder / "unet", tmp_path / "student_unet")
    unet = pretrained.read_component(tmp_path / "student_unet", pretrained.UNET)
    assert_same_tree(unet.params, pretrained.read(torch_folder).unet.params)
    pretrained.write_component(tmp_path / "again", pretrained.UNET, unet)
    net = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "again")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)


def test_configs_made_by_hand_are_completed(pipeline, torch_folder, tmp_path):
    model = pretrained.read(torch_folder)
    bare = {
        part: getattr(model, part)._replace(
            config={
                key: value
                for key, value in getattr(model, part).config.items()
                if key not in ("_class_name", "_diffusers_version", "architectures", "model_type")
            },
            bare_names=False,
        )
        for part in PARTS
    }
    pretrained.write(tmp_path / "ours", model._replace(**bare))
    written = {
        part: json.loads((tmp_path / "ours" / part / "config.json").read_text()) for part in PARTS
    }
    assert written["unet"]["_class_name"] == "UNet2DConditionModel"
    assert written["vae"]["_class_name"] == "AutoencoderKL"
    assert written["text_encoder"]["architectures"] == ["CLIPTextModel"]
    assert written["text_encoder"]["model_type"] == "clip_text_model"
    assert_pipelines_agree(load(tmp_path / "ours"), pipeline, same_scheduler=False)


# Atomic writing.


def test_an_interrupted_write_leaves_the_old_folder(torch_folder, tmp_path, monkeypatch):
    model = pretrained.read(torch_folder)
    pretrained.write(tmp_path / "out", model)
    doubled = model._replace(
        unet=model.unet._replace(params=jax.tree.map(lambda leaf: 2 * leaf, model.unet.params))
    )
    with monkeypatch.context() as patch:
        patch.setattr(pretrained.shutil, "copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrained.write(tmp_path / "out", doubled)
    assert_same_tree(params_of(pretrained.read(tmp_path / "out")), params_of(model))
    pretrained.write(tmp_path / "out", doubled)
    assert_same_tree(params_of(pretrained.read(tmp_path / "out")), params_of(doubled))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_folder_can_be_written_over_itself(model):
    read = pretrained.read(model)
    pretrained.write(model, read)
    assert_same_tree(params_of(pretrained.read(model)), params_of(read))


def test_a_folder_with_other_things_is_left_alone(torch_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    with pytest.raises(UserError, match="photos exists and is not a model folder"):
        pretrained.write(tmp_path / "photos", pretrained.read(torch_folder))
    assert files(tmp_path / "photos") == {"cat.png"}


def test_an_unwritable_place_is_named(torch_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/out: "):
        pretrained.write(tmp_path / "file" / "out", pretrained.read(torch_folder))
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file: "):
        pretrained.write(tmp_path / "file", pretrained.read(torch_folder))


# What is refused: each time one line, naming file and value.


def refusal(folder: Path, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        pretrained.read(folder, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
BROKEN_TENSORS = {
    f"{UNET_FILE} lacks tensor 'conv_in.bias'": lambda t: t.pop("conv_in.bias"),
    f"{UNET_FILE}: tensor 'extra.bias' is unknown": lambda t: t.update(
        {"extra.bias": torch.ones(1)}
    ),
    f"{UNET_FILE}: tensor 'conv_in.bias' has shape [9], config.json asks for [8]": lambda t: (
        t.update({"conv_in.bias": torch.ones(9)})
    ),
    f"{UNET_FILE}: tensor 'conv_in.bias' is I32": lambda t: t.update(
        {"conv_in.bias": torch.ones(8, dtype=torch.int32)}
    ),
}


@pytest.mark.parametrize("words", BROKEN_TENSORS)
def test_broken_tensors_are_named_with_their_file(model, words):
    edit_tensors(model / UNET_FILE, BROKEN_TENSORS[words])
    assert f"{model}/{words}" in refusal(model)
    with pytest.raises(UserError):
        pretrained.find(model)


def test_a_tensor_is_named_as_its_file_names_it(model):
    name, path = "final_layer_norm.bias", "text_encoder/model.safetensors"
    edit_tensors(model / path, lambda t: t.update({name: torch.ones(9)}))
    assert f"{model}/{path}: tensor '{name}' has shape [9]" in refusal(model)


def test_a_tensor_under_two_names_is_refused(model):
    path = "text_encoder/model.safetensors"
    twice = "final_layer_norm.bias"
    edit_tensors(model / path, lambda t: t.update({f"text_model.{twice}": t[twice].clone()}))
    message = refusal(model)
    assert message.startswith(f"{model}/{path} holds ")
    assert f"'text_model.{twice}'" in message and f"'{twice}'" in message


def test_a_truncated_file_is_refused_before_anything_is_loaded(model, monkeypatch):
    path = model / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(tensorfile.Stored, "__array__", interrupt)
    assert refusal(model).startswith(f"{path} is cut short")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model_index.json", "holds no model_index.json"),
        ("unet/config.json", "cannot read {}/unet/config.json: No such file"),
        ("vae", "cannot read {}/vae/config.json: No such file"),
        (UNET_FILE, "{}/unet has no diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "cannot read {}/scheduler/scheduler_config.json"),
        ("tokenizer/tokenizer.json", "{}/tokenizer has neither vocab.json"),
        ("tokenizer", "{}/tokenizer has neither vocab.json"),
    ],
)
def test_missing_files_are_named(model, missing, words):
    path = model / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert words.format(model) in refusal(model)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("unet/config.json", '{"in_channels": 4,', "unet/config.json is not JSON"),
        ("model_index.json", "", "model_index.json is not JSON"),
        ("vae/config.json", "[1, 2]", "vae/config.json holds a list"),
        ("scheduler/scheduler_config.json", "{}", "scheduler_config.json lacks _class_name"),
    ],
)
def test_broken_json_is_named(model, file, text, words):
    (model / file).write_text(text)
    assert f"{model}/" in refusal(model) and words in refusal(model)


def test_a_config_that_is_not_utf8_is_named(model):
    (model / "unet" / "config.json").write_bytes(b'{"\xff": 1}')
    assert f"{model}/unet/config.json is not JSON" in refusal(model)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"act_fn": "mish"}, "unet/config.json: "),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "is of a UNet2DModel, not a UNet2D"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny"),
        ("vae/config.json", {"block_out_channels": None}, "describes no network that can be built"),
        ("text_encoder/config.json", {"vocab_size": 7}, "asks for [7, 16]"),
        ("model_index.json", {"unet": [None, None]}, "unet is [None, None], not a UNet2DCond"),
    ],
)
def test_other_configs_are_refused(model, file, changes, words):
    edit_json(model / file, **changes)
    assert words in refusal(model)


@pytest.mark.parametrize(
    "class_name",
    ["StableDiffusionXLInpaintPipeline", "FluxPipeline", "StableDiffusionInpaintPipeline", None],
)
def test_other_families_are_refused_with_those_supported(model, class_name):
    edit_json(model / "model_index.json", _class_name=class_name)
    assert f"is a {class_name}; supported are Stable Diffusion 1.x, 2.x and XL" in refusal(model)


def test_places_that_are_no_folder(tmp_path):
    message = refusal(Path("org/name"))
    assert "no folder org/name" in message and "hub as ORG/NAME" in message
    (tmp_path / "v1-5.ckpt").write_bytes(b"")
    message = refusal(tmp_path / "v1-5.ckpt")
    assert "is a pickle, which is never opened" in message and "from_single_file" in message


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickles_are_never_opened(model, name):
    (model / UNET_FILE).unlink()
    proof = model / "opened"
    torch.save({"x": Trap(proof)}, model / "unet" / name)
    message = refusal(model)
    assert f"{model}/unet has only {name}, a pickle, which is never opened" in message
    assert "from_pretrained('FOLDER', use_safetensors=False).save_pretrained(" in message
    assert not proof.exists()


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_other_variant_is_pointed_at(model):
    message = refusal(model, variant="fp16")
    assert "unet has no diffusion_pytorch_model.fp16.safetensors" in message
    assert "but diffusion_pytorch_model.safetensors" in message


@pytest.fixture
def sharded(pipeline, torch_folder, tmp_path):
    """A model with its UNet in shards, and the index's path."""
    shutil.copytree(torch_folder, tmp_path / "sharded")
    unet = tmp_path / "sharded" / "unet"
    shutil.rmtree(unet)
    pipeline.unet.save_pretrained(unet, max_shard_size="30KB")
    return unet / "diffusion_pytorch_model.safetensors.index.json"


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.parent.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"cannot read {shard}: No such file" in refusal(sharded.parents[1])


def test_a_broken_tensor_is_named_with_its_shard(sharded):
    shard = sharded.parent / json.loads(sharded.read_text())["weight_map"]["conv_in.bias"]
    edit_tensors(shard, lambda t: t.update({"conv_in.bias": torch.ones(9)}))
    assert f"{shard}: tensor 'conv_in.bias' has shape [9]" in refusal(sharded.parents[1])


def test_a_shard_and_its_index_must_agree(sharded):
    weight_map = json.loads(sharded.read_text())["weight_map"]
    edit_json(sharded, weight_map={k: v for k, v in weight_map.items() if k != "conv_in.bias"})
    message = refusal(sharded.parents[1])
    assert "disagree about tensor 'conv_in.bias'" in message
    edit_json(sharded, weight_map={**weight_map, "ghost": weight_map["conv_in.bias"]})
    assert "disagree about tensor 'ghost'" in refusal(sharded.parents[1])


@pytest.mark.parametrize("target", ["../vae/diffusion_pytorch_model.safetensors", "/etc/x", "", 3])
def test_an_index_leads_nowhere_else(sharded, target):
    weight_map = json.loads(sharded.read_text())["weight_map"]
    edit_json(sharded, weight_map={**weight_map, "conv_in.bias": target})
    assert "weight_map must give the name of a file beside it" in refusal(sharded.parents[1])
