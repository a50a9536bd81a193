"""What a template is, and how the C++ ones get into Inductor's code.

A C++ template is a lowering (`ir/_torch.cpp_template`): it binds pointers, sizes and strides and calls a function of a
header in ops/kernels/cpp, whose text is put into the generated source, so that a `.pt2` needs no library beside.

Second outputs, decided for all templates: one kernel fills several buffers. The template's buffer gets Inductor's
multi-output layout and each output is a buffer of its own with its own layout, allocated by Inductor, symbolic sizes
included. An output that nothing reads is not allocated and reaches the kernel as a null pointer. (A second op would
read the same inputs again and could not share a rank; a mutated argument would need functionalisation.)

Epilogues: none. Inductor is told to fuse nothing behind a template (`no_fuse_buffer_names`), and a template that is
handed an epilogue all the same raises.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels" / "cpp"
MARKER = "compiled_attn template:"


@dataclass(frozen=True)
class Template:
    """A kernel that can stand for an op on a kind of device.

    accepts: `(args, kwargs, target)` with fake tensors -> None, or the sentence that says why not.
    """

    name: str
    op: str
    device: str
    accepts: Callable[[tuple[Any, ...], dict[str, Any], Any], str | None]


@cache
def header_text(name: str) -> str:
    """A header of ops/kernels/cpp; those that it includes from there stand in their places (guards make that safe)."""

    def included(found: re.Match[str]) -> str:
        return header_text(found[1])

    text = (KERNELS / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "([a-z0-9_]+\.h)"$', included, text, flags=re.MULTILINE)


def marked(name: str, header: str) -> str:
    """A header's text under the comment by which `templates_in` finds the template in generated code."""
    return f"// {MARKER} {name}\n{header_text(header)}"


def templates_in(code: str) -> set[str]:
    """Names of the templates that generated code holds."""
    return set(re.findall(rf"{MARKER} (\w+)", code))


def templates_in_package(path: str | Path) -> set[str]:
    """Names of the templates in the C++ sources of a `.pt2`."""
    return templates_in(_sources(path))


def calls_in_package(path: str | Path) -> dict[str, int]:
    """Template -> how often the C++ sources of a `.pt2` call its kernels (equal ones are one, called again)."""
    code = _sources(path)
    kernels = re.findall(rf'{MARKER} (\w+).*?\nextern "C"[^(]*\bvoid\s+(\w+)\(', code, re.DOTALL)
    template_of = {kernel: template for template, kernel in kernels}
    mentions = re.findall(r"(\bvoid\s+)?\b(\w+)\(", code)
    return dict(Counter(template_of[name] for declared, name in mentions if name in template_of and not declared))


def _sources(path: str | Path) -> str:
    """The C++ sources of a `.pt2`, one after the other."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".cpp")]
        return "\n".join(archive.read(name).decode("utf-8", "replace") for name in names)
