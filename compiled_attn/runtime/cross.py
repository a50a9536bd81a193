"""Builds for a GPU that is not there: the lowered program goes to a child process that alone carries the patches.

parent: capture, passes, lowering, fused attention  ->  child: patched torch, AOTInductor  ->  parent: contract, file

Two products. A path that ends in `.pt2` gets the whole artifact, host code for x86-64-v3 included. One that ends in
`.zip` gets sources, cubins, PTX and weights with a CMakeLists.txt, for hosts of another architecture
(cross_sources.py). Both are stamped as what they are: cross-compiled, not run on the target. A machine that has the GPU
builds there, natively; only its package of sources is made here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch_cross, errors, machine
from compiled_attn.ir.errors import CompiledAttnError, LowerError, TargetError
from compiled_attn.ir.program import Program
from compiled_attn.ir.targets import Target
from compiled_attn.runtime.contract import Call
from compiled_attn.runtime.progress import Stages

MARCH, VECTOR_BITS = "x86-64-v3", 256
CHILD = "compiled_attn.runtime.cross_child"
STAGES = ("load the program", "compile for the target")


@dataclass(frozen=True)
class Product:
    """What the child made. package: AOTInductor's own archive.  folder: cubins and PTX by kernel name beside it."""

    package: Path
    folder: Path
    kernels: tuple[_torch_cross.Kernel, ...]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]


def wanted(target: Target) -> bool:
    """Whether a build for `target` has to be a cross build: it is a GPU that this machine does not have."""
    return target.kind == "cuda" and all(gpu.sm != target.sm for gpu in machine.here().gpus)


def is_sources(path: str | Path) -> bool:
    """Whether a path asks for the package of sources."""
    return Path(path).suffix == ".zip"


def require_possible(target: Target, path: str | Path) -> None:
    """Raises TargetError, before any work, where a build for `target` at `path` can not be made here."""
    if target.kind != "cuda" and is_sources(path):
        raise TargetError(
            f"there is no package of sources for {target.name}",
            where=str(path),
            facts="a .zip holds the sources and kernels of a build for a GPU; this target is a CPU",
            do="give a path that ends in .pt2",
        )
    if not wanted(target) and not is_sources(path):
        return
    require_verified(target)
    if target.arch not in ("", "x86_64") and not is_sources(path):
        raise TargetError(
            f"the host of {target.name} is {target.arch}, a .pt2 from here holds code for x86_64",
            where=str(path),
            facts=f"its GPU's kernels can be made here, the library around them has to be compiled on {target.arch}",
            do=f"give a path that ends in .zip, and run `compiled-attn finish` on the {target.name}",
        )


def require_verified(target: Target) -> None:
    """Raises TargetError where this torch, or this host, is none on which cross builds have been verified."""
    release = torch.__version__.split("+")[0]
    if ".".join(release.split(".")[:2]) not in _torch_cross.VERIFIED:
        raise TargetError(
            f"a build for {target.name} with no such GPU is not verified on this torch",
            where=f"target={target.name!r}",
            facts=f"torch is {release}; the patches are verified on {', '.join(_torch_cross.VERIFIED)}",
            do=f"install torch {_torch_cross.VERIFIED[-1]}.*, or build on a machine that has the GPU",
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise TargetError(
            "cross builds are made on Linux on x86-64",
            where=f"target={target.name!r}",
            facts=f"this is {sys.platform} {platform.machine()}, on which none has been verified",
            do="build in a Linux container, or on a machine that has the GPU",
        )
    if target.sm not in _torch_cross.THREADS_PER_MULTIPROCESSOR:
        raise TargetError(
            f"compute capability {target.sm / 10} is not known to cross builds",
            where=f"target={target.name!r}",
            facts=f"known are {', '.join(str(sm / 10) for sm in _torch_cross.THREADS_PER_MULTIPROCESSOR)}",
            do="add its threads per multiprocessor to ir/_torch_cross.py, with the source",
        )


def call_on_cuda(call: Call) -> Call:
    """How a program that was captured on the CPU is called once it runs on the GPU: every tensor lies there."""

    def moved(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(leaf, device="cuda") if hasattr(leaf, "device") else leaf for leaf in leaves)

    return replace(call, inputs=moved(call.inputs), outputs=moved(call.outputs))


@contextmanager
def built(program: Program, call: Call, target: Target, *, sources: bool) -> Iterator[Product]:
    """The child's product for a lowered program; its files go at the end of the block.

    Raises what the child raised, in its four parts, or LowerError where it ended without a word.
    """
    require_verified(target)
    with tempfile.TemporaryDirectory(prefix="compiled_attn-cross-") as name:
        folder = Path(name)
        torch.export.save(flat(program).to_exported(), folder / "program.pt2")
        job = {
            "target": asdict(target),
            "sources": sources,
            "in_tree": call.in_tree,
            "out_tree": call.out_tree,
            "march": MARCH,
            "vector_bits": VECTOR_BITS,
        }
        (folder / "job.json").write_text(json.dumps(job))
        began = time.perf_counter()
        result = _run(folder, target)
        yield Product(
            package=folder / "model.pt2",
            folder=folder / "kernels",
            kernels=tuple(_torch_cross.Kernel(**k) for k in result["kernels"]),
            seconds={**result["seconds"], "child process": time.perf_counter() - began},
            versions=result["versions"],
        )


def flat(program: Program) -> Program:
    """The program called with a flat tuple, so that the child needs none of the user's pytree classes."""
    leaves = tuple(pytree.tree_leaves(program.example_inputs, is_leaf=lambda x: x is None))
    entry = program.call_graph[0]
    _, in_spec = pytree.tree_flatten((leaves, {}))
    _, out_spec = pytree.tree_flatten(tuple(range(program.out_spec.num_leaves)))
    names = [f"input_{i}" for i in range(len(leaves))]
    signature = replace(entry.signature, in_spec=in_spec, out_spec=out_spec, forward_arg_names=names)
    return replace(program, call_graph=(replace(entry, signature=signature),), example_inputs=(leaves, {}))


def _run(folder: Path, target: Target) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # Inductor's workers would be processes without the patches
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("TRITON_INTERPRET", None)
    with open(folder / "log", "wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", CHILD, str(folder)],
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
            text=True,
        )
        try:
            with Stages(len(STAGES)) as stage:
                for line in child.stdout or ():
                    stage(f"{target.name}: {line.strip()}")
            code = child.wait()
        finally:
            _end(child)
    answer = folder / "result.json"
    if answer.exists():
        result: dict[str, Any] = json.loads(answer.read_text())
        if "error" in result:
            raise error_of(result["error"])
        return result
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise LowerError(
        f"the process that builds for {target.name} ended without an answer",
        where=CHILD,
        facts=f"{ended}; last it wrote: {_last_line(folder / 'log')}",
        do="see whether memory ran out; if not, report the model with explain()'s text",
    )


def error_of(record: dict[str, str]) -> CompiledAttnError:
    """The error that `record` of the child describes; of our own kind by its name, else a LowerError."""
    kind = getattr(errors, record["kind"], LowerError)
    return kind(record["what"], where=record["where"], facts=record["facts"], do=record["do"])


def _end(child: subprocess.Popen[str]) -> None:
    """Ends the child, and the compilers that it started, where it still runs."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:300] if lines else "nothing"
