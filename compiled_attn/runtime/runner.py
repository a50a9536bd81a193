"""Builds the C++ runner, which runs artifacts without Python, against the installed torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

from compiled_attn.ir.errors import LowerError

SOURCE = Path(__file__).with_name("cpp")


def build(folder: str | Path, *, jobs: int = 2) -> Path:
    """Builds the runner with CMake in `folder` (made if missing, reused if built before); returns the binary's path.

    It links the libtorch of this torch; a core compiles it in about 40 s. Beside it lies `check`, which checks files
    without libtorch. Raises LowerError where CMake or a compiler is missing, or with the compiler's first complaint.
    """
    folder = Path(folder)
    for tool, why in (("cmake", "builds the runner"), (_compiler(), "compiles it")):
        if tool is None or shutil.which(tool) is None:
            raise LowerError(
                "the C++ runner can not be built",
                where=str(SOURCE),
                facts=f"{tool or 'a C++ compiler (c++, g++ or clang++)'} {why}, and is not on PATH",
                do="install cmake and g++ (Debian: apt-get install cmake g++), then try again",
            )
    options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", "-DCMAKE_BUILD_TYPE=Release"]
    if shutil.which("ninja"):
        options.append("-GNinja")
    _run(["cmake", "-S", str(SOURCE), "-B", str(folder), *options])
    _run(["cmake", "--build", str(folder), "--parallel", str(jobs)])
    return folder / "runner"


def _compiler() -> str | None:
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    complaint = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no output")
    raise LowerError(
        "the C++ runner can not be built",
        where=" ".join(command[:2]),
        facts=complaint[:400],
        do="see the compiler's message; a C++20 compiler is needed (g++ 11 or newer)",
    )
