"""Which samples a user wants: bounds on sizes and on numbers that come with a picture.

Written "short_side >= 512", "aspect <= 2", or with any number of a sample's json, such as LAION's
"aesthetic >= 6", "pwatermark <= 0.8", "punsafe <= 0.5".
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.errors import BadSample, UserError

_CONDITION = re.compile(r"\s*([^\s<>=]+)\s*(<=|>=)\s*(\S+)\s*")
# In pixels; and the long side over the short one.
_OF_SIZE = ("short_side", "aspect")
# What releases of LAION call the same number.
_SYNONYMS = (
    ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score"),
    ("pwatermark", "p_watermark"),
    ("punsafe", "p_unsafe"),
)


class Filter(NamedTuple):
    """least <= the field <= most; a sample without that number passes."""

    field: str
    least: float
    most: float


def parse(conditions: Sequence[str]) -> tuple[Filter, ...]:
    """UserError naming a condition that is not of that form."""
    return tuple(map(_parse, conditions))


def _parse(condition: str) -> Filter:
    match = _CONDITION.fullmatch(condition)
    bound = _number(match.group(3)) if match else math.nan
    if not math.isfinite(bound):
        raise UserError(
            f"filter {condition!r} is not of the form FIELD >= NUMBER or FIELD <= NUMBER, such as "
            f"'short_side >= 512'; FIELD is {', '.join(_OF_SIZE)} or any number in the json"
        )
    field, relation, _ = match.groups()
    return Filter(field, bound, math.inf) if relation == ">=" else Filter(field, -math.inf, bound)


def check_fields(wanted: Sequence[Filter], fields: Mapping[str, Any]) -> None:
    """BadSample, filtered, if one of the sample's own numbers is out of bounds."""
    for each in wanted:
        if each.field not in _OF_SIZE:
            for name in _names(each.field):
                _check(each, _number(fields.get(name)))


def check_size(wanted: Sequence[Filter], width: int, height: int) -> None:
    """BadSample, filtered, if the picture's sides are out of bounds."""
    short, long = sorted((width, height))
    for each in wanted:
        if each.field in _OF_SIZE:
            _check(each, short if each.field == "short_side" else long / short)


def _names(field: str) -> tuple[str, ...]:
    return next((names for names in _SYNONYMS if field in names), (field,))


def _number(value: Any) -> float:
    """The number that json or a table holds, also as text; nan if it is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _check(wanted: Filter, value: float | int) -> None:
    """Of nan nothing is known, and it passes."""
    if value < wanted.least:
        raise BadSample(f"{wanted.field} < {wanted.least:g}", filtered=True)
    if value > wanted.most:
        raise BadSample(f"{wanted.field} > {wanted.most:g}", filtered=True)
