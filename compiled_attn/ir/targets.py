"""Targets: what a program is compiled for. Figures live in targets.toml, `detect` reads the machine."""

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compiled_attn.ir import machine
from compiled_attn.ir.errors import TargetError
from compiled_attn.ir.machine import Gpu, Machine

RIDGE_FLOP_PER_BYTE = (20.0, 700.0)
_FILE = Path(__file__).with_name("targets.toml")


@dataclass(frozen=True)
class Target:
    """A device to compile for. Figures that a kind does not have are 0 or empty.

    kind: "cpu" or "cuda".  CPU: `isa` is "sse4", "avx2", "avx512", "neon" or "sve256", `march` what a compiler is told,
    `needs` the /proc/cpuinfo flags without which code for it does not run; a bf16 figure of 0 says that it has no
    bfloat16 product.  CUDA: `sm` is the compute capability (80 for 8.0), peaks are dense tensor-core peaks.
    Raises TargetError where a figure is missing or the ridge point is implausible and `ridge_because` is empty.
    """

    name: str
    kind: str
    source: str
    memory_gb_per_s: float
    arch: str = ""
    isa: str = ""
    march: str = ""
    needs: tuple[str, ...] = ()
    vector_bits: int = 0
    cores: int = 0
    clock_ghz: float = 0.0
    fp32_flop_per_cycle_per_core: int = 0
    bf16_flop_per_cycle_per_core: int = 0
    core_memory_gb_per_s: float = 0.0
    l1d_kib_per_core: int = 0
    l2_kib_per_core: int = 0
    l3_mib: float = 0.0
    sm: int = 0
    multiprocessors: int = 0
    fp32_tflops: float = 0.0
    tf32_tflops: float = 0.0
    fp16_tflops: float = 0.0
    bf16_tflops: float = 0.0
    memory_gib: float = 0.0
    l2_mib: float = 0.0
    shared_bytes_per_block: int = 0
    ridge_because: str = ""

    def __post_init__(self) -> None:
        wanted = {"cpu": _CPU_FIGURES, "cuda": _CUDA_FIGURES}.get(self.kind)
        if wanted is None:
            raise _bad(self, f"kind is {self.kind!r}, it is one of 'cpu' and 'cuda'")
        missing = [figure for figure in ("source", "memory_gb_per_s", *wanted) if not getattr(self, figure)]
        if missing:
            raise _bad(self, f"a {self.kind} target states {', '.join(missing)}; this one does not")
        low, high = RIDGE_FLOP_PER_BYTE
        if not low <= self.ridge_flop_per_byte <= high and not self.ridge_because:
            raise _bad(
                self,
                f"its ridge point is {self.ridge_flop_per_byte:.1f} flop/byte, devices lie in {low:g}..{high:g}",
            )

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth of the whole device; on a CPU no more than its cores can draw."""
        most = self.memory_gb_per_s
        if self.kind == "cpu":
            most = min(most, self.cores * self.core_memory_gb_per_s)
        return most * 1e9

    def flops_per_second(self, dtype: torch.dtype = torch.float32) -> float:
        """Peak of matrix products on `dtype`; of float32 where the device has none of its own for `dtype`.

        float32 on CUDA means float32 arithmetic, not tf32.
        """
        if self.kind == "cpu":
            per_cycle = self.fp32_flop_per_cycle_per_core
            if dtype == torch.bfloat16:
                per_cycle = self.bf16_flop_per_cycle_per_core or per_cycle
            return self.cores * self.clock_ghz * 1e9 * per_cycle
        peaks = {torch.float16: self.fp16_tflops, torch.bfloat16: self.bf16_tflops}
        return (peaks.get(dtype) or self.fp32_tflops) * 1e12

    @property
    def ridge_flop_per_byte(self) -> float:
        """Work per byte at which arithmetic and memory take equally long: float16 on CUDA, float32 on a CPU."""
        dtype = torch.float16 if self.kind == "cuda" else torch.float32
        return self.flops_per_second(dtype) / self.bytes_per_second

    @property
    def device(self) -> torch.device:
        """Where tensors of a program for this target live."""
        return torch.device(self.kind)


def names() -> tuple[str, ...]:
    """The devices of targets.toml; beside them `load` knows "auto", "cpu" and "cuda", which read this machine."""
    return tuple(_rows())


def load(name: str) -> Target:
    """The target of that name. "auto" is this machine's GPU, or CPU where there is none; "cpu" and "cuda" insist."""
    if name == "auto":
        return detect()
    if name == "cpu":
        return cpu_of(machine.here())
    if name == "cuda":
        gpus = machine.here().gpus
        if not gpus:
            raise _not_here("cuda", "target 'cuda' is the GPU of this machine", machine.here())
        return gpu_of(gpus[0])
    if name not in _rows():
        raise TargetError(
            f"there is no target {name!r}",
            where=f"target={name!r}",
            facts=f"known are auto, cpu, cuda, {', '.join(names())}",
            do="choose one of these, or add a row to targets.toml with its source",
        )
    return _rows()[name]


def detect() -> Target:
    """This machine's first GPU, or its CPU where it has none."""
    found = machine.here()
    return gpu_of(found.gpus[0]) if found.gpus else cpu_of(found)


