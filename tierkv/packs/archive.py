"""The zip form of a pack: the names a pack may have, a deterministic writer, and a reader that believes nothing.

Stored members only, so that every block is a range of the one file. What must not live here: what the members mean, and
where the file lies.

    [local header, padding][data, from a multiple of 4,096 for shards] ... [central directory][ZIP64 end][end]
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from tierkv.errors import PackError

ROOT: Final = "zarr.json"
ALIGNMENT: Final = 4096
MAX_MEMBERS: Final = 100_000
MAX_DIRECTORY_BYTES: Final = 16 << 20
NAME_RULE: Final = "names are at most three segments of a-z 0-9 _ . with / between them"

_SHARDS: Final = "blocks/c."
_NAME: Final = re.compile(r"(?!\.{1,2}(?:/|\Z))[a-z0-9_.]{1,128}(?:/(?!\.{1,2}(?:/|\Z))[a-z0-9_.]{1,128}){0,2}")
_LIMIT_32: Final = 0xFFFF_FFFF
_LIMIT_16: Final = 0xFFFF
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_EXTRA: Final = struct.Struct("<2H")
_ZIP64: Final = 0x0001
_PADDING: Final = 0xD935  # the extra field of archives aligned for mapping: two bytes of alignment, then zeros
_DATE: Final = (1980 - 1980) << 9 | 1 << 5 | 1
_MODE: Final = 0o100644 << 16
_FLAGS_ALLOWED: Final = 0x0806  # names in UTF-8; hints of a compressor that was not used

Read = Callable[[int, int], bytes]
ReadMany = Callable[[Sequence[tuple[int, int]]], Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one member lie in the archive."""

    offset: int
    size: int
    crc: int


def is_plain(name: str) -> bool:
    """Whether a pack may have a file of this name."""
    return _NAME.fullmatch(name) is not None


def in_order(names: Iterable[str]) -> list[str]:
    """Return the order in which an archive has the files of a pack: sorted, and the root last."""
    return sorted(names, key=lambda name: (name == ROOT, name))


