"""Summaries and the report made of them, from data whose numbers are known."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import manifest, report, summary, watch
from slam_jax.data.summary import Note
from slam_jax.data.tally import Dropped
from slam_jax.data.variants import Picture
from slam_jax.errors import UserError

NOTES = [Note(512, 512, 5, False), Note(300, 600, 77, True), Note(2048, 3000, 5, False)]
DROPPED = [
    Dropped("damaged picture", "a.tar", "1", False),
    Dropped("short_side < 64", "a.tar", "2", True),
    Dropped("damaged picture", "b.tar", "<b>&", False),
    Dropped("damaged picture", "a.tar", "3", False),
]
RED = np.zeros((128, 128, 3), np.uint8) + np.array([255, 0, 0], np.uint8)


def _summaries():
    first = summary.of(NOTES, DROPPED[:2], [summary.thumbnail(RED)])
    second = summary.of(NOTES[:1], DROPPED[2:], [summary.thumbnail(RED), "second"])
    return first, second


def test_a_summary_counts():
    first, _ = _summaries()
    assert (first.kept, first.cut) == (3, 1)
    assert first.dropped == [
        ("damaged picture", "a.tar", False, 1), ("short_side < 64", "a.tar", True, 1)
    ]  # fmt: skip
    found = {label: count for label, count in first.short_side.items() if count}
    assert found == {"512-640": 1, "256-384": 1, ">= 2048": 1}
    found = {label: count for label, count in first.aspect.items() if count}
    assert found == {"< 1.05": 1, "2-2.5": 1, "1.4-1.6": 1}
    assert first.tokens == {"5": 2, "77": 1}


def test_totals_are_sums():
    total = summary.total(_summaries()[::-1], most_thumbnails=2)
    assert (total.kept, total.cut) == (4, 1)
    assert summary.reasons(total, filtered=False) == {"damaged picture": 3}
    assert summary.reasons(total, filtered=True) == {"short_side < 64": 1}
    assert total.short_side["512-640"] == 2 and sum(total.short_side.values()) == 4
    assert list(total.short_side) == list(_summaries()[0].short_side)
    assert total.tokens == {"5": 3, "77": 1}
    # The first of each, before the second of any.
    assert total.thumbnails == [summary.thumbnail(RED)] * 2


def test_thumbnails_are_small_pictures():
    picture = Image.open(io.BytesIO(base64.b64decode(summary.thumbnail(RED))))
    assert picture.size == (64, 64) and picture.format == "JPEG"
    np.testing.assert_allclose(np.asarray(picture)[32, 32], [255, 0, 0], atol=4)


def test_a_summary_lies_beside_its_shard(tmp_path):
    path = tmp_path / "shard-00000-of-00001.array_record"
    shard = manifest.Shard(path.name, 3, 5, "cc")
    first, _ = _summaries()
    assert summary.read(path) is None
    summary.path_of(path).write_bytes(summary.dump(first, shard))
    assert summary.read(path) is None
    path.write_bytes(b"12345")
    read, its_shard = summary.read(path)
    assert its_shard == shard
    assert summary.dump(read, shard) == summary.dump(first, shard)
    path.write_bytes(b"1234")
    assert summary.read(path) is None
    path.write_bytes(b"12345")
    summary.path_of(path).write_bytes(summary.dump(first, shard)[:50])
    assert summary.read(path) is None


def _report():
    plan = manifest.Plan(
        "photos/<x>", 8, "aa", ("bb",), 32, (4, 4, 4), "float32", "float32", 2, True, False, (), 0,
        4, 8,
    )  # fmt: skip
    shards = (manifest.Shard("a", 6, 100, ""), manifest.Shard("b", 2, 50, ""))
    total = summary.total(_summaries(), 10)
    numbers = report.numbers(manifest.Manifest(plan, shards, 4, {}, {}), total)
    return numbers, total


def test_the_json_holds_the_numbers():
    numbers, _ = _report()
    read = json.loads(report.as_json(numbers))
    assert read == numbers
    wanted = {
        "source": "photos/<x>", "samples": 8, "kept": 4, "records": 8, "bytes": 150,
        "filtered": {"short_side < 64": 1}, "bad": {"damaged picture": 3}, "captions_cut": 1,
        "tokens": {"5": 3, "77": 1},
    }  # fmt: skip
    assert {key: read[key] for key in wanted} == wanted
    assert ["damaged picture", "b.tar", "<b>&"] in read["examples_of_dropped"]


class _Page(html.parser.HTMLParser):
    """Checks that tags are closed in turn; collects text and images."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.images, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if value.startswith("data:image/jpeg;base64,") else self.links).append(
                    value
                )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())


