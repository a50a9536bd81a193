"""`doctor`: what this machine has, one fact a line; each "missing" says what is off and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from compiled_attn.ir import machine, targets
from compiled_attn.ir.errors import LowerError, TargetError
from compiled_attn.runtime import cross_toolchain
from compiled_attn.runtime.measure import cache_folder
from compiled_attn.runtime.report import aligned

TORCH = ((2, 11), (2, 14))  # from, and below
# What works where. Only Linux on x86_64 is what the tests run on.
PLATFORMS = {
    ("Linux", "x86_64"): "everything; the tests run here",
    ("Linux", "aarch64"): "compile, export, load, the C++ runner, CUDA; C++ kernels use NEON; not tested here",
    (
        "Darwin",
        "aarch64",
    ): "compile, export, load in Python on the CPU; C++ kernels use NEON; no CUDA; not tested here",
    ("Darwin", "x86_64"): "nothing: there are no wheels of torch 2.11 or later for it",
    ("Windows", "x86_64"): "capture, passes, explain, ONNX; native code is untried",
}
OMP = '#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'


@dataclass(frozen=True)
class Fact:
    """One line. off: what does not work where it is missing; empty where it is there.  get: how to get it."""

    name: str
    value: str
    off: str = ""
    get: str = ""

    @property
    def there(self) -> bool:
        return not self.off


@dataclass(frozen=True)
class Report:
    """All facts. `ok`: this machine can compile and run models on its CPU."""

    facts: tuple[Fact, ...]

    NEEDED = ("torch", "compiler", "OpenMP", "temporary files")

    @property
    def ok(self) -> bool:
        return all(self[name].there for name in self.NEEDED)

    @property
    def missing(self) -> list[Fact]:
        return [fact for fact in self.facts if not fact.there]

    def __getitem__(self, name: str) -> Fact:
        return next(fact for fact in self.facts if fact.name == name)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def __str__(self) -> str:
        rows = []
        for fact in self.facts:
            rows.append((fact.name, fact.value))
            if not fact.there:
                rows.append((fact.name, f"off: {fact.off}"))
                rows.append((fact.name, f"get: {fact.get}"))
        return aligned(rows)

    def __repr__(self) -> str:
        return str(self)


def doctor() -> Report:
    """Looks at this machine; takes a second or two, since it compiles one small file. Never raises."""
    return Report(
        (
            _platform(),
            _processor(),
            _torch(),
            _python(),
            _compiler(),
            _openmp(),
            _headers(),
            _target(),
            _cuda(),
            _triton(),
            _cross(),
            *_packages(),
            _cmake(),
            _cache(),
            _temporary(),
        )
    )


def _platform() -> Fact:
    here = machine.here()
    works = PLATFORMS.get((here.system, here.arch), "untried")
    return Fact("platform", f"{here.system} {here.arch}: {works}")


def _processor() -> Fact:
    here = machine.here()
    extras = [f for f in ("avx512_bf16", "amx_bf16", "avx512_fp16", "bf16", "sve") if f in here.flags]
    value = f"{here.model}, {here.cores} cores, {here.capability}" + (f" with {', '.join(extras)}" if extras else "")
    if here.capability in ("DEFAULT", "NO AVX"):
        off = "vector code: kernels run on 4 lanes, several times slower"
        return Fact("processor", value, off, "a processor with AVX2, AVX-512, NEON or SVE")
    return Fact("processor", value)


def _torch() -> Fact:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, high = TORCH
    if low <= version < high:
        return Fact("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    wanted = f"torch >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}"
    return Fact("torch", torch.__version__, f"nothing is tested with it, {wanted} is", f"pip install '{wanted}'")


def _python() -> Fact:
    return Fact("python", f"{platform.python_version()} at {sys.executable}")


def compiler() -> str | None:
    """The C++ compiler that Inductor will call: $CXX, else the first of g++, clang++ and c++ on PATH."""
    named = os.environ.get("CXX")
    return next((found for name in (named, "g++", "clang++", "c++") if name and (found := shutil.which(name))), None)


def _compiler() -> Fact:
    found = compiler()
    if found is None:
        off = "compile, export and torch.compile on the CPU; capture, passes, explain and ONNX still work"
        return Fact("compiler", "missing: no g++ or clang++ on PATH, and no $CXX", off, _install("g++"))
    return Fact("compiler", _first_line([found, "--version"]) or found)


def _openmp() -> Fact:
    found = compiler()
    off = "more than one thread in compiled code"
    if found is None:
        return Fact("OpenMP", "missing: there is no compiler", off, _install("g++"))
    apple = platform.system() == "Darwin"
    flags = ["-Xclang", "-fopenmp", "-lomp"] if apple else ["-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "threads.cpp"
        source.write_text(OMP)
        command = [found, str(source), "-shared", "-fPIC", *flags, "-o", str(Path(folder) / "threads.so")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Fact("OpenMP", f"links with {' '.join(flags)}")
    first = next(iter(done.stderr.splitlines()), "the compiler failed")
    get = "brew install libomp" if apple else "apt-get install libgomp1 g++ (or libomp-dev for clang)"
    return Fact("OpenMP", f"missing: {first[:120]}", off, get)


def _headers() -> Fact:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.exists():
        return Fact("Python.h", str(header))
    off = "torch.compile, so the Dynamo backend and mode='train'"
    return Fact("Python.h", f"missing: {header}", off, _install("python3-dev"))


def _target() -> Fact:
    try:
        target = targets.load("auto")
    except TargetError as error:
        return Fact("target", f"missing: {error.what}", "target='auto'", "name a target: compiled_attn.targets.names()")
    return Fact("target", f"auto is {target.name}; known are {', '.join(targets.names())}")


def _cuda() -> Fact:
    gpus = machine.here().gpus
    if gpus:
        version = torch.version.cuda
        names = ", ".join(f"{g.name} (sm_{g.sm}, {g.memory_gib:.0f} GiB)" for g in gpus)
        return Fact("CUDA", f"{names}, torch for CUDA {version}")
    off = "running on a GPU; export and explain for CUDA targets still work"
    if torch.version.cuda is None:
        return Fact(
            "CUDA", "missing: this torch is built for the CPU alone", off, "install torch with CUDA (pytorch.org)"
        )
    return Fact(
        "CUDA", f"missing: torch for CUDA {torch.version.cuda} sees no GPU", off, "an NVIDIA GPU and its driver"
    )


def _triton() -> Fact:
    off = "kernels for CUDA targets, and checking them"
    return _package("triton", "triton", off, "triton")


def _cross() -> Fact:
    """Whether `export` can build for a GPU that is not here."""
    off = "export for a GPU that is not here"
    try:
        folder = cross_toolchain.headers()
    except LowerError:
        return Fact("cross builds", "missing: the CUDA headers' wheels", off, "pip install 'compiled-attn[cross]'")
    return Fact("cross builds", f"CUDA {cross_toolchain.headers_version(folder)} headers, for GPUs that are not here")


def _packages() -> list[Fact]:
    pictures = "reading pictures in `compiled-attn run`"
    return [
        _package("ONNX", "onnx", "export to .onnx", "onnx"),
        _package("onnxscript", "onnxscript", "export to .onnx", "onnx"),
        _package("ONNX Runtime", "onnxruntime", "checking and running .onnx files", "onnx"),
        _package("pillow", "PIL", pictures, "", distribution="pillow"),
    ]


def _package(name: str, module: str, off: str, extra: str, *, distribution: str = "") -> Fact:
    distribution = distribution or module
    if importlib.util.find_spec(module) is None:
        get = f"pip install 'compiled-attn[{extra}]'" if extra else f"pip install {distribution}"
        return Fact(name, "missing", off, get)
    try:
        return Fact(name, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return Fact(name, "there, of unknown version")


def _cmake() -> Fact:
    found = shutil.which("cmake")
    if found is None:
        return Fact("cmake", "missing", "building the C++ runner", _install("cmake"))
    return Fact("cmake", _first_line([found, "--version"]) or found)


def _cache() -> Fact:
    folder = cache_folder()
    above = next(p for p in (folder, *folder.parents) if p.exists())
    if os.access(above, os.W_OK):
        return Fact("cache", str(folder))
    off = "keeping measurements: tune='measure' times the same shapes again in each process"
    return Fact("cache", f"missing: {folder} can not be written", off, "set XDG_CACHE_HOME to a folder of yours")


def _temporary() -> Fact:
    folder = tempfile.gettempdir()
    forbids = hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))
    free = shutil.disk_usage(folder).free / 2**30
    if forbids:
        off = "compile and load: native code in temporary files may not run"
        return Fact("temporary files", f"missing: {folder} is mounted noexec", off, "set TMPDIR to another folder")
    return Fact("temporary files", f"{folder}, {free:.0f} GiB free")


def _install(package: str) -> str:
    if platform.system() == "Darwin":
        return {"g++": "xcode-select --install", "python3-dev": "a Python from python.org"}.get(
            package, f"brew install {package}"
        )
    return f"apt-get install {package} (Debian, Ubuntu), or your system's package of that name"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.splitlines()), "")
