"""Parquet files with pictures and captions."""

import concurrent.futures
import os
import pickle
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet as arrow_parquet

from slam_jax.data import parquet
from slam_jax.errors import BadSample, UserError


def write(path: Path, rows: int = 7, group: int = 3, **columns) -> str:
    columns = {"image": [b"jpg%d" % i for i in range(rows)],
               "text": [f"caption {i}" for i in range(rows)], **columns}  # fmt: skip
    table = pyarrow.table({name: each for name, each in columns.items() if each is not None})
    arrow_parquet.write_table(
        table,
        path,
        row_group_size=group,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )  # so that tests find the bytes
    return str(path)


def reason(source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    assert (caught.value.shard, caught.value.key) == (source.files[0].path, str(index))
    return caught.value.reason


def test_reads_rows_in_order_over_files_and_row_groups(tmp_path):
    scores = [i / 2 for i in range(7)]
    paths = [
        write(tmp_path / "b.parquet", score=scores),
        write(tmp_path / "a.parquet", rows=0),
        write(tmp_path / "c.parquet", rows=2),
    ]
    source = parquet.opened(paths)
    assert len(source) == 9
    assert [each.key for each in source] == [*"0123456", *"01"]
    assert [each.shard for each in source] == [paths[0]] * 7 + [paths[2]] * 2
    assert source[4] == (b"jpg4", "caption 4", paths[0], "4", {"score": 2.0})
    assert source[8] == (b"jpg1", "caption 1", paths[2], "1", {})
    for index in (9, -1):
        with pytest.raises(IndexError):
            source[index]


def test_reads_what_hugging_face_writes(tmp_path):
    images = [{"bytes": b"png", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    source = parquet.opened([write(tmp_path / "x.parquet", rows=3, image=images)])
    assert source[0].image == b"png"
    assert [reason(source, index) for index in (1, 2)] == ["missing image"] * 2


@pytest.mark.parametrize(
    ("names", "caption"),
    [(["caption", "text"], "text"), (["TEXT", "caption"], "caption"), (["prompt"], "prompt"),
     (["prompt", "TEXT"], "TEXT")],
)  # fmt: skip
def test_the_caption_is_the_first_column_that_is_known(tmp_path, names, caption):
    columns = {name: [f"the {name}"] for name in names}
    source = parquet.opened([write(tmp_path / "x.parquet", 1, **{"text": None, **columns})])
    assert source[0].caption == f"the {caption}"
    assert source[0].fields == {name: f"the {name}" for name in names if name != caption}


def test_numbers_and_strings_become_fields(tmp_path):
    columns = {
        "n": pyarrow.array([3], pyarrow.int16()), "x": pyarrow.array([0.5], pyarrow.float32()),
        "yes": [True], "word": pyarrow.array(["w"]).dictionary_encode(), "none": [None],
        "list": [[1]], "raw": [b"x"], "gone": pyarrow.array([None], pyarrow.float64()),
    }  # fmt: skip
    source = parquet.opened([write(tmp_path / "x.parquet", 1, **columns)])
    expected = {"n": 3, "x": 0.5, "yes": True, "word": "w", "none": None, "gone": None}
    assert source[0].fields == expected


def test_bad_captions_are_counted(tmp_path):
    raw = pyarrow.array([b"\xff", None, b"good"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    source = parquet.opened([write(tmp_path / "x.parquet", 3, text=text)])
    assert reason(source, 0) == "caption is not UTF-8"
    assert reason(source, 1) == "missing caption"
    assert source[2].caption == "good"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": None}, "has columns text; it must have 'image'"),
        ({"image": ["a file name"] * 7}, "it must have 'image', picture files as bytes"),
        ({"text": None}, "has columns image; .* one of text, caption, TEXT, prompt"),
        ({"text": [["several"]] * 7}, "one of text, caption"),
    ],
)
def test_refuses_other_columns(tmp_path, columns, said):
    path = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(UserError, match=f"x.parquet.*{said}"):
        parquet.opened([path])


@pytest.mark.parametrize("size", [0, 3, 200, -1, None])
def test_refuses_what_is_no_whole_parquet_file(tmp_path, size):
    path = tmp_path / "x.parquet"
    write(path)
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size % path.stat().st_size)
    with pytest.raises(UserError, match="cannot read .*x.parquet as Parquet") as caught:
        parquet.opened([str(path)])
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_spoils_its_row_group_alone(tmp_path):
    path = Path(write(tmp_path / "x.parquet"))
    content = bytearray(path.read_bytes())
    content[content.index(b"jpg4")] ^= 1
    path.write_bytes(content)
    source = parquet.opened([str(path)])
    for index in (3, 4, 5):
        assert reason(source, index) == "unreadable row group"
    assert [source[index].caption for index in (0, 2, 6)] == ["caption 0", "caption 2", "caption 6"]


@pytest.mark.parametrize("change", ["truncate", "replace", "remove"])
def test_a_file_that_changes_under_way_is_unreadable_not_wrong(tmp_path, change):
    path = tmp_path / "x.parquet"
    source = parquet.opened([write(path)])
    if change == "truncate":
        os.truncate(path, 100)
    elif change == "replace":
        write(path, text=["other"] * 7)
    else:
        path.unlink()
    assert reason(source, 0) == "unreadable row group"


def test_few_row_groups_are_decoded_and_kept_by_threads_and_copies(tmp_path):
    source = parquet.opened([write(tmp_path / "x.parquet", rows=60, group=10)])
    parquet._decoded.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = [each.caption for each in pool.map(source.__getitem__, range(60))]
    assert found == [f"caption {i}" for i in range(60)]
    info = parquet._decoded.cache_info()
    assert info.currsize == 4
    assert 6 <= info.misses < 20  # not one for every row
    assert list(pickle.loads(pickle.dumps(source))) == list(source)
