"""TensorFlow Datasets without TensorFlow."""

import concurrent.futures
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slam_jax.data import sources
from slam_jax.data import tfds as our_tfds
from slam_jax.errors import BadSample, UserError

# A dataset of pairs, whose builder has to lie in a module of its own folder.
BUILDER = """
import importlib.resources.abc
import io
import sys

sys.modules.setdefault("importlib_resources", importlib.resources)

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features
CONFIGS = {
    "caption": F.Text(),
    "captions": F.Sequence({"text": F.Text(), "id": np.int64}),
    "text": F.Sequence(F.Text()),
    "label": F.ClassLabel(num_classes=9),
}


class Config(tfds.core.BuilderConfig):
    pass


class Pairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.10.0")
    BUILDER_CONFIGS = [Config(name=name) for name in CONFIGS]

    def _info(self):
        name = self.builder_config.name
        image = F.Image(encoding_format="png")
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({
            "image": image, name: CONFIGS[name], "score": np.float32, "count": np.int64,
            "source": F.Text(), "mask": image, "box": F.BBoxFeature(),
        }))

    def _split_generators(self, _):
        return {"train": self._generate_examples(0, 5), "test": self._generate_examples(5, 8)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            text = f"caption {i}"
            captions = {
                "caption": text, "captions": [{"text": text, "id": i}, {"text": "2", "id": 0}],
                "text": [text] if i != 7 else [], "label": i,
            }
            name = self.builder_config.name
            yield i, {"image": picture(i), name: captions[name], "score": i / 2, "count": i,
                      "source": "web", "mask": picture(0), "box": F.BBox(0.0, 0.0, 1.0, 1.0)}


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (8, 4), (i, 0, 0)).save(file, "PNG")
    file.seek(0)
    return file


for name in CONFIGS:
    Pairs(config=name, data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    module = tmp_path_factory.mktemp("pairs") / "pairs.py"
    module.write_text(BUILDER)
    folder = tmp_path_factory.mktemp("tfds")
    run(str(module), str(folder))
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    return folder


@pytest.fixture
def data(prepared, monkeypatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return prepared


@pytest.fixture
def copied(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of one config, to be broken."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return Path(shutil.copytree(prepared / "pairs" / "caption", tmp_path / "pairs")) / "1.10.0"


@pytest.mark.parametrize("config", ["caption", "captions", "text"])
def test_reads_captions_however_they_are_given(data, config):
    source = sources.find(f"tfds:pairs/{config}", "")
    assert len(source) == 5
    found = list(source)
    assert sorted(each.caption for each in found) == [f"caption {i}" for i in range(5)]
    for number, each in enumerate(found):
        i = int(each.caption[-1])
        fields = {name: each.fields[name] for name in ("score", "count", "source")}
        assert fields == {"score": i / 2, "count": i, "source": "web"}
        assert (type(fields["score"]), type(fields["count"])) == (float, int)
        assert not {"mask", "box", "image"} & each.fields.keys()
        assert each.shard == f"{data}/pairs/{config}/1.10.0" and each.key == str(number)
        assert isinstance(each.image, bytes) and each.image.startswith(b"\x89PNG")
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("pairs/caption@test", [5, 6, 7]),
        ("pairs/caption:1.10.0@train[:40%]", 2),
        ("pairs/caption/1.10.0@train+test", 8),
        ("{data}/pairs/caption/1.10.0@test", [5, 6, 7]),
    ],
)
def test_reads_splits_versions_and_folders(data, name, numbers):
    source = sources.find(f"tfds:{name.replace('{data}', str(data))}", "")
    found = sorted(int(each.caption[-1]) for each in source)
    assert found == numbers or len(found) == numbers


def test_pixels_are_the_example_s_own(data):
    from slam_jax.data import image

    for each in sources.find("tfds:pairs/caption", ""):
        assert image.opened(each.image).getpixel((0, 0)) == (int(each.caption[-1]), 0, 0)


def test_numbers_are_python_s_whichever_reader_made_them():
    found = [our_tfds._plain(value) for value in (np.float32(0.5), np.int64(3), b"\xff", [1])]
    assert found == [0.5, 3, "\ufffd", None]
    assert [type(value) for value in found[:2]] == [float, int]


def test_no_text_in_a_sequence_is_a_missing_caption(data):
    source = sources.find("tfds:pairs/text@test", "")
    reasons = []
    for index in range(3):
        try:
            source[index]
        except BadSample as bad:
            reasons.append((bad.reason, bad.shard, bad.key))
    assert [reason for reason, _, _ in reasons] == ["missing caption"]


def test_the_newest_version_is_read(copied):
    shutil.copytree(copied, copied.with_name("1.9.0"))
    shutil.copytree(copied, copied.with_name("incomplete.XYZ_2.0.0"))
    assert sources.find("tfds:pairs", "")[0].shard == str(copied)
    assert sources.find("tfds:pairs:1.9.0", "")[0].shard == str(copied.with_name("1.9.0"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", r"tfds:nothing is not in .*TFDS_DATA_DIR.*tfds build nothing --file_format"),
        ("", "is not in"),
        ("pairs", "has configs caption, captions, label, text; give tfds:pairs/CONFIG"),
        ("pairs/caption:3.0.0", "is not in"),
        ("pairs/caption@valid", "valid.*train.*test"),
        ("pairs/caption@train[", "cannot be read: .*split"),
        ("pairs/label", r"image \(Image\), label \(ClassLabel\).*must have .*caption, captions"),
    ],
)
def test_refuses_what_it_cannot_read(data, name, said):
    with pytest.raises(UserError, match=said) as caught:
        sources.find(f"tfds:{name}", "")
    assert "\n" not in str(caught.value)


def test_refuses_a_format_without_random_access(copied):
    info = json.loads((copied / "dataset_info.json").read_text())
    (copied / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="not prepared for random access; .*array_record"):
        sources.find("tfds:pairs", "")


def test_refuses_a_broken_dataset_info(copied):
    (copied / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="tfds:pairs@train cannot be read"):
        sources.find("tfds:pairs", "")


@pytest.mark.parametrize("break_it", [
    lambda content: b"", lambda content: content[: len(content) // 2],
    lambda content: content[:100] + bytes(byte ^ 255 for byte in content[100:900]) + content[900:],
    None,
])  # fmt: skip
def test_a_broken_shard_gives_bad_samples(copied, break_it):
    path = next(copied.glob("*train*"))
    if break_it is None:
        path.unlink()
    else:
        path.write_bytes(break_it(path.read_bytes()))
    source = sources.find("tfds:pairs", "")
    with pytest.raises(BadSample, match="unreadable record") as caught:
        source[0]
    assert (caught.value.shard, caught.value.key) == (str(copied), "0")


def test_threads_and_copies_read_the_same(data):
    source = sources.find("tfds:pairs/caption", "")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in (pool.map(copy.__getitem__, list(range(5)) * 20),):
            assert list(found) == list(source) * 20


def test_tensorflow_is_never_imported(data):
    lines = (
        "import sys",
        "from slam_jax.data import sources",
        "source = sources.find('tfds:pairs/caption', '')",
        "print(len(list(source)), 'tensorflow' in sys.modules)",
    )
    assert run("-c", "\n".join(lines)) == "5 False\n"