@contextlib.contextmanager
def replace(path: Path) -> Iterator[BinaryIO]:
    """Give `path` new content, whole or not at all: a temporary file beside it, sync, rename, sync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_zip(
    target: Path | BinaryIO, members: Iterable[tuple[str, int, Iterable[bytes | memoryview]]], *, limit: int = _LIMIT_32
) -> None:
    """Write (name, bytes of it, its pieces) in the order given: the same members are the same bytes, always.

    target: a path is replaced at once, when all is written; a file must be empty and able to seek. limit: sizes and offsets
    from which ZIP64 is used. Raises PackError for a name no pack may have, one given twice, or pieces of another size.
    """
    if isinstance(target, Path):
        with replace(target) as file:
            write_zip(file, members, limit=limit)
        return
    directory: list[bytes] = []
    seen: set[str] = set()
    at = 0
    for name, size, pieces in members:
        if not is_plain(name) or name in seen:
            raise PackError(
                f"{name!r} cannot be a file of a pack: {'it is there twice' if name in seen else NAME_RULE}"
            )
        seen.add(name)
        header = _local_header(name, size, at, crc=0, limit=limit)
        target.write(header)
        crc = written = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            written += memoryview(piece).nbytes
            target.write(piece)
        if written != size:
            raise PackError(f"{name} has {written} bytes where {size} were promised: it changed while it was read")
        target.seek(at)
        target.write(_local_header(name, size, at, crc=crc, limit=limit))
        directory.append(_central_header(name, size, at, crc=crc, limit=limit))
        at += len(header) + size
        target.seek(at)
    if len(directory) > MAX_MEMBERS:
        raise PackError(
            f"{len(directory)} files in one pack: at most {MAX_MEMBERS} can be; build with more blocks a shard"
        )
    target.write(b"".join(directory) + _ending(len(directory), sum(map(len, directory)), at, limit=limit))


def _local_header(name: str, size: int, at: int, *, crc: int, limit: int) -> bytes:
    big = size >= limit
    extra = _EXTRA.pack(_ZIP64, 16) + struct.pack("<2Q", size, size) if big else b""
    if name.startswith(_SHARDS):
        bare = at + _LOCAL.size + len(name) + len(extra) + _EXTRA.size + 2
        padding = -bare % ALIGNMENT
        extra += _EXTRA.pack(_PADDING, 2 + padding) + ALIGNMENT.to_bytes(2, "little") + bytes(padding)
    told = _LIMIT_32 if big else size
    return (
        _LOCAL.pack(b"PK\3\4", 45 if big else 20, 0, 0, 0, _DATE, crc, told, told, len(name), len(extra))
        + name.encode("ascii")
        + extra
    )


def _central_header(name: str, size: int, at: int, *, crc: int, limit: int) -> bytes:
    big, far = size >= limit, at >= limit
    wide = ([size, size] if big else []) + ([at] if far else [])
    extra = _EXTRA.pack(_ZIP64, 8 * len(wide)) + struct.pack(f"<{len(wide)}Q", *wide) if wide else b""
    told, place, version = _LIMIT_32 if big else size, _LIMIT_32 if far else at, 45 if wide else 20
    return (
        _CENTRAL.pack(
            b"PK\1\2", 3 << 8 | version, version, 0, 0, 0, _DATE, crc, told, told, len(name), len(extra), 0, 0, 0, _MODE, place
        )
        + name.encode("ascii")
        + extra
    )  # fmt: skip


def _ending(count: int, size: int, at: int, *, limit: int) -> bytes:
    wide = b""
    if count >= min(limit, _LIMIT_16) or at >= limit:
        wide = _END_64.pack(b"PK\6\6", _END_64.size - 12, 3 << 8 | 45, 45, 0, 0, count, count, size, at)
        wide += _LOCATOR.pack(b"PK\6\7", 0, at + size, 1)
        count, at = _LIMIT_16, _LIMIT_32
    return wide + _END.pack(b"PK\5\6", 0, 0, count, count, size, at, 0)


def read_directory(read_at: Read, size: int, *, read_many: ReadMany | None = None) -> Mapping[str, Member]:
    """Return where every member lies, in the order of the archive.

    read_at: (offset, length) -> so many bytes. size: bytes of the archive. read_many: several of these at once, where asking
    one by one is slow. Raises PackError for all that a pack in zip form has no use for: see the messages.
    """
    count, start, length, end = _find_directory(read_at, size)
    if count > MAX_MEMBERS:
        _refuse(f"it has {count} members; at most {MAX_MEMBERS} are read")
    if length > MAX_DIRECTORY_BYTES:
        _refuse(f"its directory has {length} bytes; at most {MAX_DIRECTORY_BYTES} are read")
    if start + length != end:
        _refuse("its directory does not end where the archive does")
    listed = _members(_exactly(read_at, start, length), count)
    asked = [(at, _LOCAL.size + len(name)) for name, (at, _, _) in listed.items()]
    if any(at + length > start for at, length in asked):
        _refuse("a member begins after the end of all members")
    headers = read_many(asked) if read_many else [read_at(*each) for each in asked]
    found: dict[str, Member] = {}
    spans: list[tuple[int, int, str]] = []
    for (name, (at, bytes_, crc)), header in zip(listed.items(), headers, strict=True):
        offset = at + _data_offset(name, header, crc)
        found[name] = Member(offset, bytes_, crc)
        spans.append((at, offset + bytes_, name))
    before = 0
    for begin, stop, name in sorted(spans):
        if begin < before or stop > start:
            _refuse(f"member {name} lies over another, or past the end")
        before = stop
    return found


def _refuse(what: str) -> NoReturn:
    raise PackError(f"not a pack in zip form: {what}")


def _exactly(read_at: Read, offset: int, length: int) -> bytes:
    data = read_at(offset, length) if length else b""
    if len(data) != length:
        _refuse(f"{len(data)} of {length} bytes came at {offset}: it is cut short")
    return data


def _find_directory(read_at: Read, size: int) -> tuple[int, int, int, int]:
    """Number of members, and of the directory: where it begins, its bytes, and where it has to end."""
    tail_at = max(0, size - _END.size - _LIMIT_16)
    tail = _exactly(read_at, tail_at, size - tail_at)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        _refuse("no end of a zip archive is in it: it is cut short, or something else")
    _, disk, first, here, count, length, start, comment = _END.unpack_from(tail, found)
    end = tail_at + found
    if end + _END.size + comment != size:
        _refuse("something follows its end")
    if (disk, first) not in ((0, 0), (_LIMIT_16, _LIMIT_16)) or here != count:
        _refuse("it is a part of several")
    before = _exactly(read_at, end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if before[:4] != b"PK\6\7":
        if _LIMIT_16 in (count, disk) or _LIMIT_32 in (length, start):
            _refuse("its ZIP64 end is missing")
        return count, start, length, end
    _, disk, wide_at, disks = _LOCATOR.unpack(before)
    wide = _exactly(read_at, wide_at, _END_64.size) if wide_at + _END_64.size == end - _LOCATOR.size else b""
    if wide[:4] != b"PK\6\6" or disk or disks != 1:
        _refuse("its ZIP64 end is not where it has to be, or it is a part of several")
    _, bytes_, _, _, disk, first, here, wide_count, wide_length, wide_start = _END_64.unpack(wide)
    told = zip(
        (count, length, start), (_LIMIT_16, _LIMIT_32, _LIMIT_32), (wide_count, wide_length, wide_start), strict=True
    )
    if bytes_ != _END_64.size - 12 or disk or first or here != wide_count or any(a not in (b, c) for a, b, c in told):
        _refuse("its two ends do not agree")
    return wide_count, wide_start, wide_length, wide_at


def _members(directory: bytes, count: int) -> dict[str, tuple[int, int, int]]:
    """Where the local header is, bytes and checksum of each member."""
    listed: dict[str, tuple[int, int, int]] = {}
    at = 0
    for _ in range(count):
        if len(directory) - at < _CENTRAL.size or directory[at : at + 4] != b"PK\1\2":
            _refuse("its directory has fewer members than it says")
        fields = _CENTRAL.unpack_from(directory, at)
        made, flags, method, crc, packed, size = (fields[n] for n in (1, 3, 4, 7, 8, 9))
        name_bytes, extra_bytes, comment_bytes, disk, mode, start = (fields[n] for n in (10, 11, 12, 13, 15, 16))
        begin = at + _CENTRAL.size
        raw = directory[begin : begin + name_bytes]
        extra = directory[begin + name_bytes : begin + name_bytes + extra_bytes]
        at = begin + name_bytes + extra_bytes + comment_bytes
        name = raw.decode("ascii", "backslashreplace")
        if len(raw) != name_bytes or len(extra) != extra_bytes or at > len(directory):
            _refuse("its directory is cut short")
        if not is_plain(name):
            _refuse(f"member {name[:200]!r}: {NAME_RULE}")
        if name in listed:
            _refuse(f"member {name} is there twice")
        if flags & ~_FLAGS_ALLOWED or method:
            _refuse(f"member {name} is compressed, encrypted or streamed; store it (zip -0 -D)")
        if made >> 8 == 3 and (mode >> 28) not in (0, 8):
            _refuse(f"member {name} is no regular file")
        size, packed, start, disk = _widened(name, extra, (size, packed, start, disk))
        if size != packed or disk:
            _refuse(f"member {name} has two sizes, or lies in another part")
        listed[name] = (start, size, crc)
    if at != len(directory):
        _refuse("its directory has more in it than its members")
    return listed


def _widened(name: str, extra: bytes, fields: tuple[int, int, int, int]) -> list[int]:
    """Sizes, place and disk, with those that did not fit taken from the ZIP64 field."""
    values = list(fields)
    missing = [n for n, limit in enumerate((_LIMIT_32, _LIMIT_32, _LIMIT_32, _LIMIT_16)) if values[n] == limit]
    at = 0
    while at < len(extra):
        kind, length = _EXTRA.unpack_from(extra, at) if len(extra) - at >= _EXTRA.size else (0, len(extra))
        at += _EXTRA.size
        if at + length > len(extra):
            _refuse(f"member {name} has an extra field that is cut short")
        if kind == _ZIP64:
            if length != sum(4 if n == 3 else 8 for n in missing):
                _refuse(f"member {name} has a ZIP64 field of another size than it needs")
            for n in missing:
                wide = 4 if n == 3 else 8
                values[n] = int.from_bytes(extra[at : at + wide], "little")
                at, length = at + wide, length - wide
            missing = []
        at += length
    if missing:
        _refuse(f"member {name} lacks its ZIP64 field")
    return values


def _data_offset(name: str, header: bytes, crc: int) -> int:
    """Bytes of the local header, which has to say what the directory says."""
    if len(header) != _LOCAL.size + len(name) or header[:4] != b"PK\3\4":
        _refuse(f"member {name} does not begin where the directory says")
    _, _, flags, method, _, _, local_crc, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    if flags & ~_FLAGS_ALLOWED or method or local_crc != crc or name_bytes != len(name):
        _refuse(f"member {name} is another one in its own header")
    if header[_LOCAL.size :] != name.encode("ascii"):
        _refuse(f"member {name} has another name in its own header")
    return _LOCAL.size + int(name_bytes) + int(extra_bytes)
