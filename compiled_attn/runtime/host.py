"""The machine as a contract names it: platform, architecture and the instruction sets that compiled code may use."""

from __future__ import annotations

import platform
import sys

from compiled_attn.ir import machine, targets
from compiled_attn.ir.errors import ContractError
from compiled_attn.ir.targets import Target
from compiled_attn.runtime.contract import NATIVE, Needs

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


def needs_of(target: Target, *, host_march: str = "", origin: str = NATIVE) -> Needs:
    """What code needs that was compiled here for `target`, by the rules of `lower.inductor_config`.

    For this machine's own processor that is all it has (-march=native), for a psABI level what the level holds.
    host_march: for a GPU target, the psABI level of its host code; this machine's own processor where it is not given.
    """
    march = host_march or target.march
    is_native = not march if target.kind == "cuda" else march == targets.load("cpu").march
    every = machine.here().flags & COMPILED
    flags = set(every if is_native else LEVELS.get(march, every))
    if target.kind == "cuda":
        flags.add(f"sm_{target.sm}")
    return Needs(target.name, target.kind, sys.platform, platform.machine(), tuple(sorted(flags)), origin)


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
    missing = _missing(needs)
    if missing:
        raise ContractError(
            "this CPU lacks instructions that the artifact needs",
            where=where,
            facts=f"it needs {', '.join(missing)}",
            do="export the model on a CPU of this kind",
        )
    if needs.device == "cuda":
        _require_gpu(needs, found, where)


def lacks(needs: Needs) -> str | None:
    """None where this host's system and processor run the artifact's host code, else the reason as half a sentence."""
    here, built = f"{sys.platform} {platform.machine()}", f"{needs.platform} {needs.machine}"
    if here != built:
        return f"it is for {built}, this is {here}"
    missing = _missing(needs)
    return f"this CPU lacks {', '.join(missing)}" if missing else None


def _missing(needs: Needs) -> list[str]:
    flags = machine.here().flags
    return [f for f in needs.isa if not f.startswith("sm_") and f not in flags]


def capability_of(needs: Needs) -> int:
    """The compute capability that the artifact's machine code is for (80 for 8.0); 0 where it names none."""
    return next((int(f[3:]) for f in needs.isa if f.startswith("sm_") and f[3:].isdigit()), 0)


def _require_gpu(needs: Needs, found: machine.Machine, where: str) -> None:
    wanted = capability_of(needs)
    if any(gpu.sm == wanted for gpu in found.gpus):
        return
    gpus = ", ".join(f"{gpu.name} (compute capability {gpu.sm / 10})" for gpu in found.gpus)
    raise ContractError(
        "the artifact needs a GPU that is not here",
        where=where,
        facts=f"it is for {needs.name}, compute capability {wanted / 10}; here {f'is {gpus}' if gpus else 'is no GPU'}",
        do="run it on such a GPU, or export the model for what is here (target='auto')",
    )


def require_device(needs: Needs, index: int, where: str) -> None:
    """Raises ContractError where the GPU of that index is another one than the artifact's machine code is for.

    Its kernels' shared memory was chosen for that GPU, so a close relative that could run the code is refused as well.
    """
    gpus, wanted = machine.here().gpus, capability_of(needs)
    if index < len(gpus) and gpus[index].sm == wanted:
        return
    there = f"{gpus[index].name} (compute capability {gpus[index].sm / 10})" if index < len(gpus) else "not there"
    raise ContractError(
        "the artifact was built for another GPU",
        where=where,
        facts=f"it is for {needs.name}, compute capability {wanted / 10}; cuda:{index} is {there}",
        do="give device= a GPU of that kind, or export the model for this one",
    )