def test_the_page_is_whole_and_needs_nothing_else():
    numbers, total = _report()
    page = _Page()
    page.feed(report.as_html(numbers, total).decode())
    page.close()
    assert not page.open and not page.links
    assert len(page.images) == len(total.thumbnails) == 3
    for text in ("photos/<x> at 32 pixels", "damaged picture", "<b>&", "512-640", "77"):
        assert text in page.texts, text
    row = page.texts.index("damaged picture")
    assert "3" in page.texts[row : row + 3]


def _picture(shard):
    ids = np.zeros(77, np.int32)
    return Picture(
        RED[None], np.zeros((1, 6), np.int32), {"input_ids": ids}, 2, False, "", shard, ""
    )


def _bad(number):
    return Dropped(
        "damaged picture" if number % 3 else "no caption", f"{number % 7}.tar", "", False
    )


def test_too_many_bad_samples_stop_as_soon_as_they_are_certain():
    watching = watch.start(0.01, [])
    results = [_bad(i) if i % 40 == 0 else _picture("a.tar") for i in range(5000)]
    passed = []
    with pytest.raises(UserError, match=r"20 of 761 samples .*max_bad_fraction 0.01"):
        passed.extend(watch.watched(results, watching))
    assert len(passed) == 760


def test_the_worst_shards_are_named_with_their_reasons():
    watching = watch.start(0.55, [])
    results = [Dropped("damaged picture", f"{i % 7}.tar", "", False) for i in range(400)]
    results += [Dropped("no caption", "bad.tar", "", False)] * 200
    list(watch.watched(results, watching))
    with pytest.raises(
        UserError, match=r"600 of 600 .*worst shards are bad.tar \(200 no caption\); "
    ):
        watch.finish(watching)


def test_few_bad_samples_pass():
    watching = watch.start(0.01, [])
    results = [_bad(i) if i % 100 == 50 else _picture("a.tar") for i in range(3000)]
    assert len(list(watch.watched(results, watching))) == 3000
    watch.finish(watching)


def test_what_the_filters_leave_out_is_not_bad():
    watching = watch.start(0.0, [])
    filtered = Dropped("aspect > 2", "a.tar", "", True)
    nearly = [filtered] * 9999
    assert len(list(watch.watched([*nearly, _picture("a.tar"), *nearly], watching))) == 19_999
    watch.finish(watching)
    with pytest.raises(UserError, match=r"the last 10,000 samples .*29,998 aspect > 2.*--filter"):
        list(watch.watched([filtered] * 10_000, watching))


def test_earlier_runs_count():
    watching = watch.start(0.3, [summary.of(NOTES, DROPPED, [])])
    with pytest.raises(UserError, match="3 of 6 samples"):
        watch.finish(watching)
    watch.finish(watch.start(0.5, [summary.of(NOTES, DROPPED, [])]))
    with pytest.raises(UserError, match="all samples were left out"):
        watch.finish(watch.start(0.5, [summary.of([], DROPPED[1:2], [])]))


def test_a_picture_may_turn_out_bad():
    watching = watch.start(0.5, [])
    list(watch.watched([_picture("a.tar")] * 2, watching))
    watch.reject(watching, Dropped("latent not finite", "a.tar", "x", False))
    watch.finish(watching)
    watch.reject(watching, Dropped("latent not finite", "a.tar", "y", False))
    with pytest.raises(UserError, match="2 of 2 samples"):
        watch.finish(watching)
