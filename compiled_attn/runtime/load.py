"""`load`: an artifact back to a callable, after everything that can be checked has been checked."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import archive, bundle, contract, package, programs
from compiled_attn.runtime.call import Caller
from compiled_attn.runtime.contract import Contract
from compiled_attn.runtime.host import require_device, require_machine
from compiled_attn.runtime.weights import Wanted, require_fit

_CONSTRUCTION = threading.Lock()  # torch's loader may not be constructed by two threads at once


@dataclass(frozen=True)
class Contents:
    """A file that keeps its contract. members: name -> bytes (the contract's own left out), in memory.

    weights: those that its code asks for, where they are not in it.
    """

    path: Path
    contract: Contract
    members: Mapping[str, memoryview]
    weights: Mapping[str, Wanted]


def read(path: str | Path, *, expect_sha256: str | None = None, target: str | None = None) -> Contents:
    """Reads an artifact once and checks all of it, for any machine; no code of it is run, nothing is written.

    target: which of a file for several targets; left out, the first of them. Of a decoder's file, the prompt's program.
    Raises ContractError: no artifact, damaged, no well-formed contract, or a contract that the members contradict.
    """
    return _checked(Path(path), bytes_of(Path(path), expect_sha256), None, target=target)


def load(
    path: str | Path,
    *,
    expect_sha256: str | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
) -> LoadedModel:
    """An artifact that `compiled_attn.export` wrote, as a callable with the model's own signature.

    Loading an artifact runs native code. The contract's digests show damage, not malice: whoever can change the file
    can change them too. Load only files you trust, or give `expect_sha256`, the SHA-256 in hex of the whole file, from
    a source you trust.

    device: "cuda:1" and the like, of the kind that the artifact was built for.
    threads: sets torch's number of threads, for the whole process as `torch.set_num_threads` does; None leaves it.
    Raises ContractError, in four parts, before any code of the file is opened: unreadable or damaged file, contract
    that contradicts the package, another torch release, another machine or CPU. Safe to call from several threads.
    """
    path = Path(path)
    asked = None if device is None else str(device)
    contents = _checked(path, bytes_of(path, expect_sha256), torch.__version__, device=asked)
    if contents.weights:
        raise ContractError(
            "the artifact's weights are not in it",
            where=str(path),
            facts=f"its code asks for {len(contents.weights)} of them, which lie in the file that it is a program of",
            do="load that file: compiled_attn.load_decoder(path)",
        )
    where = device_of(contents.contract, device, path)
    set_threads(threads)
    return LoadedModel(contents, where)


def set_threads(threads: int | None) -> None:
    """torch's number of threads for the whole process; None leaves it. Raises ContractError."""
    if threads is not None:
        if threads < 1:
            raise ContractError(
                "the number of threads is not positive",
                facts=f"threads={threads}",
                do="give 1 or more, or leave it out",
            )
        torch.set_num_threads(threads)


class LoadedModel:
    """A loaded artifact; calls are checked against its contract (see `runtime.call`) and may come from several threads.

    It is for inference: results carry no gradient. Its private copy of the files goes when it is collected, or at exit.
    """

    def __init__(
        self, contents: Contents, device: torch.device, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.path, self.contract, self.device = contents.path, contents.contract, device
        self._caller = Caller(contents.contract.call, str(contents.path), device)
        folder = tempfile.mkdtemp(prefix="compiled_attn-")  # mode 0700
        self._cleanup = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._loader = _open(contents, folder, device)
        self.weights = weights or {}  # kept alive for the code, which reads them where they are
        if self.weights:
            _torch.give_weights(self._loader, self.weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, in the structure that the model itself gives. Raises ContractError for a wrong call."""
        tensors, sizes = self._caller.check(self._caller.bind(args, kwargs))
        try:
            with torch.no_grad():
                results = self._loader.boxed_run(tensors)
        except RuntimeError as error:
            raise ContractError(
                "the artifact's code stopped",
                where=str(self.path),
                facts=_first_line(error),
                do="run the model eagerly on the same inputs; if that works, export it again",
            ) from error
        return self._caller.restore(results, sizes)

    def __repr__(self) -> str:
        call = self.contract.call
        taken = ", ".join(i.name for i in call.inputs)
        return f"LoadedModel({self.path.name}: {taken} -> {', '.join(o.name for o in call.outputs)})"


def bytes_of(path: Path, expect_sha256: str | None) -> bytes:
    """A file's bytes, read once. Raises ContractError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContractError(
            "the file can not be read",
            where=str(path),
            facts=error.strerror or type(error).__name__,
            do="give the path of an artifact that compiled_attn.export wrote",
        ) from None
    if expect_sha256 is not None:
        found = hashlib.sha256(data).hexdigest()
        if found != expect_sha256.lower():
            raise ContractError(
                "the file is not the expected one",
                where=str(path),
                facts=f"expected SHA-256 {expect_sha256.lower()}, found {found}",
                do="fetch the file again, or ask its author for the digest",
            )
    return data


def _checked(
    path: Path,
    data: bytes | memoryview,
    torch_version: str | None,
    *,
    device: str | None = None,
    target: str | None = None,
    part: bundle.Part | None = None,
    member: str = "",
) -> Contents:
    """All checks of a file's bytes. torch_version: also check release and machine, before the package's own word.

    device, target: which part of a file for several targets.  part: which of them `data` is.  member: which of a
    decoder's programs it is.
    """
    member = member if part is None else part.member
    where = f"{path}, member {member}" if member else str(path)
    members, digest = archive.unpack(memoryview(data), where)
    if programs.INDEX in members and not member:
        if torch_version is None:
            return next(iter(checked_programs(path, members, digest, None)[1].values()))
        raise ContractError(
            "the file holds a decoder",
            where=where,
            facts=f"its programs are {' and '.join(programs.NAMES)}, over one state",
            do="load it with compiled_attn.load_decoder",
        )
    if bundle.INDEX in members and not member:
        parts = bundle.parts_of(members, digest, where)
        if target is not None:
            chosen, payload = bundle.named(parts, target, where)
        else:
            chosen, payload = bundle.choose(parts, where, device=device) if torch_version is not None else parts[0]
        return _checked(path, payload, torch_version, part=chosen)
    text = members.pop(contract.MEMBER, None)
    if text is None:
        raise ContractError(
            "the package has no contract",
            where=where,
            facts=f"there is no member {contract.MEMBER}",
            do="write the package with compiled_attn.export",
        )
    if hashlib.sha256(text).hexdigest() != digest:
        raise ContractError(
            "the contract does not match the digest in the archive",
            where=where,
            facts="its SHA-256 is another than the one in the archive's comment",
            do="export the model again, or fetch the file again",
        )
    stated = contract.from_bytes(bytes(text), where)
    _compare_members(stated, members, where)
    if part is not None and part.target != stated.target:
        raise ContractError(
            "the index of targets contradicts a contract",
            where=where,
            facts=f"the index states {part.target.name}, its contract {stated.target.name}, or another need of theirs",
            do="export the model again; an index is never edited by hand",
        )
    if torch_version is not None:
        _require_torch(stated, torch_version, where)
        require_machine(stated.target, where)
    facts = package.facts_of(members, where)
    package.compare(stated, facts, where)
    return Contents(path, stated, members, facts.weights)


def checked_programs(
    path: Path, members: Mapping[str, memoryview], digest: str, torch_version: str | None
) -> tuple[programs.Programs, dict[str, Contents]]:
    """All checks of a decoder's file: its index, each program as a file of its own, and that the weights fit."""
    found = programs.programs_of(members, digest, str(path))
    contents = {}
    for name, program in found.programs.items():
        contents[name] = _checked(path, program.data, torch_version, member=program.member)
        given = {weight: found.weights[at].nbytes for weight, at in program.weights.items()}
        require_fit(contents[name].weights, given, f"{path}, member {program.member}")
    return found, contents


def _compare_members(stated: Contract, members: Mapping[str, memoryview], where: str) -> None:
    wanted, found = [m.name for m in stated.members], list(members)
    if wanted != found:
        differing = sorted(set(wanted) ^ set(found)) or ["their order"]
        raise ContractError(
            "the members are not those that the contract names",
            where=where,
            facts=f"the difference: {', '.join(differing[:3])}",
            do="export the model again, or fetch the file again",
        )
    for member in stated.members:
        payload = members[member.name]
        if payload.nbytes != member.size or hashlib.sha256(payload).hexdigest() != member.sha256:
            raise ContractError(
                f"member {member.name} is not the one that the contract names",
                where=where,
                facts=f"stated are {member.size} bytes of SHA-256 {member.sha256[:12]}, found {payload.nbytes} others",
                do="export the model again, or fetch the file again",
            )


def _require_torch(stated: Contract, version: str, where: str) -> None:
    built, here = (v.split("+")[0] for v in (stated.versions.get("torch", "nothing"), version))
    if built != here:
        raise ContractError(
            "the artifact was built with another torch",
            where=where,
            facts=f"built with {built}, this is {here}",
            do=f"install torch=={built}, or export the model again with this torch",
        )


def device_of(stated: Contract, device: str | torch.device | None, path: Path) -> torch.device:
    """The device to run on, which is here and of the kind asked for. Raises ContractError."""
    wanted = torch.device(stated.target.device if device is None else device)
    if wanted.type != stated.target.device:
        raise ContractError(
            "the artifact was built for another device",
            where=str(path),
            facts=f"built for {stated.target.device}, asked for {wanted}",
            do=f"load it without device=, or export the model with target='{wanted.type}'",
        )
    if wanted.type == "cuda":
        wanted = torch.device(wanted.type, wanted.index or 0)
        require_device(stated.target, wanted.index, str(path))
    return wanted


def _open(contents: Contents, folder: str, device: torch.device) -> Any:
    """AOTInductor's loader on the verified bytes, written to `folder`; here native code of the file starts to run."""
    with _CONSTRUCTION:
        if _torch.loads_directories():
            _write(contents.members, Path(folder))
            source = folder
        else:
            source = str(Path(folder) / "model.pt2")
            with open(source, "wb") as file:
                file.writelines(archive.pack(list(contents.members.items()), "0" * 64))
        try:
            return _torch.package_loader(source, device_index=device.index if device.type == "cuda" else -1)
        except RuntimeError as error:
            raise ContractError(
                "AOTInductor can not open the package",
                where=str(contents.path),
                facts=_first_line(error),
                do="run compiled_attn.doctor(); check that temporary files may be executed (TMPDIR)",
            ) from error


def _write(members: Mapping[str, memoryview], folder: Path) -> None:
    for name, payload in members.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(payload)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]
