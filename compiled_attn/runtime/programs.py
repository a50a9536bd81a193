"""A decoder in one file: its programs, each an artifact with its contract, and one copy of the weights they share.

    model/programs.json         {"limit": null, "programs": [...], "programs_version": 1, "weights": [...]}
    model/prompt.pt2, step.pt2  artifacts whose code asks for its weights by name (runtime/weights.py)
    model/weights/0, 1, ...     bytes of one storage each

A program's record says which of the weights each name is; equal bytes are there once. The form is that of
runtime/archive.py, the digest in its comment that of the index. limit: longest text, null where there is no end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import archive
from compiled_attn.runtime.artifact import Artifact, write_file
from compiled_attn.runtime.contract import HEX, canonical

INDEX = archive.ROOT + "programs.json"
NAMES = ("prompt", "step")
VERSION = 1
AGAIN = "export the decoder again, or fetch the file again"


@dataclass(frozen=True)
class Program:
    """One of the programs. weights: name -> position among the stored ones."""

    member: str
    data: memoryview
    weights: Mapping[str, int]


@dataclass(frozen=True)
class Programs:
    """All that a file holds. programs: by name; weights: stored bytes."""

    programs: Mapping[str, Program]
    weights: Sequence[memoryview]
    limit: int | None


@dataclass(frozen=True)
class DecoderFile:
    """A file that `export` wrote of a decoder. programs: the artifacts in it; weights: bytes of their one copy."""

    path: Path
    sha256: str
    size: int
    programs: Mapping[str, Artifact]
    weights: int
    limit: int | None

    def __str__(self) -> str:
        lines = [f"{self.path}  {self.size / 1e6:.1f} MB  sha256 {self.sha256}"]
        lines += [f"program  {name:<8} {program.size / 1e6:>8.1f} MB" for name, program in self.programs.items()]
        return "\n".join([*lines, f"weights           {self.weights / 1e6:>8.1f} MB, once"])


def write_programs(
    path: str | Path,
    programs: Mapping[str, Artifact],
    weights: Mapping[str, Mapping[str, bytes]],
    limit: int | None,
) -> DecoderFile:
    """One file of a decoder's programs. weights: program -> name -> bytes of the storage. Raises ContractError."""
    stored: dict[str, tuple[int, bytes]] = {}
    records: list[dict[str, Any]] = []
    payloads: list[tuple[str, bytes]] = []
    for name, program in programs.items():
        at = {}
        for weight, payload in weights[name].items():
            digest = hashlib.sha256(payload).hexdigest()
            at[weight] = stored.setdefault(digest, (len(stored), payload))[0]
        payloads.append((f"{archive.ROOT}{name}.pt2", program.path.read_bytes()))
        records.append({**_record(*payloads[-1]), "name": name, "weights": at})
    kept = [(f"{archive.ROOT}weights/{i}", payload) for i, payload in stored.values()]
    index = {
        "limit": limit,
        "programs": records,
        "programs_version": VERSION,
        "weights": [_record(*weight) for weight in kept],
    }
    text = canonical(index)
    pieces = archive.pack([(INDEX, text), *payloads, *kept], hashlib.sha256(text).hexdigest())
    size, digest = write_file(Path(path), pieces)
    return DecoderFile(Path(path), digest, size, dict(programs), sum(len(payload) for _, payload in kept), limit)


def _record(member: str, payload: bytes) -> dict[str, Any]:
    return {"member": member, "size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def require_decoder(members: Mapping[str, memoryview], where: str) -> None:
    """Raises ContractError where the file holds no decoder."""
    if INDEX not in members:
        raise ContractError(
            "the file holds no decoder",
            where=where,
            facts=f"there is no member {INDEX}",
            do="load it with compiled_attn.load, or export a decoder: compiled_attn.export(decoder, path=...)",
        )


def programs_of(members: Mapping[str, memoryview], digest: str, where: str) -> Programs:
    """The programs and weights of a file's members, checked against its index. Raises ContractError."""
    text = bytes(members[INDEX])
    if hashlib.sha256(text).hexdigest() != digest:
        raise _bad(where, "the index of programs does not match the digest in the archive", "its SHA-256 is another")
    index = _index(text, where)
    named = [record["member"] for record in (*index["programs"], *index["weights"])]
    if [INDEX, *named] != list(members):
        raise _bad(where, "the members are not those that the index of programs names", ", ".join(list(members)[:4]))
    for record in (*index["programs"], *index["weights"]):
        payload = members[record["member"]]
        if payload.nbytes != record["size"] or hashlib.sha256(payload).hexdigest() != record["sha256"]:
            what = f"member {record['member']} is not the one that the index names"
            raise _bad(where, what, f"{payload.nbytes} bytes")
    programs = {r["name"]: Program(r["member"], members[r["member"]], r["weights"]) for r in index["programs"]}
    return Programs(programs, [members[r["member"]] for r in index["weights"]], index["limit"])


def _index(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("ascii"))
        if not isinstance(value, dict) or value["programs_version"] != VERSION or canonical(value) != text:
            raise ValueError("another version, or not in canonical form")
        _check_form(value)
    except (ValueError, TypeError, KeyError, RecursionError):
        what = "the index of programs is not well formed"
        raise _bad(where, what, f"known is version {VERSION} in canonical form") from None
    return value


def _check_form(value: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError."""
    if set(value) != {"limit", "programs", "programs_version", "weights"}:
        raise ValueError("other fields")
    if value["limit"] is not None:
        _number(value["limit"])
    if [record["name"] for record in value["programs"]] != list(NAMES):
        raise ValueError("other programs")
    count = len(value["weights"])
    for record in value["programs"]:
        _member(record, {"name", "weights"})
        for name, position in record["weights"].items():
            if not isinstance(name, str) or _number(position) >= count:
                raise ValueError("a weight that is not there")
    for record in value["weights"]:
        _member(record, set())


def _member(record: dict[str, Any], more: set[str]) -> None:
    _number(record["size"])
    if set(record) != {"member", "size", "sha256"} | more or not isinstance(record["member"], str):
        raise ValueError("no record of a member")
    if not isinstance(record["sha256"], str) or not HEX.match(record["sha256"]):
        raise ValueError("no digest")


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("no whole number of at most 63 bits")
    return value


def _bad(where: str, what: str, facts: str) -> ContractError:
    return ContractError(what, where=where, facts=facts, do=AGAIN)
