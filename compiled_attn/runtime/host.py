"""The machine as a contract names it: platform, architecture and the instruction sets that compiled code may use."""

from __future__ import annotations

import platform
import sys

from compiled_attn.ir import machine, targets
from compiled_attn.ir.errors import ContractError
from compiled_attn.ir.targets import Target
from compiled_attn.runtime.contract import Needs

# What a compiler told -march=native uses by itself, or Inductor's kernels by intrinsics; names of /proc/cpuinfo.
_X86 = (
    "ssse3 sse4_1 sse4_2 popcnt abm movbe bmi1 bmi2 avx avx2 fma f16c avx_vnni gfni vaes vpclmulqdq avx512f avx512cd "
    "avx512bw avx512dq avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq "
    "avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 amx_fp16"
)
_ARM = "asimd asimdhp asimddp asimdrdm asimdfhm fphp atomics bf16 i8mm sve sve2 svebf16 svei8mm sme sme2"
COMPILED = frozenset(f"{_X86} {_ARM}".split())


# The x86-64 psABI's levels, which compilers know as -march; each includes those before it.
_V2 = {"ssse3", "sse4_1", "sse4_2", "popcnt"}
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}


def needs_of(target: Target) -> Needs:
    """What code needs that was compiled here for `target`, by the rules of `lower.inductor_config`.

    For this machine's own processor that is all it has (-march=native), for a psABI level what the level holds.
    """
    is_native = target.kind == "cuda" or target.march == targets.load("cpu").march
    every = machine.here().flags & COMPILED
    flags = set(every if is_native else LEVELS.get(target.march, every))
    if target.kind == "cuda":
        flags.add(f"sm_{target.sm}")
    return Needs(target.name, target.kind, sys.platform, platform.machine(), tuple(sorted(flags)))


def require_machine(needs: Needs, where: str) -> None:
    """Raises ContractError where this machine is another one than the artifact needs."""
    here, built = f"{sys.platform} {platform.machine()}", f"{needs.platform} {needs.machine}"
    if here != built:
        raise ContractError(
            "the artifact was built for another kind of machine",
            where=where,
            facts=f"built for {built}, this is {here}",
            do="export the model on a machine of this kind",
        )
    found = machine.here()
    missing = [f for f in needs.isa if not f.startswith("sm_") and f not in found.flags]
    if missing:
        raise ContractError(
            "this CPU lacks instructions that the artifact needs",
            where=where,
            facts=f"it needs {', '.join(missing)}",
            do="export the model on a CPU of this kind",
        )
    if needs.device == "cuda":
        _require_gpu(needs, found, where)


def _require_gpu(needs: Needs, found: machine.Machine, where: str) -> None:
    wanted = next((int(f[3:]) for f in needs.isa if f.startswith("sm_") and f[3:].isdigit()), 0)
    if any(g.sm // 10 == wanted // 10 and g.sm >= wanted for g in found.gpus):
        return
    raise ContractError(
        "the artifact needs a GPU that is not here",
        where=where,
        facts=f"it needs compute capability {wanted / 10}; here are {', '.join(g.name for g in found.gpus) or 'none'}",
        do="run it on such a GPU, or export the model for target='cpu'",
    )
