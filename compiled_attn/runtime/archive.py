"""Zip archives with nothing left open: given its members, the bytes of an archive are determined, and are checked.

The form: members stored (never compressed) one behind the other from offset 0, a central directory, an end record whose
comment carries a digest. Dates, versions, flags and attributes are constants; there are no extra fields, no padding, no
data descriptors and no zip64 (an archive stays below 4 GiB). So the reader rebuilds every header from the member's name
and payload and compares: a byte that is neither payload nor what the rules give is an error. torch's own readers accept
this form.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compiled_attn.ir.errors import ContractError

ROOT = "model/"
COMMENT = re.compile(rb"compiled_attn contract sha256:([0-9a-f]{64})\Z")
COMMENT_SIZE = 94
LIMIT = 0xFFFFFFFF
NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*\Z")
NAME_SIZE = 512

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_VERSION, _DATE = 20, 0x0021  # zip 2.0; 1980-01-01
_AGAIN = "export the model again, or fetch the file again"


@dataclass(frozen=True)
class Member:
    """One entry as the central directory states it. offset: where its local header begins."""

    name: str
    size: int
    crc: int
    offset: int

    @property
    def local(self) -> bytes:
        name = self.name.encode()
        fields = (_VERSION, 0, 0, 0, _DATE, self.crc, self.size, self.size, len(name), 0)
        return _LOCAL.pack(b"PK\x03\x04", *fields) + name

    @property
    def central(self) -> bytes:
        name = self.name.encode()
        fields = (_VERSION, _VERSION, 0, 0, 0, _DATE, self.crc, self.size, self.size, len(name))
        return _CENTRAL.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, 0, self.offset) + name

    @property
    def start(self) -> int:
        """Offset of the payload."""
        return self.offset + _LOCAL.size + len(self.name.encode())


def pack(members: Sequence[tuple[str, bytes | memoryview]], digest: str) -> Iterator[bytes | memoryview]:
    """The bytes of an archive, piece by piece. digest: sha256 in hex, for the comment. Raises ContractError."""
    records: list[Member] = []
    offset = 0
    for name, payload in members:
        _check_name(name)
        view = memoryview(payload)
        record = Member(name, view.nbytes, zlib.crc32(view), offset)
        records.append(record)
        offset = record.start + record.size
        if offset >= LIMIT:
            raise ContractError(
                "the artifact would be 4 GiB or larger",
                where=f"member {name}",
                facts=f"its end is at byte {offset}, the format ends at {LIMIT}",
                do="export in a lower precision, or split the model",
            )
        yield record.local
        yield view
    yield _tail(records, offset, digest)


def _tail(records: Sequence[Member], offset: int, digest: str) -> bytes:
    directory = b"".join(r.central for r in records)
    comment = b"compiled_attn contract sha256:" + digest.encode()
    count = len(records)
    return directory + _END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), offset, len(comment)) + comment


def unpack(data: memoryview, where: str) -> tuple[dict[str, memoryview], str]:
    """Members in order, and the digest in the comment, of an archive whose every byte has been accounted for.

    where: the file's name, for errors. Raises ContractError, naming what differs and at which byte.
    """
    digest = _digest(data, where)
    records = list(_directory(data, where))
    members: dict[str, memoryview] = {}
    offset = 0
    for record in records:
        if record.offset != offset:
            raise _stray(where, min(record.offset, offset))
        _compare(data, offset, record.local, where)
        offset = record.start + record.size
        members[record.name] = data[record.start : offset]
        if zlib.crc32(members[record.name]) != record.crc:
            raise ContractError(
                f"member {record.name} is damaged",
                where=where,
                facts="its bytes do not give the checksum in the archive",
                do=_AGAIN,
            )
    _compare(data, offset, _tail(records, offset, digest), where)
    return members, digest


def _digest(data: memoryview, where: str) -> str:
    found = COMMENT.match(bytes(data[-COMMENT_SIZE:]))
    end = len(data) - COMMENT_SIZE - _END.size
    if found and end >= 0 and bytes(data[end : end + 4]) == b"PK\x05\x06":
        return found.group(1).decode()
    if bytes(data[:4]) != b"PK\x03\x04":
        raise ContractError(
            "the file is no compiled_attn artifact",
            where=where,
            facts=f"an artifact begins with PK\\x03\\x04; this file has {len(data)} bytes and does not",
            do="give a file that compiled_attn.export wrote",
        )
    if len(data) >= _END.size and bytes(data[-_END.size : -_END.size + 4]) == b"PK\x05\x06":
        raise ContractError(
            "the package has no contract",
            where=where,
            facts="an artifact ends with its contract's digest; this archive ends without a comment",
            do="write the package with compiled_attn.export",
        )
    raise ContractError(
        "the artifact is cut short, or bytes follow its end",
        where=where,
        facts=f"an artifact ends with its contract's digest; the last of these {len(data)} bytes are something else",
        do=_AGAIN,
    )


def _directory(data: memoryview, where: str) -> Iterator[Member]:
    end = len(data) - COMMENT_SIZE - _END.size
    _, _, _, _, count, size, position, _ = _END.unpack(data[end : end + _END.size])
    if position + size != end:
        raise _stray(where, end)
    seen: set[str] = set()
    for _ in range(count):
        if position + _CENTRAL.size > end:
            raise _stray(where, position)
        fields = _CENTRAL.unpack(data[position : position + _CENTRAL.size])
        method, crc, stored, length, name_size, offset = fields[4], *fields[7:11], fields[16]
        raw = bytes(data[position + _CENTRAL.size : position + _CENTRAL.size + name_size])
        name = raw.decode("latin-1")
        _check_name(name, where)
        if method != 0:
            raise ContractError(
                f"member {name} is compressed",
                where=where,
                facts=f"an artifact's members are stored (method 0); this one has method {method}",
                do=_AGAIN,
            )
        if name in seen:
            raise ContractError(
                f"two members are named {name}",
                where=where,
                facts="readers differ in which of the two they take",
                do=_AGAIN,
            )
        seen.add(name)
        record = Member(name, length, crc, offset)
        if stored != length or record.start + length > end:
            raise _stray(where, position)
        position += _CENTRAL.size + name_size
        yield record


def _check_name(name: str, where: str = "") -> None:
    parts = name.split("/")
    if NAME.match(name) and len(name) <= NAME_SIZE and not {".", ".."} & set(parts) and name.startswith(ROOT):
        return
    raise ContractError(
        "a member has a name that is not allowed",
        where=where,
        facts=f"{name[:80]!a}; names begin with {ROOT} and are made of letters, digits, '.', '_', '-' and '/'",
        do=_AGAIN,
    )


def _compare(data: memoryview, offset: int, wanted: bytes, where: str) -> None:
    found = bytes(data[offset : offset + len(wanted)])
    if found == wanted:
        return
    differing = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
    raise _stray(where, offset + differing)


def _stray(where: str, offset: int) -> ContractError:
    return ContractError(
        "a byte outside the members is not what the members give",
        where=f"{where}, byte {offset}",
        facts="headers, directory and end record of an artifact follow from its members, and nothing lies between",
        do=_AGAIN,
    )
