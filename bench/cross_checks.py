"""What can be checked of a cross build with no device: its kernels' architecture, spills, weights and symbols."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compiled_attn.ir import _torch_cross
from compiled_attn.ops.templates.triton_config import KERNELS
from compiled_attn.runtime import cross_toolchain
from compiled_attn.runtime.cross_sources import read_sources
from compiled_attn.runtime.load import read

SPILL_BUDGET_BYTES = 64  # a thread; what ptxas keeps on the stack of a kernel that is otherwise in registers
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libtorch_global_deps.so")
SYSTEM_LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "ld-linux-x86-64.so.2")
OURS = "|".join(sorted(p.stem for p in KERNELS.glob("[a-z]*.py")))  # what the names of our kernels begin with


@dataclass(frozen=True)
class Checked:
    """What was found in one artifact. Everything that speaks against it is a sentence in `problems`."""

    cubins: int
    templates: tuple[str, ...]
    most_registers: int
    most_spilled: int
    weights: int
    weight_bytes: int
    symbols: int
    problems: tuple[str, ...]


def check(path: str | Path, sm: int, weights: Mapping[str, torch.Tensor]) -> Checked:
    """Checks an artifact (.pt2) or a package of sources (.zip) that was built for compute capability `sm`."""
    path = Path(path)
    if path.suffix == ".zip":
        stated, members = read_sources(path)
        blob, library = members["weights.bin"], None
    else:
        contents = read(path)
        stated, members = contents.contract, {n: bytes(b) for n, b in contents.members.items()}
        library = next(b for n, b in members.items() if n.endswith(".so"))
        blob = library
    problems = [] if "not run on the target" in stated.target.origin else ["the contract does not say where it ran"]
    cubins = {name: data for name, data in members.items() if name.endswith(".cubin")}
    usage = {name: _torch_cross.resources(data) for name, data in cubins.items()}
    problems += [f"{n} is for sm_{cubin_sm(b)}, not sm_{sm}" for n, b in cubins.items() if cubin_sm(b) != sm]
    over = {name: spilled for name, (_, spilled) in usage.items() if spilled > SPILL_BUDGET_BYTES}
    problems += [f"{name} spills {spilled} B a thread" for name, spilled in over.items()]
    problems += [f"weight {name} is not in the file" for name in missing_weights(weights, blob)]
    wanted = undefined(library) if library is not None else sources_need(members)
    problems += [f"{name} is exported by no library of the target" for name in sorted(wanted - exported())]
    code = next(b for n, b in members.items() if n.endswith(".cpp") and b"AOTInductorModelBase(" in b).decode()
    launched = set(re.findall(r"kernels_\.(\w+) = loadKernel\(", code))
    ours = {name for name in launched if re.match(OURS, name)}
    return Checked(
        cubins=len(cubins),
        templates=tuple(sorted(ours)),
        most_registers=max((r for r, _ in usage.values()), default=0),
        most_spilled=max((s for _, s in usage.values()), default=0),
        weights=len(weights),
        weight_bytes=sum(t.numel() * t.element_size() for t in weights.values()),
        symbols=len(wanted),
        problems=tuple(problems),
    )


def cubin_sm(data: bytes) -> int:
    """The compute capability that a cubin's ELF header names (its flags' lowest byte, as cuobjdump reads it)."""
    if data[:4] != b"\x7fELF":
        raise ValueError("no ELF file")
    return int.from_bytes(data[48:52], "little") & 0xFF


def weights_of(program: Any) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants of a Program, by placeholder."""
    return dict(program.tensors())


def missing_weights(weights: Mapping[str, torch.Tensor], blob: bytes) -> list[str]:
    """Names of the weights whose bytes are not in `blob`, in their own memory order."""
    found = []
    for name, tensor in weights.items():
        if not tensor.numel():
            continue
        whole = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
        storage = whole.untyped_storage()
        data = ctypes.string_at(storage.data_ptr(), storage.nbytes())
        if data not in blob:
            found.append(name)
    return found


def undefined(library: bytes) -> set[str]:
    """Symbols that a shared library needs from others."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        text = _nm("--undefined-only", file.name)
    weak = {line.split()[-1] for line in text.splitlines() if line.split()[-2:-1] in (["w"], ["v"])}
    return {line.split()[-1] for line in text.splitlines() if line.strip()} - weak


def sources_need(members: Mapping[str, bytes]) -> set[str]:
    """Functions of libtorch that host code in sources calls."""
    return {name.decode() for name in re.findall(rb"\b(aoti_torch_cuda_\w+)\(", members["model.cpp"])}


@cache
def exported() -> frozenset[str]:
    """What the target's libraries export: the installed libtorch by its symbols, CUDA's by the headers."""
    names = set(cross_toolchain.shim_names())
    for library in TORCH_LIBRARIES:
        names |= _defined(str(cross_toolchain.TORCH / "lib" / library))
    for library in SYSTEM_LIBRARIES:
        found = _system(library)
        names |= _defined(found) if found else set()
    headers = cross_toolchain.headers()
    for header in ("cuda.h", "cuda_runtime_api.h"):
        text = (headers / header).read_text(errors="replace")
        names |= set(re.findall(r"\b(cu(?:da)?[A-Z]\w+)\s*\(", text))
    return frozenset(names)


def _defined(path: str) -> set[str]:
    lines = _nm("--defined-only", path).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def _nm(which: str, path: str) -> str:
    text = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout
    return re.sub(r"@\S+", "", text)


def _system(name: str) -> str | None:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = done.stdout.strip()
    return path if "/" in path else None
