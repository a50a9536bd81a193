"""What a host compiler needs to build for CUDA on a machine without it: headers from wheels, and stubs to link against.

The headers are those of the wheels nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl (`pip install
'compiled-attn[cross]'`). The stub of libcuda.so.1, and on torch's CPU build the one of libtorch_cuda.so, define the
names that the headers declare, so that the linker records both libraries as needed; the real ones take their place on
the target. A third library gives torch's CPU build a device guard for CUDA that does nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import torch

from compiled_attn.ir.errors import LowerError

TORCH = Path(torch.__file__).parent
SHIMS = TORCH / "include" / "torch" / "csrc" / "inductor" / "aoti_torch"
DRIVER = (
    "cuGetErrorString cuModuleLoad cuModuleLoadData cuModuleUnload cuModuleGetFunction cuFuncSetAttribute "
    "cuFuncGetAttribute cuLaunchKernel cuLaunchKernelEx cuGetErrorName cuTensorMapEncodeTiled cuInit cuDeviceGet "
    "cuCtxGetCurrent cuDevicePrimaryCtxRetain cuCtxSetCurrent"
)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct NoDevice final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
};
extern "C" void install() {
  if (!impl::hasDeviceGuardImpl(DeviceType::CUDA)) {
    impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new NoDevice());
  }
}
"""


def headers() -> Path:
    """Folder of the wheels' headers. Raises LowerError where it is not installed or not whole."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec is not None else []
    wanted = ("cuda.h", "crt/host_defines.h", "nv/target")
    for folder in sorted(found for root in roots for found in root.glob("cu*/include")):
        if all((folder / name).exists() for name in wanted):
            return folder
    raise LowerError(
        "the CUDA headers for the host code are not installed",
        where="nvidia-cuda-runtime, nvidia-cuda-crt, nvidia-cuda-cccl",
        facts=f"AOTInductor's host code includes {', '.join(wanted)}; no installed wheel holds all of them",
        do="pip install 'compiled-attn[cross]' (26 MB; no driver, no GPU and no nvcc is needed)",
    )


def headers_version(folder: Path) -> str:
    """The CUDA version of the headers, as 13.3."""
    found = re.search(r"#define CUDA_VERSION (\d+)", (folder / "cuda.h").read_text(errors="replace"))
    number = int(found[1]) if found else 0
    return f"{number // 1000}.{number % 1000 // 10}"


def shim_names() -> set[str]:
    """The functions that libtorch_cuda.so offers to compiled models, by torch's own headers."""
    text = (SHIMS / "generated" / "c_shim_cuda.h").read_text()
    names = set(re.findall(r"\b(aoti_torch_cuda_\w+)\(", text))
    names |= set(re.findall(r"\b(aoti_torch_\w*cuda\w*)\(", (SHIMS / "c" / "shim.h").read_text()))
    return names


def prepare(folder: Path) -> Path:
    """A toolkit in `folder` (reused if whole): include/ and lib64/ as CUDA_HOME has them. Returns it."""
    include, lib = folder / "include", folder / "lib64"
    done = folder / "complete"
    if done.exists():
        return folder
    lib.mkdir(parents=True, exist_ok=True)
    if not include.exists():
        include.symlink_to(headers(), target_is_directory=True)
    _stub(lib / "libcuda.so", "libcuda.so.1", DRIVER.split())
    if not (TORCH / "lib" / "libtorch_cuda.so").exists():
        _stub(lib / "libtorch_cuda.so", "libtorch_cuda.so", sorted(shim_names()))
        build_guard(folder)
    done.touch()
    return folder


def build_guard(folder: Path) -> None:
    """The device guard for CUDA, for torch's CPU build; needs no header of CUDA. Again is free."""
    library = folder / "libguard.so"
    if library.exists():
        return
    source = folder / "guard.cpp"
    source.write_text(GUARD)
    wanted = ["-std=c++20", "-O1", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10"]
    _compile([str(source), *wanted, "-o", str(library)])


def install_guard(folder: Path) -> None:
    """Gives torch's CPU build a device guard for CUDA; the CUDA build has one of its own."""
    library = folder / "libguard.so"
    if library.exists():
        ctypes.CDLL(str(library)).install()


def _stub(path: Path, soname: str, names: list[str]) -> None:
    source = path.with_suffix(".c")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    _compile(["-xc", str(source), f"-Wl,-soname,{soname}", "-o", str(path)])


def _compile(arguments: list[str]) -> None:
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise LowerError(
            "there is no C++ compiler for the host code",
            where="PATH",
            facts="neither g++, c++ nor clang++ is on it",
            do="install one (Debian: apt-get install g++), then try again",
        )
    done = subprocess.run([compiler, "-shared", "-fPIC", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LowerError(
            "a stub library for the host code can not be built",
            where=" ".join(arguments[-1:]),
            facts=next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300]),
            do="check the compiler with compiled_attn.doctor()",
        )
