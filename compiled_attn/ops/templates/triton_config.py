"""What the Triton templates share: the record of a configuration, and what its machine code was measured to need.

`machine_code.json` is written by bench/machine_code.py, which compiles every kernel x configuration x target without a
GPU: registers a thread, bytes spilled a thread, bytes of shared memory a block, keyed by triton version. Only a
configuration that this record says fits a target is offered for it.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = (16, 32, 64, 128, 256)
SM_LEAST = 80  # where Triton's tensor-core products start
REGISTERS_MOST = 255
SPILLS_MOST = 0
RECORD = Path(__file__).with_name("machine_code.json")
KERNELS = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True)
class Config:
    """Compile-time sizes of one launch, and how many warps and pipeline stages it uses."""

    blocks: tuple[tuple[str, int | str], ...]
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments that this configuration sets."""
        return dict(self.blocks)

    @property
    def name(self) -> str:
        """The name under which machine code is recorded: `64x32xieee w4 s2`."""
        sizes = "x".join(str(value) for _, value in self.blocks)
        return f"{sizes} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel needs: registers a thread, bytes spilled a thread, shared bytes a block."""

    registers: int
    spills: int
    shared: int

    def fits(self, shared_limit: int) -> bool:
        """Whether it runs within the limits without spilling."""
        return self.registers <= REGISTERS_MOST and self.spills <= SPILLS_MOST and self.shared <= shared_limit


def unfit(target: Any) -> str | None:
    """Why no Triton kernel of ours runs on a target; None where they do."""
    if target.kind != "cuda":
        return f"target {target.name} has no Triton"
    if target.sm < SM_LEAST:
        return f"target {target.name} is sm_{target.sm}, Triton's tensor-core products start at sm_{SM_LEAST}"
    return None


def unfit_widths(q: torch.Tensor, v: torch.Tensor, widest: int = BLOCKS[-1], beside: str = "") -> str | None:
    """Why an attention kernel does not hold heads of q's and v's last size; `beside` says what narrows `widest`."""
    for name, width in (("head width", q.shape[-1]), ("value width", v.shape[-1])):
        if not isinstance(width, int):
            return f"its {name} {width} is symbolic, the kernel is compiled for one"
        if not 1 <= width <= widest:
            return f"its {name} is {width}, the kernel holds 1 to {widest} in registers{beside}"
    return None


def block_of(width: int) -> int:
    """The power of two, at least 16, that holds a head of `width` (Triton's matrix product takes no less)."""
    return max(BLOCKS[0], 1 << (width - 1).bit_length())


def kind_of(dtype: torch.dtype) -> str:
    """ "fp32", or "half" for both 16-bit types, whose machine code needs the same."""
    return "fp32" if dtype == torch.float32 else "half"


@cache
def recorded() -> dict[str, Any]:
    """kernel -> case -> config -> "sm_80" -> [registers, spills, shared], for the installed triton.

    For the newest triton that was recorded, where none is installed or the installed one has no record.
    """
    record: dict[str, Any] = json.loads(RECORD.read_text())
    versions = sorted(record, key=lambda version: tuple(int(part) for part in version.split(".")))
    try:
        installed = metadata.version("triton").split("+")[0]
    except metadata.PackageNotFoundError:
        installed = versions[-1]
    return record[installed if installed in record else versions[-1]]["kernels"]


def offered(kernel: str, case: str, configs: tuple[Config, ...], target: Any) -> list[Config]:
    """Those of `configs`, in order, whose recorded machine code fits `target`."""
    table = recorded().get(kernel, {}).get(case, {})
    fitting = []
    for config in configs:
        found = table.get(config.name, {}).get(f"sm_{target.sm}")
        if found is not None and MachineCode(*found).fits(target.shared_bytes_per_block):
            fitting.append(config)
    return fitting
