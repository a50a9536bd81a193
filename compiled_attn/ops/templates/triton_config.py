"""What the Triton templates share: the record of a configuration, and what its machine code was measured to need.

`machine_code.json` is written by bench/machine_code.py, which compiles every kernel x configuration x target without a
GPU: registers a thread, bytes spilled, bytes of shared memory, keyed by triton version. A configuration is offered for
a target only where that record says that it fits.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compiled_attn.ir.errors import TargetError

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
REGISTERS_MOST = 255
RECORD = Path(__file__).with_name("machine_code.json")


@dataclass(frozen=True)
class Config:
    """Compile-time sizes of one launch, and how many warps and pipeline stages it uses."""

    blocks: tuple[tuple[str, int | str], ...]
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int | str]:
        """The kernel's compile-time arguments that this configuration sets."""
        return dict(self.blocks)

    @property
    def name(self) -> str:
        sizes = "x".join(str(value) for _, value in self.blocks)
        return f"{sizes} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel needs: registers a thread, spilled bytes a thread, shared bytes a block."""

    registers: int
    spills: int
    shared: int


def block_of(width: int) -> int:
    """The power of two, at least 16, that holds a head of `width` (Triton's matrix product takes no less)."""
    return max(16, 1 << (width - 1).bit_length())


@cache
def recorded(triton_version: str | None = None) -> dict[str, Any]:
    """kernel -> case -> config -> "sm_80" -> [registers, spills, shared]; of the newest version where none is named."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    versions = sorted(record, key=lambda version: tuple(int(part) for part in version.split(".")))
    return record[triton_version if triton_version in record else versions[-1]]


def offered(
    kernel: str,
    case: str,
    configs: tuple[Config, ...],
    sm: int,
    shared_limit: int,
    *,
    triton_version: str | None = None,
) -> list[Config]:
    """Those of `configs`, in order, that fit compute capability `sm`: no spills, within registers and shared memory.

    Raises TargetError where the record holds no such case or none fits.
    """
    table = recorded(triton_version).get(kernel, {}).get(case, {})
    fitting = []
    for config in configs:
        found = table.get(config.name, {}).get(f"sm_{sm}")
        if found is not None:
            code = MachineCode(*found)
            if code.registers <= REGISTERS_MOST and code.spills == 0 and code.shared <= shared_limit:
                fitting.append(config)
    if not fitting:
        raise TargetError(
            f"no configuration of the Triton kernel {kernel} fits this target",
            where=f"{kernel}, case {case}",
            facts=f"sm_{sm} allows {shared_limit} bytes of shared memory a block; {len(table)} configurations recorded",
            do="run bench/machine_code.py to record this case, or choose another target",
        )
    return fitting
