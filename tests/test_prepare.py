"""Preparing a cache: its contents against the VAE's own, and that no kill and no host shows."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from slam_jax import pipeline, prepare
from slam_jax.data import cache, manifest, pictures, report, sources, text_inputs, verify, watch
from slam_jax.data.image import Crop
from slam_jax.errors import UserError
from slam_jax.runtime import hosts
from slam_jax.weights import fingerprint, pretrained, translate

ROOT = pathlib.Path(__file__).parents[1]
NUM = 22
# Of the pictures below.
BAD = {"damaged picture": 1, "missing caption": 1, "no picture in a known format": 1}
SMALL = 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of captioned pictures of many sizes, three of them broken and four small."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(NUM):
        size = (33 + 3 * index, 70 - index) if index % 7 else (20, 30)
        # Smooth, as photos are.
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text("a cat" if index % 2 else f"{index} " * 90)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    (folder / "04.png").write_bytes(b"no picture")
    (folder / "05.txt").unlink()
    return folder


def _run(out, *options, **more):
    """The program's main, in this process."""
    with flagsaver.flagsaver():
        flags.FLAGS(["prepare", f"--out={out}", *options])
        for name, value in more.items():
            flags.FLAGS[name].value = value
        prepare.main()


def _options(photos, model):
    return [
        f"--source={photos}", f"--model={model}", "--size=32", "--records_per_shard=8",
        "--batch_size=2", "--num_threads=2", "--max_bad_fraction=0.2",
        "--filter=short_side >= 32",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def on_terminal(photos, tiny_folder, tmp_path_factory):
    """A finished cache, and what a terminal has shown."""
    out = tmp_path_factory.mktemp("finished") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        _run(out, *_options(photos, tiny_folder))
        return out, sys.stderr.getvalue()


@pytest.fixture(scope="module")
def finished(on_terminal):
    return on_terminal[0]


def _files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _kept():
    return [i for i in range(NUM) if i % 7 and i not in (3, 4, 5)]


def test_records_are_the_posterior_of_the_pictures(finished, photos, tiny_folder):
    """Of each the same pixels, encoded alone, by the posterior that training takes."""
    model = pretrained.read(tiny_folder)
    tokens = text_inputs.read(model.tokenizer, None)
    read = pictures.Pictures(sources.find(str(photos), ""), (), Crop(32, False, False), tokens)
    encode = jax.jit(pipeline.posterior(model.vae.config, np.float32))
    found = cache.find(finished)
    assert len(found) == len(_kept()) == 15
    for index, number in enumerate(_kept()):
        ours, theirs = found.example(index, (0,)), read.example(number, (0, number, 0))
        pixels = jax.device_put(theirs.arrays["image"][None])
        expected = np.concatenate(encode(model.vae.params, pixels), -1)[0]
        assert ours.arrays["moments"].dtype.name == found.manifest.plan.dtype
        np.testing.assert_allclose(
            ours.arrays["moments"].astype(np.float32), expected, rtol=2**-8, atol=1e-5
        )
        np.testing.assert_array_equal(ours.arrays["input_ids"], theirs.arrays["input_ids"])
        assert ours.cut == theirs.cut == (number % 2 == 0)
        record = found.record(index)
        assert (record.shard, record.key) == (str(photos), f"{number:02d}.png")
        assert record.caption == (photos / f"{number:02d}.txt").read_text().strip()
        assert tuple(record.time_ids[:2]) == (70 - number, 33 + 3 * number)


def test_a_terminal_shows_how_far_it_is(on_terminal):
    assert re.search(r"encoding: +\d+%\|.*\[\d\d:\d\d<", on_terminal[1])
    assert f"{NUM}/{NUM} " in on_terminal[1] and "samples/s" in on_terminal[1]


def test_the_manifest_says_how_it_was_made(finished, photos, tiny_folder):
    whole = cache.find(finished).manifest
    vae = fingerprint.of_params(pretrained.read(tiny_folder).vae.params)
    tokens = text_inputs.fingerprints(text_inputs.read(tiny_folder / "tokenizer", None))
    assert (whole.plan.vae, whole.plan.tokenizers) == (vae, tokens)
    assert (whole.plan.source, whole.plan.latent) == (str(photos), (16, 16, 4))
    assert (whole.kept, whole.bad) == (15, BAD)
    assert whole.filtered == {"short_side < 32": SMALL}
    assert [shard.records for shard in whole.shards] == [3, 7, 5]
    cache.check(cache.find(finished), size=32, vae=vae, tokenizers=tokens)


def test_sdxl_has_two_texts_and_sizes(photos, tiny_sdxl_folder, tmp_path):
    """And each crop is the one that training from the pictures would see."""
    _run(tmp_path / "c", *_options(photos, tiny_sdxl_folder), "--crops=3", "--flip", "--seed=4")
    model = pretrained.find(tiny_sdxl_folder)
    tokens = text_inputs.read(model.tokenizer, model.tokenizer_2)
    read = pictures.Pictures(sources.find(str(photos), ""), (), Crop(32, True, True), tokens)
    encode = jax.jit(pipeline.cached_posterior(model.vae.config, np.float32))
    vae = translate.load(model.vae.params, dtype=np.float32)
    found = cache.find(tmp_path / "c")
    assert len(found) == 3 * len(_kept())
    places = set()
    for index in range(len(found)):
        number, variant = _kept()[index // 3], index % 3
        ours = found.example(index, (0,)).arrays
        theirs = read.example(number, (4, number, variant)).arrays
        assert ours.keys() - {"moments"} == theirs.keys() - {"image"}
        assert ours.keys() > {"input_ids_2", "time_ids"}
        for name in ("input_ids", "input_ids_2", "time_ids"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        expected = np.asarray(encode(vae, jax.device_put(theirs["image"][None])))[0]
        np.testing.assert_allclose(
            ours["moments"].astype(np.float32), expected.astype(np.float32), rtol=2**-7, atol=1e-5
        )
        places.add(tuple(ours["time_ids"]))
    assert len(places) > 20


def test_two_hosts_make_what_one_makes(finished, photos, tiny_folder, tmp_path, monkeypatch):
    for host in (1, 0):
        monkeypatch.setattr(hosts, "part", lambda host=host: (host, 2))
        _run(tmp_path / "c", *_options(photos, tiny_folder))
        shards = len(list((tmp_path / "c").glob("shard*.array_record")))
        assert shards == (1 if host else 3)
        assert cache.is_cache(tmp_path / "c")
        assert (tmp_path / "c" / manifest.MANIFEST).exists() == (host == 0)
    assert _files(tmp_path / "c") == _files(finished)


def test_the_launcher_makes_it_on_two_hosts(finished, photos, tiny_folder, tmp_path):
    done = subprocess.run(
        [ROOT / "launch/local.sh", "2", f"--out={tmp_path / 'c'}", *_options(photos, tiny_folder)],
        env={**os.environ, "MODULE": "slam_jax.prepare", "PYTHON": sys.executable},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kept 15 of 22 pictures" in done.stdout
    assert _files(tmp_path / "c") == _files(finished)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(photos, tiny_folder, tmp_path):
    random = np.random.default_rng(0).integers(2, 9, 5)
    moments = [str(m) for m in random] + ["00000-of-00003.array_record", manifest.MANIFEST]
    done = subprocess.run(
        [
            sys.executable, pathlib.Path(__file__).with_name("killed_prepare.py"),
            tmp_path / "whole", tmp_path / "killed", ",".join(moments),
            *_options(photos, tiny_folder),
        ],
        timeout=100, capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole = _files(tmp_path / "whole")
    assert len(whole) == 8
    assert _files(tmp_path / "killed") == whole
    assert cache.find(tmp_path / "killed").manifest.kept == 15


def test_worker_processes_change_nothing(finished, photos, tiny_folder, tmp_path):
    _run(tmp_path / "c", *_options(photos, tiny_folder), "--num_workers=1")
    assert _files(tmp_path / "c") == _files(finished)


@pytest.fixture
def copy(finished, tmp_path):
    (tmp_path / "copy").mkdir()
    for name, content in _files(finished).items():
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"


def test_a_damaged_shard_is_named_and_made_again(copy, finished, photos, tiny_folder, capsys):
    _run(copy, "--verify")
    assert "every record is as it was written" in capsys.readouterr().out
    path = sorted(copy.glob("*.array_record"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"1 damaged: {path} .*delete them and run"):
        _run(copy, "--verify")
    others = {p: p.stat().st_mtime_ns for p in copy.glob("*.array_record") if p != path}
    path.unlink()
    with pytest.raises(UserError, match="cannot open.*run slam_jax.prepare"):
        cache.find(copy)
    _run(copy, *_options(photos, tiny_folder), "--verify")
    assert _files(copy) == _files(finished)
    assert {p: p.stat().st_mtime_ns for p in others} == others
    # One that is short is seen without being read.
    path.write_bytes(content[:100])
    _run(copy, *_options(photos, tiny_folder))
    assert _files(copy) == _files(finished)


def test_a_report_of_a_finished_cache(copy, capsys):
    _run(copy, "--report")
    assert str(copy / report.HTML) in capsys.readouterr().out
    numbers = json.loads((copy / report.JSON).read_text())
    assert (numbers["samples"], numbers["kept"], numbers["captions_cut"]) == (NUM, 15, 8)
    assert numbers["bad"] == BAD and numbers["filtered"] == {"short_side < 32": SMALL}
    kept = [(33 + 3 * i, 70 - i) for i in _kept()]
    small = sum(min(size) < 64 for size in kept)
    assert (numbers["short_side"]["< 64"], numbers["short_side"]["64-128"]) == (small, 15 - small)
    # <start> a c a t <end>: the tiny tokenizer knows letters alone.
    assert numbers["tokens"] == {"6": 7, "77": 8}
    (copy / "shard-00000-of-00003.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        _run(copy, "--report")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=64"], "size=32 and this run has size=64"),
        (["--seed=1"], "seed=0 and this run has seed=1"),
        (["--crops=2"], "crops=1 and this run has crops=2"),
        (["--num_images=9"], "num_samples=22 and this run has num_samples=9"),
        (["--filter=aspect <= 2"], "filters="),
        (["--size=33"], "multiple of 2"),
        (["--filter=aspect"], "FIELD >= NUMBER"),
        (["--compute_dtype=int8"], "int8"),
        (["--source=nowhere"], "nowhere"),
        (["--model=nowhere"], "nowhere"),
        (["--source=shapes2d"], "give --num_images"),
    ],
)  # fmt: skip
def test_mistakes_are_told(copy, finished, photos, tiny_folder, options, message):
    with pytest.raises(UserError, match=message) as caught:
        _run(copy, *_options(photos, tiny_folder), *options)
    assert "\n" not in str(caught.value)
    assert _files(copy) == _files(finished)


def test_flags_that_belong_together(tmp_path, photos):
    for options, message in (
        ([], "give --source and --model"),
        ([f"--source={photos}"], "--source is given"),
        (["--verify"], "is no cache"),
    ):
        with pytest.raises(UserError, match=message):
            _run(tmp_path / "c", *options)


def test_other_folders_are_left_alone(tmp_path, photos, tiny_folder):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds thesis.txt and is no cache"):
        _run(tmp_path, *_options(photos, tiny_folder))
    with pytest.raises(UserError, match="thesis.txt"):
        _run(tmp_path / "thesis.txt", *_options(photos, tiny_folder))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_many_bad_samples_stop(tmp_path, photos, tiny_folder):
    options = [*_options(photos, tiny_folder), "--max_bad_fraction=0.1"]
    for _ in range(2):  # a rerun says the same
        with pytest.raises(UserError, match=rf"3 of 18 samples .*{photos.name}: 1 .*max_bad|allow"):
            _run(tmp_path / "c", *options)
        with pytest.raises(UserError, match="not finished"):
            cache.find(tmp_path / "c")
    _run(tmp_path / "c", *_options(photos, tiny_folder))
    assert len(cache.find(tmp_path / "c")) == 15


def test_filters_that_drop_everything_stop(tmp_path, photos, tiny_folder, monkeypatch):
    options = [*_options(photos, tiny_folder), "--filter=short_side >= 1000"]
    with pytest.raises(UserError, match=r"all samples .*short_side < 1000.*loosen --filter"):
        _run(tmp_path / "end", *options, "--max_bad_fraction=1")
    monkeypatch.setattr(watch, "_PATIENCE", 5)
    with pytest.raises(UserError, match="the last 5 samples"):
        _run(tmp_path / "c", *options)
    assert not list((tmp_path / "c").glob("shard*")) and not list((tmp_path / "c").glob(".*"))


def test_latents_that_are_not_finite_are_bad(tmp_path, photos, tiny_folder):
    model = pretrained.read(tiny_folder)
    model.vae.params["encoder"]["conv_in"]["bias"][:] = np.inf
    pretrained.write(tmp_path / "model", model)
    with pytest.raises(UserError, match="18 of 18 samples .*15 latent not finite"):
        _run(tmp_path / "c", *_options(photos, tmp_path / "model"))


def test_another_vae_is_refused(copy, photos, tiny_folder, tmp_path):
    model = pretrained.read(tiny_folder)
    model.vae.params["encoder"]["conv_in"]["bias"][0] += 1e-3
    pretrained.write(tmp_path / "model", model)
    with pytest.raises(UserError, match="was begun with vae="):
        _run(copy, *_options(photos, tmp_path / "model"))


def test_drawings_are_a_source(tmp_path, tiny_folder, capsys):
    options = ["--source=shapes2d", f"--model={tiny_folder}", "--size=32", "--num_images=20"]
    _run(tmp_path / "c", *options, "--crops=2", "--flip", "--records_per_shard=15")
    assert len(cache.find(tmp_path / "c")) == 40
    told, err = capsys.readouterr()
    assert "kept 20 of 20 pictures" in told and "2 times the work and disk" in told
    assert err == ""  # no bar where nobody looks
    assert [n for _, n in verify.damage(tmp_path / "c")] == [None, None]


def test_any_name_and_caption_is_survived(tmp_path, tiny_folder):
    """Names that are not UTF-8, empty captions, and half an emoji, which JSON can hold."""
    folder = tmp_path / "photos"
    folder.mkdir()
    captions = {"a.png": "", "b\udcff.png": "\0 ünï <b>", "c.png": "\ud83d", "d.png": "x" * 10**5}
    for name in captions:
        Image.new("RGB", (40, 33)).save(folder / name)
    lines = (json.dumps({"file_name": n, "text": text}) for n, text in captions.items())
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    _run(tmp_path / "c", *_options(folder, tiny_folder), "--max_bad_fraction=0.25", "--report")
    found = cache.find(tmp_path / "c")
    assert [found.record(i).key for i in range(3)] == ["a.png", r"b\xff.png", "d.png"]
    assert found.manifest.bad == {"caption is not UTF-8": 1}
    assert "c.png" in (tmp_path / "c" / report.HTML).read_text()
