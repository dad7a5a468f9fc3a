"""Reads what nobody would write: files, options and prompts, made by hypothesis.

    python tests/fuzz.py --inputs 100000

Whatever comes, a reader returns or raises UserError or BadSample; it writes nowhere but in its own
folder, opens no pickle, and starts no program.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pyarrow
from absl import flags
from hypothesis import configuration
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image
from pyarrow import parquet as pyarrow_parquet

from slam_jax import command, experiment, overrides, sample, settings
from slam_jax.data import filters, image_folder, parquet, tars, tokenizer
from slam_jax.diffusion import parameterization, schedule
from slam_jax.errors import BadSample, UserError
from slam_jax.evaluation import store
from slam_jax.runtime import mesh
from slam_jax.weights import folder as model_folder
from slam_jax.weights import lora, lora_names, pretrained, tensorfile

ROOT = pathlib.Path(__file__).parents[1]
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 8.5e-4, "beta_end": 1.2e-2,
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False, "trained_betas": None,
}  # fmt: skip


class Target(NamedTuple):
    """A reader with what it is given."""

    inputs: st.SearchStrategy
    read: Callable[[pathlib.Path, Any], object]  # a folder of its own, an input
    share: float  # of all inputs; slow readers get fewer


# What Python is asked to do while a reader runs.

_allowed: list[str] = []  # the folder that may be written to, while somebody watches
_misdeeds: list[str] = []
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "os.chown", "shutil.move", "shutil.rmtree", "shutil.copyfile",
}  # fmt: skip
_NEVER = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"}


def _audit(event: str, arguments: tuple) -> None:
    if not _allowed:
        return
    if event in _NEVER:
        _misdeeds.append(f"{event} {arguments}")
    elif (
        event == "open"
        and isinstance(arguments[0], str | bytes)
        and arguments[2] & _WRITES
        or event in _CHANGES
    ):
        _check(event, arguments[0])


def _check(event: str, path: str | bytes | int) -> None:
    # What JAX compiles meanwhile it may keep where it has been told to.
    allowed = (_allowed[-1], jax.config.values["jax_compilation_cache_dir"] or _allowed[-1])
    if not isinstance(path, int) and not os.path.abspath(os.fsdecode(path)).startswith(allowed):
        _misdeeds.append(f"{event} {path!r}")


@contextlib.contextmanager
def watched(folder: pathlib.Path) -> Iterator[None]:
    """AssertionError if something outside the folder is changed, a pickle read, ... within it."""
    _allowed.append(str(folder))
    try:
        yield
    finally:
        _allowed.pop()
    found, _misdeeds[:] = list(_misdeeds), []
    assert not found, found


# Inputs.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
any_text = st.text(max_size=40) | st.lists(st.integers(0, sys.maxunicode), max_size=20).map(
    lambda codes: "".join(map(chr, codes))
)
PATHS = [
    "../../x",
    "/tmp/slam_jax_x",
    "..",
    ".",
    "",
    "a/../../b",
    "x\0y",
    "~/x",
    "C:\\x",
    "a" * 300,
]


class Damage(NamedTuple):
    """What happens to a file: bytes that change, what is left of it, what comes behind."""

    changes: list[tuple[float, int]]  # where, of the whole, and to what
    left: float
    added: bytes

    def __call__(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for place, value in self.changes if content else ():
            changed[int(place * (len(content) - 1))] = value
        return bytes(changed[: round(self.left * len(content))]) + self.added


shares = st.floats(0, 1)
damages = st.just(Damage([], 1.0, b"")) | st.builds(
    Damage,
    st.lists(st.tuples(shares, st.integers(0, 255)), max_size=3),
    st.just(1.0) | shares,
    st.binary(max_size=8),
)


def damaged(content: bytes) -> st.SearchStrategy:
    return damages.map(lambda damage: damage(content))


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1}  # fmt: skip


@st.composite
def safetensors_files(draw, names: st.SearchStrategy) -> bytes:
    header, end = {}, 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(0, 16), max_size=3))
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if draw(st.booleans()):
        adapter = draw(
            st.text(max_size=4)
            | json_values.map(json.dumps)
            | st.dictionaries(
                st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora"]),
                json_values,
            ).map(json.dumps)
        )
        header["__metadata__"] = {"lora_adapter_metadata": adapter}
    if header and draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(sorted(header)))
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        header[key] = {**header[key], part: draw(json_values)}
    text = draw(damaged(json.dumps(header).encode()))
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    body = draw(st.just(bytes(min(end, 10**6))) | st.binary(max_size=64))
    return length.to_bytes(8, "little") + text + body


MODULES = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "mid_block", "")
lora_keys = any_text | st.builds(
    "{}{}{}".format,
    st.sampled_from(["unet.", "lora_unet_", "text_encoder.", "lora_te_", ""]),
    st.sampled_from([*MODULES, *(module.replace(".", "_") for module in MODULES)]),
    st.sampled_from([".lora_A.weight", ".lora_B.weight", ".alpha", ".lora_down.weight",
                     ".lora_up.weight", ".lora.down.weight", ".dora_scale", ""]),
)  # fmt: skip


@st.composite
def tar_files(draw) -> bytes:
    buffer = io.BytesIO()
    for _ in range(draw(st.integers(0, 4))):
        stem = draw(st.sampled_from(["a", "b", *PATHS]) | st.text(max_size=10))
        info = tarfile.TarInfo(stem + draw(st.sampled_from([".png", ".txt", ".json", ".TXT", ""])))
        kinds = [tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
                 tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]  # fmt: skip
        info.type, info.linkname = draw(st.sampled_from(kinds)), draw(st.sampled_from(PATHS))
        content = draw(st.sampled_from([PNG, b"a caption"]) | json_values.map(
            lambda value: json.dumps(value).encode()) | st.binary(max_size=30))  # fmt: skip
        info.size = draw(st.just(len(content)) | st.sampled_from([-1, 0, 8**11, 2**63, 10**30]))
        form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        with contextlib.suppress(ValueError, OverflowError):  # no tar says so
            buffer.write(info.tobuf(form, errors="replace"))
            buffer.write(content + bytes(-len(content) % 512))
    return draw(damaged(buffer.getvalue() + bytes(draw(st.sampled_from([0, 512, 1024])))))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()
CONFIG = str(ROOT / "configs" / "tiny.py")
KEYS = [
    "seed", "num_steps", "batch_size", "accumulate", "ema_rate", "distill.w", "distill.gamma",
    "distill.distance", "distill.sigma", "distill.length", "distill.stride", "distill.num_subpaths",
    "distill.times", "optimizer.b1", "optimizer.mu_dtype", "data.crop", "data.filters",
    "data.size", "eval.prompts", "mesh.axes", "mesh.rules", "student.lora.targets",
    "student.lora.rank", "student.remat",
    "distill", "eval", "distil.w", "w", "", ".", "a..b", "__class__", "to_dict", "_fields",
]  # fmt: skip
values = (
    st.sampled_from(["1", "0", "-1", "1e400", "nan", "true", "None", "()", "('huber',1e-3)", "(",
                     "(('data',-1),)", "(('.*',('data',)),)", "['mixture',0.5]", "9" * 40, "1_0"])
    | st.text(max_size=12)
    | json_values.map(repr)
    | st.lists(json_values, max_size=3).map(lambda found: repr(tuple(found)))
)  # fmt: skip
options = st.lists(
    st.builds(
        "--{}config.{}{}".format,
        st.sampled_from(["", "", "", "no"]),
        st.sampled_from(KEYS) | st.text(max_size=10),
        st.just("") | values.map("={}".format),
    ),
    min_size=1, max_size=3,
)  # fmt: skip

schedulers = st.dictionaries(st.sampled_from(sorted(SCHEDULER)), json_values, max_size=3).map(
    lambda changes: SCHEDULER | changes
) | st.dictionaries(st.text(max_size=8), json_values, max_size=4)
metadata = st.lists(
    st.builds(
        lambda name, text: json.dumps({"file_name": name, "text": text}).encode(),
        st.sampled_from([*PATHS, "a.png", "/dev/null"]) | json_values,
        json_values,
    )
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=20),
    max_size=4,
).map(b"\n".join)


@st.composite
def npy_files(draw) -> bytes:
    buffer = io.BytesIO()
    shape = draw(st.sampled_from([(2, 1, 4, 4, 4), (), (0,), (2, 1, 0, 0, 4), (3, 2)]))
    kind = draw(st.sampled_from(["f4", "f2", "i8", "c8", "U3", "M8[s]", "O", "npz"]))
    if kind == "npz":
        np.savez(buffer, a=np.zeros(shape))
    else:
        array = np.zeros(shape, kind)
        if kind == "O":
            array.fill(os.system)  # a pickle that names a function
        np.save(buffer, array, allow_pickle=True)
    return draw(damaged(buffer.getvalue()))


def _column(kind: pyarrow.DataType, cells: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.none() | cells, min_size=2, max_size=2).map(
        lambda found: pyarrow.array(found, kind)
    )


columns = st.one_of(
    _column(pyarrow.binary(), st.sampled_from([PNG, b""]) | st.binary(max_size=9)),
    _column(pyarrow.string(), st.text(max_size=9)),
    _column(pyarrow.int64(), st.integers(-9, 9)),
    _column(pyarrow.struct([("bytes", pyarrow.binary())]), st.just({"bytes": PNG})),
    _column(pyarrow.list_(pyarrow.int8()), st.just([1])),
    _column(pyarrow.null(), st.none()),
    _column(pyarrow.timestamp("s"), st.integers(0, 2**60)),
    _column(pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), st.text(max_size=3)),
)
tables = st.dictionaries(
    st.sampled_from(["image", "text", "caption", "extra"]) | st.text(max_size=4), columns,
    min_size=1, max_size=4,
)  # fmt: skip


# Readers.


def _all_samples(source) -> None:
    for number in range(len(source)):
        with contextlib.suppress(BadSample):
            source[number]


def read_safetensors(folder: pathlib.Path, content: bytes) -> None:
    (folder / "x.safetensors").write_bytes(content)
    for stored in tensorfile.read(folder / "x.safetensors").values():
        with contextlib.suppress(UserError):
            np.asarray(stored)
            stored.forget()
    tensorfile.metadata(folder / "x.safetensors")


def read_lora(folder: pathlib.Path, content: bytes) -> None:
    (folder / "x.safetensors").write_bytes(content)
    lora.read(folder / "x.safetensors", _model())


def read_tar(folder: pathlib.Path, content: bytes) -> None:
    tar = folder / "x.tar"
    tar.write_bytes(content)
    (folder / "x.tar.idx").unlink(missing_ok=True)
    source = tars.opened([str(tar)], "")
    _all_samples(source)
    assert sorted(path.name for path in folder.iterdir()) == ["x.tar", "x.tar.idx"]


def read_index(folder: pathlib.Path, damage: Damage) -> None:
    tar, index = folder / "x.tar", folder / "x.tar.idx"
    if not tar.exists():
        with tarfile.open(tar, "w") as file:
            for name, content in (("a.png", PNG), ("a.txt", b"a"), ("b.png", PNG), ("b.txt", b"b")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    index.unlink(missing_ok=True)
    tars.opened([str(tar)], "")
    index.write_bytes(damage(index.read_bytes()))
    _all_samples(tars.opened([str(tar)], ""))


def read_options(folder: pathlib.Path, options: list[str]) -> None:
    del folder
    argv, parsed = ["x", f"--config={CONFIG}", *options], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", parsed, sys_argv=argv)
    try:
        parsed(argv)
        config = parsed["config"].value.to_dict()
    except command._CONFIG_ERRORS as error:
        line = overrides.complaint(argv, parsed) or command.one_line(error)
        raise UserError(line) from None
    chosen = settings.from_config(config)
    json.dumps(settings.as_dict(chosen)).encode()
    mesh.check_rules(**chosen.mesh._asdict())
    mesh.make(chosen.mesh.axes)
    filters.parse(chosen.data.filters)
    experiment.method(chosen.distill, SCHEDULER)


def read_prompt(folder: pathlib.Path, prompt: str) -> None:
    (folder / "prompts.txt").write_bytes(prompt.encode("utf-8", "surrogatepass"))
    tokens = _tokenizer()
    for given in ((prompt, None), (None, str(folder / "prompts.txt"))):
        with contextlib.suppress(UserError):
            prompts = sample._read_prompts(*given)
            ids, cut = tokens.encode_with_cut(prompts)
            assert ids.shape == (len(prompts), 77) and len(cut) == len(prompts)


def read_scheduler(folder: pathlib.Path, scheduler: dict) -> None:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    scheduler = model_folder.read_scheduler(folder)
    levels = schedule.from_config(scheduler)
    assert np.isfinite(levels.alpha).all() and np.isfinite(levels.sigma).all()
    parameterization.prediction_from_config(scheduler)


def read_lora_name(folder: pathlib.Path, key: str) -> None:
    del folder
    if parsed := lora_names.parse(key):
        lora_names.modern(parsed[0])


def read_metadata(folder: pathlib.Path, content: bytes) -> None:
    (folder / "a.png").write_bytes(PNG)
    (folder / "metadata.jsonl").write_bytes(content)
    _all_samples(image_folder.opened(str(folder)))


def read_noise(folder: pathlib.Path, content: bytes) -> None:
    (folder / "x.npy").write_bytes(content)
    with contextlib.suppress(UserError):
        noise = sample._read_noise(str(folder / "x.npy"), (2, 1, 4))
        assert noise.dtype == np.float32
    with contextlib.suppress(ValueError):  # as it says
        store.load(folder / "x.npy")


def read_table(folder: pathlib.Path, columns: dict) -> None:
    path = folder / "x.parquet"
    with contextlib.suppress(pyarrow.ArrowInvalid):  # what it cannot write
        pyarrow_parquet.write_table(pyarrow.table(columns), path)
    _all_samples(parquet.opened([str(path)]))


def _once(make: Callable) -> Callable:
    made = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


_model = _once(lambda: pretrained.read(ROOT / "assets" / "tiny_sd"))
_tokenizer = _once(
    lambda: tokenizer.Tokenizer.from_folder(ROOT / "assets" / "tiny_sd" / "tokenizer")
)
TARGETS = {
    "safetensors": Target(safetensors_files(any_text), read_safetensors, 0.2),
    "lora": Target(safetensors_files(lora_keys), read_lora, 0.02),
    "tar": Target(tar_files(), read_tar, 0.15),
    "index": Target(damages, read_index, 0.1),
    "options": Target(options, read_options, 0.05),
    "prompt": Target(any_text, read_prompt, 0.15),
    "scheduler": Target(schedulers, read_scheduler, 0.05),
    "lora_name": Target(lora_keys, read_lora_name, 0.1),
    "metadata": Target(metadata, read_metadata, 0.08),
    "noise": Target(npy_files(), read_noise, 0.06),
    "table": Target(tables, read_table, 0.04),
}


def run(name: str, count: int, folder: pathlib.Path, *, derandomize: bool) -> None:
    """Gives the target that many inputs; the first that it fails on is made small, and raised."""
    target = TARGETS[name]
    configuration.set_hypothesis_home_dir(folder / "hypothesis")
    (folder / name).mkdir()

    @hypothesis.settings(
        max_examples=count, derandomize=derandomize, database=None, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(target.inputs)
    def once(value) -> None:
        with watched(folder), contextlib.suppress(UserError, BadSample):
            target.read(folder / name, value)

    once()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("targets", nargs="*", default=sorted(TARGETS))
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["SLAM_JAX_CACHE"] = ""  # where else would shapes of networks be kept
    sys.addaudithook(_audit)
    total = sum(TARGETS[name].share for name in arguments.targets)
    begun = time.process_time()
    for name in arguments.targets:
        count = round(arguments.inputs * TARGETS[name].share / total)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            run(name, count, pathlib.Path(folder), derandomize=False)
        print(f"{name}: {count:,} inputs, {time.process_time() - began:.1f} s of CPU", flush=True)
    print(f"nothing found, in {(time.process_time() - begun) / 60:.0f} minutes of CPU")


if __name__ == "__main__":
    main()
