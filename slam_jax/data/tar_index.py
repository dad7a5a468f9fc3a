"""Where the samples of a tar lie: one pass over it writes NAME.tar.idx, rows of one width.

A sample is a run of members whose paths are the same up to the first dot of the last part
(WebDataset's rule): a picture, and .txt or .json or both. The index records the size and the
time of the tar and is good for that tar alone.
"""

import os
import struct
import tarfile
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from slam_jax.data import captions
from slam_jax.errors import UserError

_MAGIC = b"slamidx1"
_HEADER = struct.Struct("<8sQqI")  # _MAGIC, the tar's size and time, bytes of a key
# Offset and size of picture, text and json, the number of a reason; behind it lies the key.
_ROW = struct.Struct("<6QB")
_CHECKSUM = struct.Struct("<I")
_LONGEST_KEY = 255
_PICTURES = ("jpg", "jpeg", "png", "webp")
# Reasons why a sample is known to be bad before it is read; the first is "it is not".
_REASONS = (
    "", "truncated tar", "damaged tar", "duplicate key", "missing image", "missing caption",
)  # fmt: skip
# What the tarfile module raises on damaged headers.
_DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, MemoryError, RecursionError, EOFError)
_GZIP = b"\x1f\x8b"


class Span(NamedTuple):
    """Bytes [start, start + size) of the tar; start is 0 where there is no such member."""

    start: int
    size: int


class Row(NamedTuple):
    """A sample: where its parts lie, and "" or the reason why it is bad."""

    image: Span
    text: Span
    json: Span
    reason: str
    key: str


class Stamp(NamedTuple):
    """Tells one state of a tar from another."""

    size: int
    time: int  # ns, of its last change


class Shard(NamedTuple):
    """A tar with its index; any number of rows, all of one width."""

    tar: str
    index: str
    stamp: Stamp
    num_rows: int
    key_size: int


def stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns)


def find(tar: str, index: str) -> Shard | None:
    """The shard if its index is there, whole, and of the tar as it is; else None.

    OSError if there is no such tar.
    """
    now = stamp(os.stat(tar))
    try:
        descriptor = os.open(index, os.O_RDONLY)
    except OSError:
        return None
    try:
        key_size = check(descriptor, now)
        size = os.fstat(descriptor).st_size
    except OSError:
        return None
    finally:
        os.close(descriptor)
    num_rows, rest = divmod(size - _HEADER.size, _width(key_size))
    return None if rest else Shard(tar, index, now, num_rows, key_size)


def _width(key_size: int) -> int:
    return _ROW.size + key_size + _CHECKSUM.size


