"""WebDataset tars: what is read of whole ones, and of every kind of broken one."""

import concurrent.futures
import io
import json
import os
import pickle
import random
import tarfile
import time
from pathlib import Path

import pytest

from slam_jax.data import tar_index, tars
from slam_jax.errors import BadSample, UserError


def pack(path: Path, members: list[tuple[str, bytes]], format=tarfile.GNU_FORMAT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def sample(key: str, caption: str = "", **fields) -> list[tuple[str, bytes]]:
    """A picture with text and json, in img2dataset's order."""
    caption = caption or f"caption {key}"
    told = json.dumps({"caption": caption, **fields}).encode()
    return [(f"{key}.jpg", b"jpg" + key.encode()), (f"{key}.json", told),
            (f"{key}.txt", caption.encode())]  # fmt: skip


def outcomes(source) -> list[str]:
    """Of each sample its caption, or why it is bad."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].caption)
        except BadSample as bad:
            found.append(f"!{bad.reason}")
    return found


def read(path: Path, members: list[tuple[str, bytes]]) -> list[str]:
    return outcomes(tars.opened([pack(path, members)], ""))


@pytest.fixture
def shard(tmp_path) -> str:
    return pack(tmp_path / "0.tar", sample("a", "red", aesthetic=6.5) + sample("b", "blue"))


def test_reads_what_img2dataset_writes(shard):
    source = tars.opened([shard], "")
    assert len(source) == 2
    first, second = source
    assert first == (b"jpga", "red", shard, "a", {"caption": "red", "aesthetic": 6.5})
    assert second == (b"jpgb", "blue", shard, "b", {"caption": "blue"})
    for index in (2, -1):
        with pytest.raises(IndexError):
            source[index]


def test_shards_follow_one_another_and_may_be_empty(tmp_path):
    members = [sample("a"), [], sample("b") + sample("c"), []]
    paths = [pack(tmp_path / f"{i}.tar", each) for i, each in enumerate(members)]
    source = tars.opened(paths, "")
    found = [(each.shard, each.key) for each in source]
    assert found == [(paths[0], "a"), (paths[2], "b"), (paths[2], "c")]
    assert len(tars.opened(paths[1:2], "")) == 0


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_long_names_of_every_format(tmp_path, format):
    ascii_only = format == tarfile.USTAR_FORMAT
    keys = ["short", "folder" * 16 + "/" + "name" * 20, "x/é" if not ascii_only else "x/e"]
    members = [member for key in keys for member in sample(key)]
    source = tars.opened([pack(tmp_path / "x.tar", members, format)], "")
    assert [each.key for each in source] == keys
    assert [each.image for each in source] == [b"jpg" + key.encode() for key in keys]
    assert [each.caption for each in source] == [f"caption {key}" for key in keys]


def test_a_very_long_key_is_cut_but_told_from_others(tmp_path):
    keys = ["k" * 400 + end for end in "ab"]
    source = tars.opened([pack(tmp_path / "x.tar", sample(keys[0]) + sample(keys[1]))], "")
    assert [each.key for each in source] == ["k" * 255] * 2
    assert [each.caption for each in source] == [f"caption {key}" for key in keys]


def test_groups_as_webdataset_does(tmp_path):
    members = [
        ("README", b"none"), (".hidden.jpg", b"none"), ("v1.2/a.JPG", b"one"), ("v1.2/a.cls", b"7"),
        ("v1.2/a.seg.png", b"mask"), ("v1.2/a.Txt", b"in a folder with a dot"),
        ("./b.txt", b"text first"), ("./b.webp", b"two"), ("./b.png", b"other"),
    ]  # fmt: skip
    source = tars.opened([pack(tmp_path / "x.tar", members)], "")
    assert [(each.key, each.image, each.caption) for each in source] == [
        ("v1.2/a", b"one", "in a folder with a dot"), ("./b", b"two", "text first"),
    ]  # fmt: skip


def test_folders_and_links_are_no_members(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.DIRTYPE), ("a.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert outcomes(tars.opened([str(path)], "")) == ["!missing image"]


@pytest.mark.parametrize(
    ("members", "found"),
    [
        (sample("a") + sample("b") + sample("a"), ["caption a", "caption b", "!duplicate key"]),
        (sample("a") + sample("a"), ["caption a", "!duplicate key"]),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"b")], ["!missing caption", "b"]),
        ([("a.txt", b"1"), ("a.json", b"{}"), *sample("b")], ["!missing image", "caption b"]),
        ([("a.jpg", b"1"), ("a.txt", b"\xff\xfe")], ["!caption is not UTF-8"]),
        ([("a.jpg", b"1"), ("a.txt", b"\xef\xbb\xbf marked \n")], ["marked"]),
        ([("a.jpg", b"1"), ("a.json", b'{"caption": "c"}')], ["c"]),
        ([("a.jpg", b"1"), ("a.json", b'{"caption": null}')], ["!missing caption"]),
        ([("a.jpg", b"1"), ("a.json", b"{}")], ["!missing caption"]),
        ([("a.jpg", b"1"), ("a.json", b'{"caption": "\\ud83d"}')], ["!caption is not UTF-8"]),
        ([("a.jpg", b"1"), ("a.txt", b"t"), ("a.json", b"{")], ["!broken json"]),
        ([("a.jpg", b"1"), ("a.txt", b"t"), ("a.json", b"[1]")], ["!broken json"]),
        ([("a.jpg", b"1"), ("a.txt", b"t"), ("a.json", b"\xff")], ["!broken json"]),
        ([("a.jpg", b"1"), ("a.txt", b"t"), ("a.json", b"[" * 10**6)], ["!broken json"]),
        ([("a.jpg", b""), ("a.txt", b"t")], ["t"]),  # image.opened tells of it
    ],
)  # fmt: skip
def test_counts_bad_samples_by_reason(tmp_path, members, found):
    assert read(tmp_path / "x.tar", members) == found


def test_a_bad_sample_says_where_it_lies(tmp_path):
    path = pack(tmp_path / "x.tar", sample("a") + [("bad\udcff.jpg", b"1")])
    with pytest.raises(BadSample) as caught:
        tars.opened([path], "")[1]
    assert (caught.value.shard, caught.value.key) == (path, r"bad\xff")


def test_names_are_never_paths_to_write_to(tmp_path):
    names = ["../up", "/abs" + str(tmp_path / "x"), "a/../../b"]
    members = [member for name in names for member in sample(name)]
    path = pack(tmp_path / "in" / "x.tar", members)
    assert [each.key for each in tars.opened([path], "")] == names
    left = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert left == [Path(path), Path(f"{path}.idx")]


def test_a_sample_cut_in_a_part_of_no_use_is_truncated_too(tmp_path):
    path = pack(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.cls", b"x" * 2000)])
    os.truncate(path, 2600)
    assert outcomes(tars.opened([path], "")) == ["!truncated tar"]


def test_a_cut_picture_leaves_the_sample_before_it_as_it_is(tmp_path):
    members = [*sample("a"), ("b.jpg", b"1"), ("c.jpg", b"x" * 2000)]
    path = pack(tmp_path / "x.tar", members)
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmember("c.jpg").offset_data + 1999)
    found = outcomes(tars.opened([path], ""))
    assert found == ["caption a", "!missing caption", "!truncated tar"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_of_a_truncated_tar_whole_samples_are_kept(tmp_path, format):
    keys = ["a", "b" * 120, "é"]
    members = [member for key in keys for member in sample(key)]
    whole = pack(tmp_path / "whole.tar", members, format)
    content = Path(whole).read_bytes()
    with tarfile.open(whole) as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()[2::3]]
    for size in range(513, ends[-1] + 300, 37):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(content[:size])
        source = tars.opened([str(path)], "")
        found, num_whole = outcomes(source), sum(end <= size for end in ends)
        assert found[:num_whole] == [f"caption {key}" for key in keys[:num_whole]]
        # What is left after the last whole sample: nothing, padding, or one that is cut.
        # Of the first sample nothing tells that it had a text besides the json.
        allowed = {"!truncated tar"} | ({"caption a"} if num_whole == 0 else set())
        assert set(found[num_whole:]) <= allowed
        next_start = -(-ends[num_whole - 1] // 512) * 512 if num_whole else 0
        if 0 < num_whole < 3 and size > next_start:
            assert len(found) == num_whole + 1


def test_a_damaged_header_ends_the_tar(tmp_path):
    path = Path(pack(tmp_path / "x.tar", sample("a") + sample("b") + sample("c")))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("b.jpg").offset
    content[start : start + 20] = b"?" * 20
    path.write_bytes(content)
    source = tars.opened([str(path)], "")
    assert outcomes(source) == ["caption a", "!damaged tar"]
    with pytest.raises(BadSample) as caught:
        source[1]
    assert caught.value.key == f"byte {start}"


@pytest.mark.parametrize("size", [-512, -1024, -100, -(10**20), 2**70])
def test_a_size_that_points_anywhere_ends_the_tar(tmp_path, size):
    path = Path(pack(tmp_path / "x.tar", sample("a") + sample("b")))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("b.txt").offset
    header = content[start : start + 512]
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + 512] = header
    path.write_bytes(content)
    first, second = outcomes(tars.opened([str(path)], ""))
    assert first == "caption a"
    assert second in ("!damaged tar", "!truncated tar")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0.tar is no tar file"),
        (b"<html>not found</html>" * 100, "0.tar is no tar file"),
        (b"\x1f\x8b" + b"x" * 1000, "0.tar is compressed"),
        (None, "cannot read .*0.tar: No such file"),
    ],
)
def test_a_file_that_is_no_tar_is_refused(shard, content, said):
    other = Path(shard).with_name("1.tar")
    os.rename(shard, other)
    if content is not None:
        Path(shard).write_bytes(content)
    with pytest.raises(UserError, match=said):
        tars.opened([str(other), shard], "")


def test_the_index_is_made_once_and_anew_when_the_tar_changes(shard):
    index = Path(f"{shard}.idx")
    tars.opened([shard], "")
    before = index.stat()
    assert outcomes(tars.opened([shard], "")) == ["red", "blue"]
    assert index.stat() == before or index.stat().st_mtime_ns == before.st_mtime_ns
    pack(Path(shard), sample("c", "new"))
    assert outcomes(tars.opened([shard], "")) == ["new"]
    # The same size, another time.
    pack(Path(shard), sample("d", "old"))
    os.utime(shard, ns=(0, 5))
    assert [each.key for each in tars.opened([shard], "")] == ["d"]


@pytest.mark.parametrize("mend", [lambda b: b[:-1], lambda b: b"", lambda b: b"x" + b[1:]])
def test_a_broken_index_is_made_anew(shard, mend):
    tars.opened([shard], "")
    index = Path(f"{shard}.idx")
    whole = index.read_bytes()
    index.write_bytes(mend(whole))
    assert outcomes(tars.opened([shard], "")) == ["red", "blue"]
    assert index.read_bytes() == whole


def test_a_damaged_row_of_an_index_is_not_followed(shard):
    tars.opened([shard], "")
    index = Path(f"{shard}.idx")
    content = index.read_bytes()
    row = len(content[28:]) // 2
    for place in range(28, 28 + row):
        index.write_bytes(content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :])
        tars._opened.cache_clear()
        assert outcomes(tars.opened([shard], "")) == ["!unreadable shard", "blue"]


def test_indices_can_lie_elsewhere(tmp_path):
    paths = [pack(tmp_path / folder / "0.tar", sample(folder)) for folder in "ab"]
    for _ in range(2):
        source = tars.opened(paths, str(tmp_path / "new" / "idx"))
        assert outcomes(source) == ["caption a", "caption b"]
    assert not list(tmp_path.glob("[ab]/*.idx"))
    assert len(list(tmp_path.glob("new/idx/*/0.tar.idx"))) == 2


def test_says_where_to_put_indices_that_cannot_be_written(shard):
    Path(f"{shard}.idx").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*0.tar.idx: .*give data.index_dir"):
        tars.opened([shard], "")
    assert len(list(Path(shard).parent.iterdir())) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_no_index_is_half_written(shard, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tar_index.os, "replace", fail)
        with pytest.raises((UserError, KeyboardInterrupt)):
            tars.opened([shard], "")
    assert os.listdir(Path(shard).parent) == ["0.tar"]
    assert outcomes(tars.opened([shard], "")) == ["red", "blue"]


# JAX, which other tests load, warns of any fork; the child here only writes and dies.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_run_leaves_no_index(shard, monkeypatch):
    child = os.fork()
    if not child:
        os.replace = lambda *_: os._exit(9)  # between writing and renaming
        tar_index.write(shard, f"{shard}.idx")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not os.path.exists(f"{shard}.idx")
    assert outcomes(tars.opened([shard], "")) == ["red", "blue"]


def test_a_pickled_source_holds_no_files(shard):
    tars.opened([shard], "")
    source = tars.opened([shard] * 1000, "")
    source[0]
    pickled = pickle.dumps(source)
    assert len(pickled) < 200_000
    assert list(pickle.loads(pickled)) == list(source)


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_threads_share_few_open_files(tmp_path):
    paths = [pack(tmp_path / f"{i}.tar", sample(f"{i}a") + sample(f"{i}b")) for i in range(100)]
    source = tars.opened(paths, "")
    tars._opened.cache_clear()
    before = num_files()
    order = random.Random(0).choices(range(200), k=2000)

    def read_some(first: int) -> int:
        for index in order[first::8]:
            key = f"{index // 2}{'ab'[index % 2]}"
            assert source[index] == (
                b"jpg" + key.encode(), f"caption {key}", paths[index // 2], key,
                {"caption": f"caption {key}"},
            )  # fmt: skip
        return num_files()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        most = max(pool.map(read_some, range(8)))
    assert before < most <= before + 2 * (64 + 8) + 8  # listing them opens one, too
    assert num_files() == before + 2 * 64
    tars._opened.cache_clear()
    assert num_files() == before


@pytest.mark.parametrize("was_open", [False, True])
@pytest.mark.parametrize("change", ["shrink", "replace", "remove", "remove index", "replace index"])
def test_a_tar_that_changes_under_way_is_unreadable_not_wrong(shard, change, was_open):
    source = tars.opened([shard], "")
    if was_open:
        source[0]
    if change == "shrink":
        os.truncate(shard, 700)
    elif change == "replace":
        pack(Path(shard + "2"), sample("c", "other") + sample("d", "another"))
        os.replace(shard + "2", shard)
    elif change == "replace index":
        other = pack(Path(shard + "2"), sample("c") + sample("d"))
        tar_index.write(other, f"{shard}.idx")
    else:
        os.unlink(shard if change == "remove" else f"{shard}.idx")
    if was_open and change != "shrink":
        assert outcomes(source) == ["red", "blue"]  # the descriptors still lead to the old files
    else:
        assert outcomes(source) == ["!unreadable shard"] * 2


def test_ten_thousand_shards_open_within_two_seconds(shard, tmp_path):
    tars.opened([shard], "")
    paths = [str(tmp_path / f"{i:05d}.tar") for i in range(10_000)]
    for path in paths:
        os.link(shard, path)
        os.link(f"{shard}.idx", f"{path}.idx")
    begin = time.monotonic()
    source = tars.opened(paths, "")
    drawn = [source[i] for i in random.Random(1).choices(range(20_000), k=64)]
    assert time.monotonic() - begin < 2
    assert len(source) == 20_000 and {each.caption for each in drawn} == {"red", "blue"}
    assert len({each.shard for each in drawn}) > 60