def cpu_of(found: Machine) -> Target:
    """The row that fits a machine's processor, with the machine's own cores, caches and memory."""
    row = _rows()[_cpu_row(found)]
    ours = f"{found.model}, {found.cores} of the {row.cores} cores that the row describes"
    return replace(
        row,
        cores=found.cores,
        l1d_kib_per_core=found.l1d_kib or row.l1d_kib_per_core,
        l2_kib_per_core=found.l2_kib or row.l2_kib_per_core,
        l3_mib=found.l3_mib or row.l3_mib,
        memory_gib=found.memory_gib,
        source=f"cores, caches and memory read from this machine ({ours}); else {row.source}",
        ridge_because=row.ridge_because or f"a part of a socket: {ours}",
    )


def gpu_of(gpu: Gpu) -> Target:
    """The row of a GPU by its name, else the row of the same compute capability, which its source then says."""
    name = gpu.name.lower().replace(" ", "")
    rows = [row for row in _rows().values() if row.kind == "cuda" and row.sm == gpu.sm]
    # longest first: "a100" before "a10"
    for row in sorted(rows, key=lambda row: -len(row.name)):
        if row.name in name:
            return replace(row, multiprocessors=gpu.multiprocessors, memory_gib=gpu.memory_gib)
    if not rows:
        raise TargetError(
            f"no row of targets.toml describes {gpu.name}",
            where=f"compute capability {gpu.sm // 10}.{gpu.sm % 10}",
            facts=f"rows have sm {', '.join(str(sm) for sm in sorted({r.sm for r in _rows().values() if r.sm}))}",
            do="add a row for it to targets.toml, or choose target='cpu'",
        )
    return replace(
        rows[0],
        multiprocessors=gpu.multiprocessors,
        memory_gib=gpu.memory_gib,
        source=f"this GPU is {gpu.name}; figures of {rows[0].name}, which has its compute capability: {rows[0].source}",
    )


def require_here(target: Target) -> None:
    """Raises TargetError, naming what is there, where code for `target` can't run on this machine."""
    found = machine.here()
    if target.kind == "cuda":
        if all(gpu.sm != target.sm for gpu in found.gpus):
            raise _not_here(target.name, f"{target.name} needs a GPU of compute capability {target.sm / 10}", found)
    elif target.arch != found.arch:
        raise _not_here(target.name, f"{target.name} is {target.arch}", found)
    else:
        missing = [flag for flag in target.needs if flag not in found.flags]
        if missing:
            raise _not_here(target.name, f"{target.name} needs {', '.join(missing)}", found)


def _cpu_row(found: Machine) -> str:
    flags = found.flags
    if found.arch == "aarch64":
        if found.system == "Darwin":
            return "apple-m1"
        return "graviton3" if {"sve", "bf16"} <= flags else "aarch64"
    if "amx_bf16" in flags:
        return "spr"
    if found.vendor == "AuthenticAMD" and "avx512_bf16" in flags:
        return "zen5" if found.family >= 26 else "zen4"
    by_flags = (name for name in ("x86-64-v4", "x86-64-v3") if flags.issuperset(_rows()[name].needs))
    return next(by_flags, "x86-64-v2")


@cache
def _rows() -> dict[str, Target]:
    with _FILE.open("rb") as file:
        return {name: _row(name, row) for name, row in tomllib.load(file).items()}


def _row(name: str, row: dict[str, Any]) -> Target:
    unknown = set(row) - set(Target.__dataclass_fields__)
    if unknown:
        raise TargetError(
            f"target {name} states figures that no target has",
            where=f"{_FILE.name}, table [{name}]",
            facts=f"unknown: {', '.join(sorted(unknown))}",
            do="name each figure as a field of Target, unit included",
        )
    figures: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Target(name=name, **figures)


def _bad(target: Target, facts: str) -> TargetError:
    return TargetError(
        f"target {target.name} does not describe a device",
        where=f"{_FILE.name}, table [{target.name}]",
        facts=facts,
        do="correct the figure, or say why it is so in ridge_because",
    )


def _not_here(name: str, wanted: str, found: Machine) -> TargetError:
    gpus = ", ".join(f"{gpu.name} (compute capability {gpu.sm / 10})" for gpu in found.gpus) or "no GPU"
    return TargetError(
        f"target {name} is not at hand",
        where=f"target={name!r}",
        facts=f"{wanted}; here are {gpus} and {found.model} ({found.arch}, {found.capability})",
        do=f"use target='auto' to run here; without the device export(..., target={name!r}) writes a package for it, "
        f"and explain (compiled-attn explain NAME --target {name}) tells choices, machine code and the roof",
    )


_CPU_FIGURES = (
    "arch",
    "isa",
    "march",
    "needs",
    "vector_bits",
    "cores",
    "clock_ghz",
    "fp32_flop_per_cycle_per_core",
    "core_memory_gb_per_s",
    "l1d_kib_per_core",
    "l2_kib_per_core",
)
_CUDA_FIGURES = (
    "sm",
    "multiprocessors",
    "fp32_tflops",
    "fp16_tflops",
    "memory_gib",
    "l2_mib",
    "shared_bytes_per_block",
)
