"""Which samples a user wants: bounds on sizes and on numbers that come with a picture.

Written "short_side >= 512", "aspect <= 2", or with any number of a sample's json, such as LAION's
"aesthetic >= 6", "pwatermark <= 0.8", "punsafe <= 0.5".
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.errors import BadSample, UserError

_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*")
# In pixels; and the long side over the short one.
_OF_SIZE = ("short_side", "aspect")
# The same number as other releases of LAION call it.
_OTHER_NAMES = {
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic_score"),
    "punsafe": ("p_unsafe",),
    "pwatermark": ("p_watermark",),
}


class Filter(NamedTuple):
    """least <= the field <= most; a sample without the field passes."""

    field: str
    least: float
    most: float


def parse(conditions: Sequence[str]) -> tuple[Filter, ...]:
    """UserError naming a condition that is not of that form."""
    return tuple(map(_parse, conditions))


def _parse(condition: str) -> Filter:
    match = _CONDITION.fullmatch(condition)
    try:
        field, relation, number = match.groups()
        bound = float(number)
    except (AttributeError, ValueError):
        bound = math.nan
    if math.isnan(bound):
        raise UserError(
            f"filter {condition!r} is not of the form FIELD >= NUMBER or FIELD <= NUMBER, such as "
            f"'short_side >= 512'; FIELD is {', '.join(_OF_SIZE)} or any number in the json"
        )
    return Filter(field, bound, math.inf) if relation == ">=" else Filter(field, -math.inf, bound)


def check_fields(wanted: Sequence[Filter], fields: Mapping[str, Any]) -> None:
    """BadSample, filtered, if one of the sample's own numbers is out of bounds."""
    for each in wanted:
        if each.field not in _OF_SIZE:
            for name in (each.field, *_OTHER_NAMES.get(each.field, ())):
                _check(each, fields.get(name))


def check_size(wanted: Sequence[Filter], width: int, height: int) -> None:
    """BadSample, filtered, if the picture's sides are out of bounds."""
    short, long = sorted((width, height))
    for each in wanted:
        if each.field in _OF_SIZE:
            _check(each, short if each.field == "short_side" else long / short)


def _check(wanted: Filter, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return
    if value < wanted.least:
        raise BadSample(f"{wanted.field} < {wanted.least:g}", filtered=True)
    if value > wanted.most:
        raise BadSample(f"{wanted.field} > {wanted.most:g}", filtered=True)
