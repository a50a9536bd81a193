"""What this machine is: processor, instruction set, cores, caches, memory, GPUs (for `target="auto"` and `doctor`)."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# What torch's capability implies where the system lists no flags (macOS and Windows).
_IMPLIED = {
    "AVX512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2"),
    "AVX2": ("avx2", "fma", "f16c", "bmi2"),
    "SVE256": ("asimd", "sve"),
}


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, compute capability (80 for 8.0), multiprocessors and memory."""

    name: str
    sm: int
    multiprocessors: int
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """This machine. A cache size that the system does not tell is 0.

    capability: what torch's kernels use ("AVX512", "AVX2", "DEFAULT", "SVE256").  flags: instruction-set extensions by
    their Linux names.  cores: physical cores that this process may run on.
    """

    system: str
    arch: str
    model: str
    vendor: str
    family: int
    capability: str
    flags: frozenset[str]
    cores: int
    threads: int
    l1d_kib: int
    l2_kib: int
    l3_mib: float
    memory_gib: float
    gpus: tuple[Gpu, ...]


@cache
def here() -> Machine:
    """The machine that this process runs on, read once."""
    info = _cpuinfo()
    capability = torch.backends.cpu.get_cpu_capability()
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    flags = frozenset((info.get("flags") or info.get("Features") or "").split())
    if not flags:
        base = ("asimd",) if arch == "aarch64" else ("sse4_2", "ssse3", "popcnt")
        flags = frozenset(base + _IMPLIED.get(capability, ()))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=platform.system(),
        arch=arch,
        model=info.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or arch,
        vendor=info.get("vendor_id", ""),
        family=int(info.get("cpu family", "0")),
        capability=capability,
        flags=flags,
        cores=_cores(threads),
        threads=threads,
        l1d_kib=_cache_kib(1) or int(_sysctl("hw.l1dcachesize") or 0) // 1024,
        l2_kib=_cache_kib(2) or int(_sysctl("hw.l2cachesize") or 0) // 1024,
        l3_mib=_cache_kib(3) / 1024,
        memory_gib=_memory_gib(),
        gpus=_gpus(),
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def _cores(threads: int) -> int:
    """Physical cores among the processors that this process may use; every thread counts where it can't be told."""
    if platform.system() != "Linux":
        return int(_sysctl("hw.physicalcpu") or threads)
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return len(siblings)


def _cache_kib(level: int) -> int:
    """Size of the first processor's data or unified cache of a level; 0 where the system does not tell."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        is_data = (index / "type").read_text().strip() in ("Data", "Unified")
        if is_data and (index / "level").read_text().strip() == str(level):
            found = re.fullmatch(r"(\d+)([KM])", (index / "size").read_text().strip())
            return int(found[1]) * (1024 if found[2] == "M" else 1) if found else 0
    return 0


def _memory_gib() -> float:
    path = Path("/proc/meminfo")
    if path.exists():
        found = re.search(r"MemTotal:\s+(\d+) kB", path.read_text())
        return int(found[1]) / 2**20 if found else 0.0
    return int(_sysctl("hw.memsize") or 0) / 2**30


def _sysctl(name: str) -> str:
    """A macOS system value; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        sm = device.major * 10 + device.minor
        found.append(Gpu(device.name, sm, device.multi_processor_count, device.total_memory / 2**30))
    return tuple(found)
