"""CUDA code on a machine without CUDA: generated in one child process, run on CPU tensors in another.

Generating needs a process in which Triton compiles and the device is faked; running, one in which Triton interprets.
Many cases share a pair of children, because starting one costs more than most cases.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cross.child import ROOT, environment


@dataclass(frozen=True)
class Emulated:
    """One case on one target. found: the outputs of the CUDA code; wanted: eager's.

    templates: those that lowering chose; kernels: name -> [launches, programs] that ran; failure: a traceback, where
    either child could not go on.
    """

    name: str
    found: list[torch.Tensor]
    wanted: list[torch.Tensor]
    templates: tuple[str, ...]
    kernels: dict[str, list[int]]
    failure: str | None

    def missing(self) -> set[str]:
        """Kernels of the chosen templates that did not run."""
        return {kernel for template in self.templates for kernel in kernels_of(template)} - self.kernels.keys()


def kernels_of(template: str) -> set[str]:
    """Names of a Triton template's kernels: its module's constants whose name ends in KERNEL."""
    module = importlib.import_module(f"compiled_attn.ops.templates.{template}")
    names = {value for name, value in vars(module).items() if name.endswith("KERNEL")}
    if not names:
        raise AssertionError(f"{module.__name__} states no kernel: give it KERNEL = <name of its @triton.jit function>")
    return names


def generate(
    folder: Path, names: Iterable[str], target: str, *, dynamic: bool = False, precision: str = "float32"
) -> None:
    """Writes each case's CUDA code into a folder of its own."""
    batch = "dynamic" if dynamic else "static"
    places = [folder / name for name in names]
    for place in places:
        place.mkdir(parents=True)
    _children("emulate_generate", (target, batch, precision), places, "call.pt", TRITON_INTERPRET="0")


def interpret(folder: Path, *, every: bool = False) -> None:
    """Runs what `generate` wrote. every: all candidates of an autotuned kernel, not only that with fewest programs."""
    places = sorted(path.parent for path in folder.glob("*/call.pt"))
    candidates = "every" if every else "first"
    cache = str(folder / "inductor")
    _children(
        "emulate_interpret", (candidates,), places, "found.pt", TRITON_INTERPRET="1", TORCHINDUCTOR_CACHE_DIR=cache
    )


def read(folder: Path, name: str) -> Emulated:
    """The outcome of one case."""
    place = folder / name
    call: dict[str, Any] = _load(place / "call.pt")
    found: dict[str, Any] = _load(place / "found.pt")
    failure = place / "failure.txt"
    return Emulated(
        name,
        found.get("outputs", []),
        call.get("wanted", []),
        tuple(call.get("templates", ())),
        found.get("kernels", {}),
        failure.read_text() if failure.exists() else None,
    )


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path) if path.exists() else {}


def _children(script: str, options: tuple[str, ...], places: list[Path], answer: str, **more: str) -> None:
    """Runs the script over the places until each holds its answer or a failure; one that ends a child is a failure."""
    env = environment(TORCHINDUCTOR_COMPILE_THREADS="1", **more)
    env["PYTHONPATH"] = ":".join(str(path) for path in (ROOT, ROOT / "tests", ROOT / "tests" / "cross"))
    command = [sys.executable, str(ROOT / "tests" / "cross" / f"{script}.py"), *options]
    waiting = places
    while waiting:
        told = [*command, *map(str, waiting)]
        done = subprocess.run(told, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        waiting = [p for p in waiting if not (p / answer).exists() and not (p / "failure.txt").exists()]
        if waiting:
            said = f"{script} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            (waiting.pop(0) / "failure.txt").write_text(said)
