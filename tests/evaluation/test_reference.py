"""Statistics of real pictures: numpy's own, and what must not be taken for them."""

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import shapes2d
from slam_jax.errors import UserError
from slam_jax.evaluation import pixels, protocol, reference, store
from slam_jax.evaluation.protocol import Images
from slam_jax.metrics import fid

IMAGES = Images(size=24, resize=12, filter="lanczos")
WANTED = protocol.Reference("pictures", count=0, seed=0, crop="middle", sha256="", file="")


@pytest.fixture(scope="module")
def protocol_of_pictures():
    return protocol.Protocol(
        seed=0, metrics=("fid", "kid"), kid_subset=2, bootstrap=0,
        prompts=None, images=IMAGES, features=None, clip=None, reference=WANTED, comparison=None,
    )  # fmt: skip


def _features_of(batch):
    """Mean colour and the colour of a corner."""
    return {"pool": np.concatenate([batch.mean((1, 2)), batch[:, 0, 0]], 1).astype(np.float32)}


@pytest.fixture
def folder(tmp_path):
    """Pictures of several shapes, in folders."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(24, 24), (30, 24), (24, 40), (50, 60), (13, 12)]):
        where = tmp_path / "pictures" / str(number % 2)
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
            where / f"{number}.png"
        )
    (tmp_path / "pictures" / "notes.txt").touch()
    return tmp_path / "pictures"


def _expected(folder):
    """Each picture's middle square by Pillow's resize, by hand."""
    squares = []
    for path in sorted(folder.rglob("*.png")):
        picture = Image.open(path)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        squares.append(np.asarray(square.resize((12, 12), Image.Resampling.LANCZOS)))
    return _features_of(np.stack(squares))["pool"].astype(np.float64)


def _obtain(folder, out, chosen, network="net"):
    found = reference.find(chosen.reference, IMAGES, folder, out)
    return reference.obtain(found, chosen, network, _features_of, 2, out)


def test_statistics_are_those_of_the_middle_squares(folder, tmp_path, protocol_of_pictures):
    real = _obtain(folder, tmp_path, protocol_of_pictures)
    expected = _expected(folder)
    np.testing.assert_allclose(real.features, expected, rtol=1e-6)
    np.testing.assert_allclose(real.gaussian.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(real.gaussian.covariance, np.cov(expected.T), rtol=1e-5)


def test_the_file_is_as_good_as_the_folder(folder, tmp_path, protocol_of_pictures, monkeypatch):
    real = _obtain(folder, tmp_path, protocol_of_pictures)
    monkeypatch.setattr(store, "fill", None)  # nothing is measured again
    for given in (tmp_path / reference.STATISTICS, None):
        again = _obtain(given, tmp_path, protocol_of_pictures)
        assert again.identity == real.identity
        np.testing.assert_array_equal(again.gaussian.covariance, real.gaussian.covariance)


def test_identity_is_of_what_the_files_hold_not_of_their_names(
    folder, tmp_path, protocol_of_pictures
):
    before = _obtain(folder, tmp_path, protocol_of_pictures).identity
    (folder / "0" / "0.png").rename(folder / "1" / "z.png")
    assert _obtain(folder, tmp_path, protocol_of_pictures).identity == before
    (folder / "1" / "z.png").unlink()
    assert _obtain(folder, tmp_path, protocol_of_pictures).identity != before


def test_statistics_of_another_protocol_are_refused(folder, tmp_path, protocol_of_pictures):
    real = _obtain(folder, tmp_path, protocol_of_pictures)
    path = tmp_path / reference.STATISTICS
    sha256 = real.identity.split()[-1]
    same = WANTED._replace(count=5, sha256=sha256)
    assert reference.read(path, "net", same, IMAGES, True).identity == real.identity
    for network, wanted, images, said in (
        ("other", WANTED, IMAGES, "network is net there and other in this one"),
        ("net", WANTED._replace(crop="none"), IMAGES, "crop is middle there and none"),
        ("net", WANTED._replace(count=6), IMAGES, "count is 5 there and 6"),
        ("net", WANTED._replace(sha256="00"), IMAGES, "pictures is .* there and 00"),
        ("net", WANTED, IMAGES._replace(resize=13), "resize is 12 there and 13"),
        ("net", WANTED, IMAGES._replace(filter="bicubic"), "filter is lanczos there and bicubic"),
    ):
        with pytest.raises(UserError, match=f"another protocol: {said}"):
            reference.read(path, network, wanted, images, True)


def test_statistics_without_features_do_for_the_frechet_distance_alone(
    folder, tmp_path, protocol_of_pictures
):
    only_fid = protocol_of_pictures._replace(metrics=("fid",))
    real = _obtain(folder, tmp_path, only_fid)
    assert len(real.features) == 0 and len(real.gaussian.mean) == 6
    with pytest.raises(UserError, match="has no features, which this protocol's metrics need"):
        _obtain(tmp_path / reference.STATISTICS, tmp_path, protocol_of_pictures)


def test_what_is_no_reference_is_refused(folder, tmp_path, protocol_of_pictures):
    with pytest.raises(UserError, match="no reference statistics .*reference.npz; give a folder"):
        _obtain(None, tmp_path, protocol_of_pictures)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name, content in (("other.npz", None), ("cut.npz", b"PK\x03\x04"), ("text.npz", b"a")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} holds no statistics of this program"):
            _obtain(tmp_path / name, tmp_path, protocol_of_pictures)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no pictures"):
        _obtain(tmp_path / "empty", tmp_path, protocol_of_pictures)
    more = protocol_of_pictures._replace(reference=WANTED._replace(count=40_504))
    with pytest.raises(UserError, match="holds 5 pictures, and the protocol's .* are 40,504"):
        _obtain(folder, tmp_path, more)


def test_mixed_sizes_and_damaged_pictures_are_named(folder, tmp_path, protocol_of_pictures):
    whole = protocol_of_pictures._replace(reference=WANTED._replace(crop="none"))
    with pytest.raises(UserError, match=r"cannot use .*2.png \(40 x 24 pixels.*asks for 24 x 24"):
        _obtain(folder, tmp_path, whole)
    path = folder / "0" / "4.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"cannot use .*4\.png \(.*damaged.*\); mend it"):
        _obtain(folder, tmp_path, protocol_of_pictures)


def test_drawings_are_measured_as_pictures_are(protocol_of_pictures):
    wanted = protocol.Reference("shapes2d", 5, 3, "none", "", "")
    images = Images(32, 16, "bicubic")
    real = reference.draw_shapes2d(wanted, images, _features_of, 2)
    source = shapes2d.Shapes2D(32, 5, 3)
    drawn = pixels.resized(np.stack([source[number].image for number in range(5)]), images)
    np.testing.assert_array_equal(real.features, _features_of(drawn)["pool"])
    assert fid.frechet_distance(fid.fit(real.features), real.gaussian) < 1e-6
    assert real.identity == "shapes2d, size 32, seed 3, 5 images"
