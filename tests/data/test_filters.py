"""Which samples the user's filters let through."""

import math

import numpy as np
import pytest

from slam_jax.data import filters
from slam_jax.errors import BadSample, UserError


def _dropped(condition, fields=None, size=(600, 600)):
    """Why the sample is left out, None if it is not."""
    wanted = filters.parse([condition])
    try:
        filters.check_fields(wanted, fields or {})
        filters.check_size(wanted, *size)
    except BadSample as bad:
        assert bad.filtered
        return bad.reason
    return None


def test_parses_conditions_as_people_write_them():
    assert filters.parse([]) == ()
    conditions = ("short_side >= 512", "aspect<=2.5", "  clip-score  >=  -1e-3 ")
    assert filters.parse(conditions) == (
        ("short_side", 512, math.inf), ("aspect", -math.inf, 2.5), ("clip-score", -1e-3, math.inf),
    )  # fmt: skip


@pytest.mark.parametrize(
    "condition",
    [
        "", "short_side", "short_side 512", "short_side > 512", "short_side == 512", "aspect =< 2",
        "aspect <= two", "aspect <=", "<= 2", "512 <= short_side", "aspect <= nan", "aspect <= inf",
        "1 <= aspect <= 2", "short side >= 2", "aspect <= 2, punsafe <= 1",
    ],
)  # fmt: skip
def test_names_a_condition_of_another_form(condition):
    with pytest.raises(UserError) as caught:
        filters.parse(["aspect <= 2", condition])
    assert f"filter {condition!r} is not of the form" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "size, short_side, aspect",
    [((600, 300), 300, 2), ((300, 600), 300, 2), ((7, 7), 7, 1), ((1, 1000), 1, 1000)],
)
def test_sides_are_the_same_lying_or_standing(size, short_side, aspect):
    assert _dropped(f"short_side >= {short_side}", size=size) is None
    assert _dropped(f"short_side <= {short_side}", size=size) is None
    assert _dropped(f"aspect <= {aspect}", size=size) is None
    assert _dropped(f"aspect >= {aspect}", size=size) is None
    assert (
        _dropped(f"short_side >= {short_side + 1}", size=size) == f"short_side < {short_side + 1}"
    )
    assert _dropped(f"aspect <= {aspect - 0.1}", size=size) == f"aspect > {aspect - 0.1:g}"


def test_a_field_of_the_json_is_not_a_size():
    """img2dataset's json may hold any name."""
    assert _dropped("short_side >= 512", {"short_side": 1}) is None


@pytest.mark.parametrize(
    "wanted, unwanted, names",
    [
        ("aesthetic >= 6", 5.9, ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score")),
        ("AESTHETIC_SCORE >= 6", 5.9, ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score")),
        ("pwatermark <= 0.8", 0.81, ("pwatermark", "p_watermark")),
        ("punsafe <= 0.5", 1, ("punsafe", "p_unsafe")),
        ("similarity >= 0.3", 0, ("similarity",)),
    ],
)
def test_knows_laions_names(wanted, unwanted, names):
    (bound,) = {float(wanted.split()[2])}
    for name in names:
        assert _dropped(wanted, {name: unwanted}) == wanted.replace(">=", "<").replace("<=", ">")
        assert _dropped(wanted, {name: bound}) is None
    assert _dropped(wanted, {"other": unwanted}) is None


@pytest.mark.parametrize("number", ["0.9", " 9e-1 ", np.float32(0.9), np.int64(1), "inf", 10**300])
def test_numbers_may_be_text_or_a_tables(number):
    assert _dropped("punsafe <= 0.5", {"punsafe": number}) == "punsafe > 0.5"


@pytest.mark.parametrize(
    "value", [None, "", "UNLIKELY", math.nan, "nan", True, [1], {"a": 1}, 10**999]
)
def test_what_is_no_number_passes(value):
    assert _dropped("punsafe <= 0.5", {"punsafe": value}) is None


def test_the_first_bound_that_fails_is_counted():
    wanted = filters.parse(["aesthetic >= 6", "punsafe <= 0.5"])
    with pytest.raises(BadSample, match="aesthetic < 6"):
        filters.check_fields(wanted, {"punsafe": 1, "aesthetic": 1})
    with pytest.raises(BadSample, match="punsafe > 0.5"):
        filters.check_fields(wanted, {"punsafe": 1, "aesthetic": 7})
