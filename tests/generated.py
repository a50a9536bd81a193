"""What the C++ that Inductor wrote does with the memory of its maps."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import IO

KERNEL = re.compile(r'\nextern "C"[^(]*\bvoid\s+(\w+)\([^)]*\)\s*\{(.*?)(?=\nextern "C"|\Z)', re.DOTALL)
INDEX = re.compile(r"static_cast<int64_t>\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
COPY = re.compile(r"\b(aoti_torch_\w*(?:clone|copy_|contiguous)\w*)\(")


def conversions(path: str | Path) -> dict[str, int]:
    """Kernels in the C++ sources of a `.pt2` that change the layout of a map -> how often they are called.

    A loop nest changes it where two accesses go along different variables and each has the other's with a stride; the
    templates read and write channels last. ATen's own copies count too.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".cpp")]
        code = "\n".join(archive.read(name).decode() for name in names)
    found = {name for name, body in KERNEL.findall(code) if any(map(_turns, _nests(body)))}
    mentions = re.findall(r"(\bvoid\s+)?\b(\w+)\(", code)
    calls = Counter(name for declared, name in mentions if name in found and not declared)
    return dict(calls + Counter(COPY.findall(code)))


def regions(path: str | Path | IO[bytes]) -> list[str]:
    """The pragmas by which Inductor's own kernels in a `.pt2` start threads; what our templates do is not told."""
    with zipfile.ZipFile(path) as archive:
        code = "\n".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    bodies = (body.partition("\n}\n")[0] for _, body in KERNEL.findall(code))
    own = (body for body in bodies if "compiled_attn_cpp::" not in body)
    return [line.strip() for body in own for line in body.splitlines() if "omp parallel" in line]


def _nests(body: str) -> list[str]:
    return [] if "compiled_attn_cpp::" in body else body.split("for(int64_t x0=")[1:]


def _turns(nest: str) -> bool:
    accesses = {(_along(index), _variables(index)) for index in INDEX.findall(nest) if "x" in index}
    return any(u and v and u != v and v in of_a and u in of_b for u, of_a in accesses for v, of_b in accesses)


def _along(index: str) -> str:
    """The variable whose neighbours lie side by side; none where the index has no such term."""
    terms = [term.split("_inner")[0] for term in index.split(" + ")]
    return next((term for term in terms if re.fullmatch(r"x\d+", term)), "")


def _variables(index: str) -> frozenset[str]:
    return frozenset(re.findall(r"\bx\d+", index))
