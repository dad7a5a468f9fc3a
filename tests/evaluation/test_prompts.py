"""Which captions are chosen: the rule, spelt out once more, and files that do not fit."""

import hashlib
import json
import random

import numpy as np
import pytest

from slam_jax.data import shapes2d
from slam_jax.errors import UserError
from slam_jax.evaluation import prompts
from slam_jax.evaluation.protocol import Prompts

COCO = Prompts("coco", count=20, seed=7, file_sha256="", sha256="")


def _annotations(num_images=50):
    """Three captions an image, in any order, those of lowest id being "first of ..."."""
    annotations = [
        {"image_id": 10 * image, "id": 3 * image + n, "caption": f" {word} of {image}\n"}
        for image in range(num_images)
        for n, word in enumerate(("first", "second", "third"))
    ]
    random.Random(0).shuffle(annotations)
    return {"images": [{"id": 10 * image} for image in range(num_images)],
            "annotations": annotations}  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(_annotations()))
    return path


def test_coco_gives_the_lowest_caption_of_images_in_the_order_of_their_hashes(coco):
    by_hash = {hashlib.sha256(b"7 %d" % (10 * i)).hexdigest(): i for i in range(50)}
    expected = [f"first of {by_hash[key]}" for key in sorted(by_hash)][:20]
    chosen = prompts.choose(COCO, coco)
    assert chosen.captions == expected and chosen.labels is None
    assert chosen.sha256 == hashlib.sha256(json.dumps(expected).encode()).hexdigest()
    fewer = prompts.choose(COCO._replace(count=5), coco)
    assert fewer.captions == expected[:5]
    other = prompts.choose(COCO._replace(seed=8), coco)
    assert other.captions != expected and other.sha256 != chosen.sha256


def test_hashes_of_file_and_choice_are_checked(coco):
    file_sha256 = hashlib.sha256(coco.read_bytes()).hexdigest()
    chosen = prompts.choose(COCO._replace(file_sha256=file_sha256), coco)
    wanted = COCO._replace(sha256=chosen.sha256)
    assert prompts.choose(wanted, coco).captions == chosen.captions
    with pytest.raises(UserError, match=r"captions.json has sha256 .*wants 00; download it"):
        prompts.choose(COCO._replace(file_sha256="00"), coco)
    with pytest.raises(UserError, match="cannot be compared: take the original file"):
        prompts.choose(wanted._replace(seed=8), coco)


def _without(annotations, key):
    del annotations["annotations"][3][key]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda a: a["images"].append({"id": 77}), "1 of 51 images have no caption.* image 77"),
        (lambda a: _without(a, "caption"), "no captions file of COCO .*caption"),
        (lambda a: a["annotations"][0].update(caption=3), "no captions file of COCO"),
        (lambda a: a.pop("images"), "no captions file of COCO .*images"),
    ],
)
def test_annotations_that_lack_something_are_refused(spoil, said, tmp_path):
    annotations = _annotations()
    spoil(annotations)
    (tmp_path / "spoilt.json").write_text(json.dumps(annotations))
    with pytest.raises(UserError, match=said):
        prompts.choose(COCO, tmp_path / "spoilt.json")


def test_files_that_cannot_be_are_refused(coco, tmp_path):
    with pytest.raises(UserError, match="cannot read --captions /no/file: No such file"):
        prompts.choose(COCO, tmp_path.__class__("/no/file"))
    with pytest.raises(UserError, match="--captions must be given: COCO's annotations"):
        prompts.choose(COCO, None)
    with pytest.raises(UserError, match="holds 50 different entries, and the protocol draws 60"):
        prompts.choose(COCO._replace(count=60), coco)
    with pytest.raises(UserError, match="this protocol's captions are shapes2d's own"):
        prompts.choose(COCO._replace(source="shapes2d"), coco)
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match="latin: caption is not UTF-8"):
        prompts.choose(COCO._replace(source="lines"), tmp_path / "latin")


def test_lines_are_taken_once_each(tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\n\n a dog \na cat\r\na bird\n")
    lines = Prompts("lines", count=3, seed=0, file_sha256="", sha256="")
    found = prompts.choose(lines, tmp_path / "captions.txt").captions
    order = sorted(["a cat", "a dog", "a bird"], key=lambda line: hashlib.sha256(
        f"0 {line}".encode()).hexdigest())  # fmt: skip
    assert found == order


def test_shapes2d_knows_what_its_captions_show():
    wanted = Prompts("shapes2d", count=5, seed=2, file_sha256="", sha256="")
    chosen = prompts.choose(wanted, None)
    drawn = shapes2d.Shapes2D(32, 5, 2)
    assert chosen.captions == [drawn[number].caption for number in range(5)]
    expected = [shapes2d.parse(caption).labels() for caption in chosen.captions]
    np.testing.assert_array_equal(chosen.labels, expected)