def check(descriptor: int, now: Stamp) -> int:
    """How many bytes a key takes in that index; OSError unless it is of the tar as it is."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        raise OSError("the index is cut short")
    magic, size, time, key_size = _HEADER.unpack(header)
    if (magic, size, time) != (_MAGIC, *now):
        raise OSError("the index is of another tar")
    return key_size


def read_row(descriptor: int, key_size: int, number: int) -> Row:
    """Row `number` of an open index; OSError if it has no such row, or a damaged one."""
    width = _width(key_size)
    content = os.pread(descriptor, width, _HEADER.size + number * width)
    content, checksum = content[: -_CHECKSUM.size], content[-_CHECKSUM.size :]
    if checksum != _CHECKSUM.pack(zlib.crc32(content)):
        raise OSError("the index is damaged")
    *numbers, reason = _ROW.unpack_from(content)
    image, text, fields = (Span(*numbers[i : i + 2]) for i in (0, 2, 4))
    key = content[_ROW.size :].rstrip(b"\0").decode("utf-8", "replace")
    return Row(image, text, fields, _REASONS[reason], key)


def write(tar: str, index: str) -> Shard:
    """Makes the index, which appears whole or not at all.

    UserError if the file is no tar, or the index cannot be written.
    """
    try:
        with open(tar, "rb") as file:
            now = stamp(os.fstat(file.fileno()))
            rows = _rows(_open(tar, file), now.size)
    except OSError as error:
        raise UserError(f"cannot read {tar}: {error.strerror}; remove it or mend it") from None
    keys = [row.key.encode()[:_LONGEST_KEY] for row in rows]
    key_size = max(map(len, keys), default=0)
    content = [_HEADER.pack(_MAGIC, *now, key_size)]
    for row, key in zip(rows, keys, strict=True):
        reason = _REASONS.index(row.reason)
        packed = _ROW.pack(*row.image, *row.text, *row.json, reason) + key.ljust(key_size, b"\0")
        content += packed, _CHECKSUM.pack(zlib.crc32(packed))
    _write_atomic(Path(index), b"".join(content))
    return Shard(tar, index, now, len(rows), key_size)


def _write_atomic(path: Path, content: bytes) -> None:
    # Other hosts may be writing the same index.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the index {path}: {error.strerror}; give data.index_dir, a folder for "
            "the indices of tars that lie where nothing can be written"
        ) from None


def _open(tar: str, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except _DAMAGE:
        file.seek(0)
        if file.read(2) == _GZIP:
            raise UserError(f"{tar} is compressed; decompress it with gunzip") from None
        raise UserError(f"{tar} is no tar file; remove it or fetch it again") from None


class _Member(NamedTuple):
    """A file in the tar that is part of a sample."""

    key: str
    suffix: str
    span: Span
    reason: str  # why it cannot be read


class _Group(NamedTuple):
    """The members of one sample, by suffix, and what is known to be wrong with it."""

    key: str
    spans: dict[str, Span]
    reason: str


def _rows(tar: tarfile.TarFile, size: int) -> list[Row]:
    """The samples of a tar of `size` bytes."""
    members = []
    end = _walk(tar, size, members)
    groups = list(_groups(members))
    if groups and end.reason and _lacks_some(groups):
        groups[-1] = groups[-1]._replace(reason=end.reason)
    elif end.key:
        groups.append(end)
    rows, seen = [], set()
    for group in groups:
        rows.append(_row(group, group.key in seen))
        seen.add(group.key)
    return rows


def _lacks_some(groups: list[_Group]) -> bool:
    """Whether the last sample lacks what it must have, or what the first one has."""
    first, last = groups[0], groups[-1]
    is_less = not first.spans.keys() <= last.spans.keys()
    return is_less or bool(_row(last, is_duplicate=False).reason)


def _walk(tar: tarfile.TarFile, size: int, members: list[_Member]) -> _Group:
    """Fills `members`; the result says what is wrong behind the last one, if anything is."""
    at, broken = -1, False
    try:
        while (member := tar.next()) is not None:
            # A damaged header can point backwards, for ever.
            if member.size < 0 or tar.offset <= at:
                raise tarfile.ReadError
            at = tar.offset
            tar.members.clear()
            named = _named(member)
            is_cut = member.offset_data + member.size > size
            if named is not None:
                span = Span(0, 0) if is_cut else Span(member.offset_data, member.size)
                members.append(_Member(*named, span, "truncated tar" if is_cut else ""))
            if is_cut:
                return _Group("", {}, "truncated tar")
    except _DAMAGE:
        broken = True
    return _end(tar.fileobj, max(0, min(tar.offset, size)), size, broken)


def _end(file: BinaryIO, at: int, size: int, broken: bool) -> _Group:
    """A whole tar has a block of zeros where its last member ends."""
    truncated = file.tell() >= size
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    truncated |= len(block) < tarfile.BLOCKSIZE
    whole = not broken and not any(block) and len(block) == tarfile.BLOCKSIZE
    reason = "" if whole else "truncated tar" if truncated else "damaged tar"
    # A part of a member whose name is not known.
    return _Group(f"byte {at}" if any(block) else "", {}, reason)


def _groups(members: list[_Member]) -> Iterator[_Group]:
    """Neighbours of the same key; a suffix that comes again begins another sample."""
    group = None
    for member in members:
        if group and (member.key != group.key or member.suffix in group.spans):
            yield group
            group = None
        group = group or _Group(member.key, {}, "")
        group.spans[member.suffix] = member.span
        group = group._replace(reason=member.reason)
    if group:
        yield group


def _row(group: _Group, is_duplicate: bool) -> Row:
    absent = Span(0, 0)
    image = next((span for suffix, span in group.spans.items() if suffix in _PICTURES), absent)
    text, fields = (group.spans.get(suffix, absent) for suffix in ("txt", "json"))
    reason = group.reason
    if not reason and is_duplicate:
        reason = "duplicate key"
    elif not reason and image == absent:
        reason = "missing image"
    elif not reason and text == fields == absent:
        reason = "missing caption"
    return Row(image, text, fields, reason, captions.printable(group.key))


def _named(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and suffix; None for what is no part of a sample."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    suffix = suffix.lower()
    known = suffix in (*_PICTURES, "txt", "json") and stem
    # Links hold no bytes, and those of sparse files do not lie in one piece.
    if not known or not member.isreg() or member.issparse():
        return None
    return folder + slash + stem, suffix
