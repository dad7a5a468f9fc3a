"""What is written of a picture, as files have it: its caption and its json."""

import json
from typing import Any

from slam_jax.errors import BadSample

_NOT_UTF8 = "caption is not UTF-8"


def decoded(content: bytes) -> str:
    """The caption in a text file, without the white space around it. BadSample if not UTF-8."""
    try:
        # Some editors begin every file with a byte order mark.
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadSample(_NOT_UTF8) from None


def checked(caption: Any) -> str:
    """A caption out of json or a table. BadSample if it is no text."""
    if not isinstance(caption, str):
        raise BadSample("missing caption")
    check(caption)
    return caption.strip()


def check(caption: str) -> None:
    """BadSample for half a character, which json can hold and no tokenizer takes."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise BadSample(_NOT_UTF8) from None


def fields(content: bytes) -> dict[str, Any]:
    """The object in a json file. BadSample if there is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise BadSample("broken json") from None
    if not isinstance(found, dict):
        raise BadSample("broken json")
    return found


def printable(name: str) -> str:
    """A file's name, which need not be UTF-8, as text that any stream takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
