"""Sources by name, and folders of captioned pictures."""

import io
import json
import os
import pickle
import sys
import tarfile
import time

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet as arrow_parquet

from slam_jax.data import image, image_folder, sources
from slam_jax.errors import BadSample, UserError


def _picture(path, size=(40, 20), color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def _tar(path):
    """A tar with one sample, whose caption is the tar's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in (("x.jpg", b"jpg"), ("x.txt", path.stem.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _parquet(path):
    table = pyarrow.table({"image": [b"jpg"], "text": [path.stem]})
    arrow_parquet.write_table(table, path)


def captions(name: str, index_dir: str = "") -> list[str]:
    return [each.caption for each in sources.find(name, index_dir)]


@pytest.fixture
def shards(tmp_path):
    """Tars 00 to 11 in a folder, and two Parquet files that img2dataset would write beside."""
    for number in (7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10):
        _tar(tmp_path / f"{number:02d}.tar")
    for name in ("00", "01"):
        _parquet(tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("{09..11}.tar", ["09", "10", "11"]),
        ("{02..00}.tar", ["02", "01", "00"]),
        ("{05,00,03}.tar", ["05", "00", "03"]),
        ("*1.tar", ["01", "11"]),
        ("{1*,0[12]}.tar", ["10", "11", "01", "02"]),
        ("{03,0*}.tar", ["03", "00", "01", "02", "04", "05", "06", "07", "08", "09"]),
        ("0[0-2].tar", ["00", "01", "02"]),
        ("07.tar", ["07"]),
        ("", [f"{number:02d}" for number in range(12)]),
        ("*.parquet", ["00", "01"]),
        ("{01,00}.parquet", ["01", "00"]),
    ],
)
def test_finds_shards_in_the_order_of_the_pattern(shards, pattern, found):
    for _ in range(2):
        assert captions(str(shards / pattern)) == found


def test_finds_shards_of_many_folders_and_parquet_in_one(shards, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    _tar(other / "b" / "00.tar")
    _tar(other / "a" / "c" / "01.tar")
    assert captions(f"{other}/**/*.tar") == ["01", "00"]
    (shards / "00.parquet").rename(other / "p.parquet")
    assert captions(str(other)) == ["00"]


def test_passes_on_where_indices_lie(shards, tmp_path):
    sources.find(f"{shards}/00.tar", f"{tmp_path}/indices")
    assert len(list((tmp_path / "indices").rglob("*.idx"))) == 1
    assert not list(shards.glob("*.idx"))


def test_a_home_folder_is_followed(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards))
    assert captions("~/0{1,2}.tar") == ["01", "02"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("laion", "'laion' is not there; give shapes2d"),
        ("", "give shapes2d"),
        ("s3://bucket/{000..100}.tar", "no local file; mount it"),
        ("{top}/absent.tar", "absent.tar' is not there"),
        ("{top}/absent", "absent' is not there"),
        ("{top}/absent*.tar", r"absent\*.tar' is not there"),
        ("{top}/{20..30}.tar", "is not there"),
        ("{top}/{10..13}.tar", "stands for 4 files, of which 2 are not there, such as .*12.tar"),
        ("{top}/{10..13.tar", "unbalanced braces"),
        ("{top}/0*", "stands for .*00.parquet, among 12 files; all must be"),
        ("{top}/x.tar.gz", "x.tar.gz is compressed.*decompress it to a .tar"),
        ("{top}/*.tgz", "y.tgz is compressed.*decompress"),
        ("{top}/note.txt", "stands for .*note.txt"),
    ],
)
def test_refuses_a_name_that_is_no_source(shards, name, said):
    for file in ("x.tar.gz", "y.tgz", "note.txt"):
        (shards / file).write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=said) as caught:
        sources.find(name.replace("{top}", str(shards)), "")
    assert "\n" not in str(caught.value)


def test_indices_beside_tars_are_not_taken_for_compressed_ones(shards):
    captions(str(shards))
    with pytest.raises(UserError, match="all must be"):
        sources.find(f"{shards}/00.*", "")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("{top}/00.parquet", "pyarrow", "parquet"), ("tfds:mnist", "tensorflow_datasets", "tfds")],
)
def test_says_what_to_install(shards, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"slam_jax.data.{extra}", raising=False)
    monkeypatch.delattr(f"slam_jax.data.{extra}", raising=False)
    with pytest.raises(UserError, match=rf"{package}; pip install 'slam_jax\[{extra}\]'"):
        sources.find(name.replace("{top}", str(shards)), "")


# Folders of pictures.


@pytest.fixture
def folder(tmp_path):
    for name, color in (("b/2.png", (0, 0, 255)), ("a.JPG", (255, 0, 0))):
        path = _picture(tmp_path / name, color=color)
        path.with_suffix(".txt").write_text(f"the caption of {name}\n")
    return tmp_path


def reasons(source) -> list[str]:
    found = []
    for index in range(len(source)):
        with pytest.raises(BadSample) as caught:
            source[index]
        assert caught.value.shard == source.path and caught.value.key == source.names[index]
        found.append(caught.value.reason)
    return found


def test_finds_pictures_and_the_captions_beside_them(folder):
    source = sources.find(str(folder), "")
    first, second = source
    assert first[1:] == ("the caption of a.JPG", str(folder), "a.JPG", {})
    assert second[1:] == ("the caption of b/2.png", str(folder), "b/2.png", {})
    assert first.image == (folder / "a.JPG").read_bytes()
    assert image.opened(second.image).getpixel((4, 4)) == (0, 0, 255)
    assert list(pickle.loads(pickle.dumps(source))) == [first, second]


def test_reads_metadata_jsonl(folder):
    lines = [{"file_name": "b/2.png", "text": " a\u2028b ", "aesthetic": 6.1},
             {"file_name": "a.JPG", "text": ""}]  # fmt: skip
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "metadata.jsonl").write_text(f"\ufeff{text}\n", encoding="utf-8")
    first, second = sources.find(str(folder), "")
    assert (first.caption, first.key, first.fields) == ("a\u2028b", "b/2.png", lines[0])
    assert (second.caption, second.key) == ("", "a.JPG")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "b/2.png"}', r"metadata.jsonl line 2 .*text"),
        (b"[1]", "line 2"),
        (b"{", "line 2"),
        (b"[" * 10**5, "line 2"),
        (b'{"file_name": 3, "text": "x"}', "line 2 .*no string"),
        (b'{"file_name": "b/2.png", "text": "\xff"}', "cannot read .*metadata.jsonl.*UTF-8"),
    ],
)
def test_refuses_a_broken_metadata_line(folder, line, message):
    good = b'{"file_name": "b/2.png", "text": "x"}\n'
    (folder / "metadata.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(UserError, match=message):
        sources.find(str(folder), "")


def test_bad_lines_of_metadata_are_counted(folder):
    (folder / "sub.png").mkdir()
    lines = [{"file_name": "missing.png", "text": "x"}, {"file_name": "a.JPG", "text": None},
             {"file_name": "a.JPG", "text": "\ud83d"}, {"file_name": "sub.png", "text": "x"},
             {"file_name": "a\0.png", "text": "x"}]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert reasons(sources.find(str(folder), "")) == [
        "missing image", "missing caption", "caption is not UTF-8", "unreadable file",
        "unreadable file",
    ]  # fmt: skip


def test_bad_files_are_counted(folder):
    source = sources.find(str(folder), "")
    (folder / "a.txt").unlink()
    (folder / "b" / "2.txt").write_bytes(b"\xff\xfe")
    assert reasons(source) == ["missing caption", "caption is not UTF-8"]
    (folder / "a.txt").mkdir()
    (folder / "b" / "2.txt").write_text("\ufeffgood")
    (folder / "b" / "2.png").unlink()
    assert reasons(source) == ["unreadable file", "missing image"]


def test_refuses_a_folder_without_pictures(tmp_path):
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(UserError, match="holds no .jpg.*, and no .tar .*decompress"):
        sources.find(str(tmp_path), "")


def test_names_the_part_of_a_folder_that_cannot_be_read(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(image_folder.os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read .*/b: Permission denied"):
        sources.find(str(folder), "")


def test_a_name_that_is_not_utf8_can_be_printed(folder):
    os.rename(folder / "a.JPG", os.fsencode(folder) + b"/\xff.jpg")
    with pytest.raises(BadSample, match="missing caption") as caught:
        sources.find(str(folder), "")[1]
    assert caught.value.key == r"\xff.jpg"


def test_many_pictures_open_at_once(tmp_path):
    (tmp_path / "0.jpg").touch()
    for number in range(1, 20_000):
        os.link(tmp_path / "0.jpg", tmp_path / f"{number}.jpg")
    begin = time.monotonic()
    source = sources.find(str(tmp_path), "")
    assert time.monotonic() - begin < 0.5
    assert list(source.names) == sorted(os.listdir(tmp_path))
