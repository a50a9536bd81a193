"""Several targets in one file: an archive of whole artifacts and an index, from which `load` takes the one that fits.

    model/targets.json              {"bundle_version": 1, "parts": [{"member": ..., "sha256": ..., "target": ...}, ...]}
    model/a100.pt2, model/cpu.pt2   artifacts, each with its contract; weights are in each of them

The form is that of runtime/archive.py, the digest in its comment that of the index. A part's target is what its own
contract states; the two must agree. Parts for a GPU go before those for the CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiled_attn.ir import machine
from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import archive
from compiled_attn.runtime.artifact import Artifact, write_file
from compiled_attn.runtime.contract import HEX, Needs, canonical
from compiled_attn.runtime.host import capability_of, lacks

INDEX = archive.ROOT + "targets.json"
VERSION = 1
AGAIN = "export the model again, or fetch the file again"


@dataclass(frozen=True)
class Part:
    """One artifact of a bundle, as the index states it."""

    member: str
    size: int
    sha256: str
    target: Needs


@dataclass(frozen=True)
class Bundle:
    """A file for several targets. sha256: of the whole file; parts: the artifacts in it, in the order of asking."""

    path: Path
    sha256: str
    size: int
    parts: tuple[Artifact, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}  {self.size / 1e6:.1f} MB  sha256 {self.sha256}"]
        for part in self.parts:
            target = part.contract.target
            lines.append(f"part  {target.name:<12} {part.size / 1e6:>8.1f} MB  {target.device}, {target.origin}")
        return "\n".join(lines)


def write_bundle(path: str | Path, parts: Sequence[Artifact]) -> Bundle:
    """One file of artifacts that were exported before. Raises ContractError where two are for one target."""
    ordered = sorted(parts, key=lambda part: part.contract.target.device != "cuda")
    names = [part.contract.target.name for part in ordered]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ContractError(
            f"two builds are for {twice[0]}",
            where=str(path),
            facts=f"the targets are {', '.join(names)}",
            do="name each target once",
        )
    records, payloads = [], []
    for part in ordered:
        data, member = part.path.read_bytes(), f"{archive.ROOT}{part.contract.target.name}.pt2"
        records.append(
            {"member": member, "size": len(data), "sha256": part.sha256, "target": _needs_json(part.contract.target)}
        )
        payloads.append((member, data))
    text = canonical({"bundle_version": VERSION, "parts": records})
    size, digest = write_file(Path(path), archive.pack([(INDEX, text), *payloads], hashlib.sha256(text).hexdigest()))
    return Bundle(Path(path), digest, size, tuple(ordered))


def parts_of(members: Mapping[str, memoryview], digest: str, where: str) -> list[tuple[Part, memoryview]]:
    """The parts of a bundle's members, checked against its index. Raises ContractError."""
    text = bytes(members[INDEX])
    if hashlib.sha256(text).hexdigest() != digest:
        raise _bad(where, "the index of targets does not match the digest in the archive", "its SHA-256 is another")
    try:
        value = json.loads(text.decode("ascii"))
        parts = [_part(record) for record in value["parts"]]
        sound = canonical(value) == text and set(value) == {"bundle_version", "parts"}
    except (ValueError, TypeError, KeyError, RecursionError):
        sound, parts, value = False, [], {}
    if not sound or not parts or value["bundle_version"] != VERSION:
        raise _bad(where, "the index of targets is not well formed", f"known is version {VERSION} in canonical form")
    if [INDEX, *(p.member for p in parts)] != list(members):
        raise _bad(where, "the members are not those that the index of targets names", ", ".join(list(members)[:4]))
    for part in parts:
        payload = members[part.member]
        if payload.nbytes != part.size or hashlib.sha256(payload).hexdigest() != part.sha256:
            raise _bad(where, f"member {part.member} is not the one that the index names", f"{payload.nbytes} bytes")
    return [(part, members[part.member]) for part in parts]


def choose(
    parts: Sequence[tuple[Part, memoryview]], where: str, *, device: str | None = None
) -> tuple[Part, memoryview]:
    """The first part that this machine can run. device: "cpu", "cuda" or "cuda:1", where the user named one.

    Raises ContractError with what each part needs and what is here.
    """
    refused = []
    for part, payload in parts:
        because = _because(part.target, device)
        if because is None:
            return part, payload
        refused.append(f"{part.target.name} because {because}")
    raise ContractError(
        "none of the file's targets is here",
        where=where,
        facts=f"not {'; not '.join(refused)}",
        do="export the model for what is here (target='auto'), or run it on one of these",
    )


def named(parts: Sequence[tuple[Part, memoryview]], name: str, where: str) -> tuple[Part, memoryview]:
    """The part for the target of that name."""
    for part, payload in parts:
        if part.target.name == name:
            return part, payload
    raise ContractError(
        f"the file holds no build for {name}",
        where=where,
        facts=f"it holds {', '.join(part.target.name for part, _ in parts)}",
        do="name one of these",
    )


def _because(needs: Needs, device: str | None) -> str | None:
    """None where this machine runs code with these needs, else the reason as half a sentence."""
    if device is not None and device.split(":")[0] != needs.device:
        return f"{device} was asked for"
    missing = lacks(needs)
    if missing is not None:
        return missing
    if needs.device != "cuda":
        return None
    gpus, wanted = machine.here().gpus, capability_of(needs)
    if device is not None and ":" in device:
        index = int(device.split(":")[1])
        gpus = gpus[index : index + 1]
    if any(gpu.sm == wanted for gpu in gpus):
        return None
    there = ", ".join(f"{gpu.name} ({gpu.sm / 10})" for gpu in gpus) or "no GPU"
    return f"it needs compute capability {wanted / 10}, here is {there}"


def _needs_json(needs: Needs) -> dict[str, Any]:
    return {**vars(needs), "isa": list(needs.isa)}


def _part(record: dict[str, Any]) -> Part:
    target = record["target"]
    texts = [record["member"], record["sha256"], *(v for k, v in target.items() if k != "isa"), *target["isa"]]
    if set(record) != {"member", "size", "sha256", "target"} or not all(isinstance(t, str) for t in texts):
        raise ValueError("no record of a part")
    if not isinstance(record["size"], int) or not HEX.match(record["sha256"]):
        raise ValueError("no size or digest")
    return Part(record["member"], record["size"], record["sha256"], Needs(**{**target, "isa": tuple(target["isa"])}))


def _bad(where: str, what: str, facts: str) -> ContractError:
    return ContractError(what, where=where, facts=facts, do=AGAIN)


def extract(path: str | Path, target: str, output: str | Path) -> str:
    """Writes the part for `target` of a file to `output`, an artifact of its own. Returns its SHA-256 in hex."""
    where = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _bad(where, "the file can not be read", error.strerror or type(error).__name__) from None
    members, digest = archive.unpack(memoryview(data), where)
    if INDEX not in members:
        raise _bad(where, "the file is for one target", f"it holds no {INDEX}")
    part, payload = named(parts_of(members, digest, where), target, where)
    write_file(Path(output), iter([payload]))
    return part.sha256
