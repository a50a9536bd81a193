"""Writing an artifact: AOTInductor's package with its contract, in an archive without loose ends."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compiled_attn import __version__
from compiled_attn.ir.errors import ContractError
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target
from compiled_attn.runtime import archive, contract, describe, package, weights
from compiled_attn.runtime.contract import Contract, MemberSpec, Needs, PassRecord
from compiled_attn.runtime.host import needs_of


@dataclass(frozen=True)
class Artifact:
    """A file that `export` wrote. sha256: of the whole file, in hex; give it to `load(..., expect_sha256=)`."""

    path: Path
    sha256: str
    size: int
    contract: Contract

    def __str__(self) -> str:
        return f"{self.path}  {self.size / 1e6:.1f} MB  sha256 {self.sha256}\n{describe.text(self.contract)}"


def write_artifact(
    path: str | Path,
    raw: str | Path,
    call: contract.Call | Program,
    target: Target,
    *,
    passes: Sequence[PassRecord] = (),
    needs: Needs | None = None,
    versions: Mapping[str, str] | None = None,
) -> Artifact:
    """Writes the artifact of a raw package that AOTInductor made of a program on this machine.

    call: how it is called, or the program to read that from.  needs: the machine it runs on, where it is not this one.
    versions: of what took part beside torch.  The file appears at once or not at all.
    Raises ContractError where the package contradicts the contract, or the file can not be written.
    """
    path = Path(path)
    if isinstance(call, Program):
        call = describe.call_of(call)
    found = _raw_members(Path(raw))
    call = package.narrowed(call, package.facts_of({n: memoryview(b) for n, b in found}, str(raw)))
    stated = Contract(call, needs or needs_of(target), versions_of(target, versions), tuple(passes))
    members = _stamped(found, stated.stamp())
    specs = tuple(MemberSpec(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in members)
    stated = replace(stated, members=specs)
    package.compare(stated, package.facts_of({n: memoryview(b) for n, b in members}, str(raw)), str(raw))
    text = stated.to_bytes()
    contract.from_bytes(text, str(path))
    pieces = archive.pack([(contract.MEMBER, text), *members], hashlib.sha256(text).hexdigest())
    size, digest = write_file(path, pieces)
    return Artifact(path, digest, size, stated)


def _raw_members(raw: Path) -> list[tuple[str, bytes]]:
    """Members of torch's own archive, by name, under our root; without weights that it keeps beside the code."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(raw) as source:
        for name in source.namelist():
            rest = name.split("/", 1)[-1]
            if rest.startswith(weights.RAW) or rest.endswith(f"/{weights.CONFIG}"):
                continue
            fresh = archive.ROOT + rest
            if fresh in found:
                raise ContractError(
                    f"two members are named {fresh}",
                    where=str(raw),
                    facts="AOTInductor's package holds it twice",
                    do="report this model",
                )
            found[fresh] = source.read(name)
    return sorted(found.items())


def _stamped(members: Sequence[tuple[str, bytes]], stamp: str) -> list[tuple[str, bytes]]:
    """The members with the contract's stamp in AOTInductor's metadata files."""
    marked = []
    for name, payload in members:
        if name.startswith(package.FOLDER) and name.endswith("_metadata.json"):
            payload = json.dumps({**json.loads(payload), package.STAMP: stamp}).encode()
        marked.append((name, payload))
    return marked


def versions_of(target: Target, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What takes part in a build here. more: in place of torch's CUDA, where another made the machine code."""
    versions = {"compiled_attn": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if more is not None:
        return {**versions, **more}
    if target.kind == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return versions


def write_file(path: Path, pieces: Any) -> tuple[int, str]:
    """Writes beside `path`, then renames. Returns size and SHA-256 in hex."""
    digest, size = hashlib.sha256(), 0
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        os.replace(partial, path)
    except OSError as error:
        raise ContractError(
            "the artifact can not be written",
            where=str(path),
            facts=error.strerror or type(error).__name__,
            do="give a path in a folder that exists and can be written to",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return size, digest.hexdigest()
