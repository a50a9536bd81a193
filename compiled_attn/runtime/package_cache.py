"""Packages that were built before: one `.pt2` for each lowered program, with its weights, on this kind of machine.

    key = SHA-256 of the graph with shapes, strides, ranges and size hints, the bytes of weights and constants,
          Inductor's configuration, this library's source, torch, compiler and processor

A program whose meaning its graph does not tell (an op from outside torch and this library, a higher-order op) has no
key and is built each time. A file is read once and used only if its bytes have the digest that was written with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch, machine
from compiled_attn.ir.program import Program
from compiled_attn.ops.templates import registry
from compiled_attn.runtime.files import write_whole
from compiled_attn.runtime.measure import cache_folder

LIMIT_BYTES = 4 << 30  # of all packages together; the ones not used for longest go first
SOURCE = Path(__file__).parents[1]
OURS = "compiled_attn"
NAMESPACES = ("aten", "prims", OURS, f"{OURS}_triton")
MODULES = ("_operator", "builtins", "math", "torch")  # of functions on sizes


def folder() -> Path:
    return cache_folder() / "packages"


def key_of(program: Program, options: Mapping[str, Any]) -> str | None:
    """The key of a lowered program with Inductor's options, or None where the graph does not tell all."""
    if not _told_by_graph(program) or any(_package_of(t.accepts) != OURS for t in registry.TEMPLATES):
        return None
    digest = hashlib.sha256()
    for part in (*_circumstances(), *sorted(f"{k}={v!r}" for k, v in options.items()), *_graph(program)):
        digest.update(part.encode())
        digest.update(b"\0")
    for name, tensor in sorted({**program.state, **program.constants}.items()):
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}\0".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fetch(key: str, path: Path) -> bool:
    """Writes the package of `key` to `path`, if there is a sound one."""
    kept = folder() / f"{key}.pt2"
    try:
        said = json.loads(kept.with_suffix(".json").read_text())
        data = kept.read_bytes()
        if said != {"sha256": hashlib.sha256(data).hexdigest()}:
            return False
        path.write_bytes(data)
        os.utime(kept)
    except (OSError, ValueError):
        return False
    return True


def keep(key: str, package: Path) -> None:
    """Remembers a package. A folder that can not be written to is no error: the package is built again next time."""
    home = folder()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = package.read_bytes()
        write_whole(home / f"{key}.pt2", data)
        write_whole(home / f"{key}.json", json.dumps({"sha256": hashlib.sha256(data).hexdigest()}).encode())
        _trim(home)
    except OSError:
        return


def clear() -> None:
    """Forgets every package."""
    shutil.rmtree(folder(), ignore_errors=True)


def _trim(home: Path) -> None:
    files = sorted(home.glob("*.pt2"), key=lambda f: f.stat().st_mtime, reverse=True)
    total = 0
    for position, file in enumerate(files):
        total += file.stat().st_size
        if total > LIMIT_BYTES and position > 0:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)


def _told_by_graph(program: Program) -> bool:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace not in NAMESPACES:
                return False
        elif _is_higher_order(node.target) or _package_of(node.target) not in MODULES:
            return False
    return True


def _is_higher_order(target: Any) -> bool:
    return isinstance(target, torch._ops.HigherOrderOperator)


def _package_of(function: Any) -> str:
    return str(getattr(function, "__module__", "")).split(".")[0]


def _circumstances() -> Iterator[str]:
    found = machine.here()
    yield from (torch.__version__, str(torch.version.git_version), source_digest(), _compiler())
    yield from (found.arch, found.model, found.capability, " ".join(sorted(found.flags)))
    yield from (str(torch.get_num_threads()), torch.get_float32_matmul_precision())
    yield from (str(torch.are_deterministic_algorithms_enabled()), str(torch.backends.mkldnn.enabled))
    yield _torch.inductor_state()


@cache
def source_digest() -> str:
    """Digest of this library's own files."""
    digest = hashlib.sha256()
    for file in sorted(f for f in SOURCE.rglob("*") if f.suffix in (".py", ".h", ".json", ".toml")):
        digest.update(str(file.relative_to(SOURCE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _compiler() -> str:
    """The compiler by path, size and time, which an update changes."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        return name
    file = Path(found).resolve()
    return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _graph(program: Program) -> Iterator[str]:
    number: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        number[node] = f"%{len(number)}"
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: _Ref(number[n]), (node.args, dict(node.kwargs)))
        values = [_value(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))]
        name = node.name if node.op == "placeholder" else ""
        yield f"{node.op} {name} {node.target} {args!r} {kwargs!r} {values}"
    yield repr(program.signature)
    yield repr(sorted((str(k), str(v)) for k, v in program.ranges.items()))
    yield pytree.treespec_dumps(program.in_spec)
    yield pytree.treespec_dumps(program.out_spec)
    yield f"{program.mode} {_torch.size_hints(program.shape_env)}"


class _Ref:
    """A node's number, printed bare."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        sizes = [str(_torch.expression(s)) for s in (*value.shape, *value.stride(), value.storage_offset())]
        return f"{value.dtype} {value.device} {sizes}"
    return str(_torch.expression(value))
