"""What is wrong with an override such as --config.distil.w=3, in the config's own words.

ml_collections, which parses them, says it in Python's.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from flax import traverse_util
from ml_collections.config_flags import config_flags

# By the type of the value in the config file: what another may be.
_KINDS = {
    bool: (flags.BooleanParser(), "true or false"),
    int: (flags.IntegerParser(), "a whole number"),
    float: (flags.FloatParser(), "a number"),
}


def complaint(argv: Sequence[str], defined: flags.FlagValues) -> str | None:
    """One line about the first wrong override in argv, with the remedy; None if all are right.

    defined: the flags, among them those that take config files. Whatever reading such a file
    raises is raised.
    """
    for name in defined:
        if config_flags.is_config_flag(defined[name]) and (path := _file(argv, name)):
            read = defined[name].parser.parse(path)
            leaves = traverse_util.flatten_dict(read.to_dict(), sep=".")
            for argument, key, value in _overrides(argv, name):
                if wrong := _wrong(name, key, value, leaves):
                    return f"{argument} {wrong}"
    return None


def _file(argv: Sequence[str], name: str) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        option, equals, value = argument.partition("=")
        if option in (f"--{name}", f"-{name}"):
            return value if equals else following
    return None


def _overrides(argv: Sequence[str], name: str) -> Iterator[tuple[str, str, str | None]]:
    """(argument, key, value) of each; no value for --config.a and --noconfig.a."""
    pattern = re.compile(rf"--?(?:no)?{name}\.([^=]*)(?:=(.*))?", re.DOTALL)
    for argument in argv:
        if found := pattern.fullmatch(argument):
            yield argument, found[1], found[2]


def _wrong(name: str, key: str, value: str | None, leaves: Mapping[str, Any]) -> str | None:
    if key not in leaves:
        if inside := [leaf for leaf in leaves if leaf.startswith(f"{key}.")]:
            return f"is a group; set what is in it, such as {_option(name, inside[0], leaves)}"
        near = _nearest(key, leaves)
        groups = dict.fromkeys(leaf.partition(".")[0] for leaf in leaves)
        known = f"did you mean --{name}.{near}?" if near else f"there are {', '.join(groups)}"
        return f"is not in the config; {known}"
    parser, words = _KINDS.get(type(leaves[key]), (None, ""))
    if parser is None or value is None:
        return None
    try:
        parser.parse(value)
    except (ValueError, TypeError):
        return f"must be {words}, such as {_option(name, key, leaves)}"
    return None


def _option(name: str, key: str, leaves: Mapping[str, Any]) -> str:
    """As the user would write what the config has."""
    value = leaves[key]
    return f"--{name}.{key}={str(value).lower() if isinstance(value, bool) else value}"


def _nearest(key: str, leaves: Mapping[str, Any]) -> str | None:
    """What has that name in another group, or is spelt alike."""
    last = key.rpartition(".")[2]
    same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    found = difflib.get_close_matches(key, same or leaves, 1, 0.0 if same else 0.6)
    return found[0] if found else None
