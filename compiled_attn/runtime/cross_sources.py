"""The package of sources: a build for a GPU whose host code is compiled where it will run (Jetson Orin is aarch64).

    contract.json      names, shapes and ranges, and size and SHA-256 of every other file
    CMakeLists.txt     builds libmodel.so against an installed torch and CUDA headers
    model.cpp          AOTInductor's host code;  constants.S, weights.bin: the weights, appended to the library
    metadata.json      AOTInductor's own record
    kernels/*.cubin    machine code that the library loads;  kernels/*.ptx: the same before assembling, by kernel name

`finish` (`compiled-attn finish model.zip -o model.pt2`) does on the target what is left: CMake, then an artifact for
`load` and the C++ runner. Neither has run on a device.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from compiled_attn.ir import targets
from compiled_attn.ir.errors import ContractError, LowerError
from compiled_attn.ir.targets import Target
from compiled_attn.runtime import archive, contract, package
from compiled_attn.runtime.artifact import Artifact, versions_of, write_artifact
from compiled_attn.runtime.contract import CROSS, Call, Contract, MemberSpec, Needs, PassRecord
from compiled_attn.runtime.cross import Product

CONTRACT = "contract.json"
_LOAD = re.compile(r'kernels_\.(\w+) = loadKernel\("([^"]*/)?(\w+\.cubin)"')
_COMMANDS = re.compile(r"^// (Compile|Link) cmd\n// .*\n?", re.M)
CMAKE = """\
# Host code of a compiled_attn model, made for {target} (compute capability {capability}) on a machine without one.
# It has not run on a device. `compiled-attn finish` calls this; by hand:
#   cmake -S . -B build -DTORCH_DIR=$(python -c "import torch; print(torch.__path__[0])") && cmake --build build
cmake_minimum_required(VERSION 3.18)
project(compiled_attn_model LANGUAGES CXX ASM)
set(CMAKE_CXX_STANDARD 20)
set(TORCH_DIR "" CACHE PATH "folder of the installed torch package, release {torch} (the one with include/ and lib/)")
set(CUDA_DIR "/usr/local/cuda" CACHE PATH "CUDA toolkit: include/cuda.h; lib64/libcuda.so or lib64/stubs/libcuda.so")
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
add_library(model SHARED model.cpp constants.S)
target_compile_definitions(model PRIVATE TORCH_INDUCTOR_CPP_WRAPPER STANDALONE_TORCH_HEADER)
target_compile_definitions(model PRIVATE C10_USING_CUSTOM_GENERATED_MACROS USE_MMAP_SELF USE_CUDA)
target_compile_options(model PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O1;-ffp-contract=off;-w>)
target_include_directories(
  model SYSTEM PRIVATE "${{TORCH_DIR}}/include" "${{TORCH_DIR}}/include/torch/csrc/api/include" "${{CUDA_DIR}}/include")
target_link_directories(model PRIVATE "${{TORCH_DIR}}/lib" "${{CUDA_DIR}}/lib64" "${{CUDA_DIR}}/lib64/stubs")
target_link_libraries(model PRIVATE torch torch_cpu torch_cuda cuda)
# The weights follow the library's own bytes, on a page of their own; it finds them from its end.
add_custom_command(
  TARGET model POST_BUILD VERBATIM
  COMMAND sh -c "truncate -s %65536 \\"$1\\" && cat \\"$2\\" >> \\"$1\\"" sh $<TARGET_FILE:model>
          "${{CMAKE_CURRENT_SOURCE_DIR}}/weights.bin")
"""


def write_sources(
    path: str | Path, product: Product, call: Call, target: Target, *, passes: Sequence[PassRecord] = ()
) -> Artifact:
    """Writes the package of sources of what a cross build made. The file appears at once or not at all."""
    path = Path(path)
    files = _files(product, target)
    stated = Contract(
        call=call,
        target=Needs(target.name, "cuda", sys.platform, target.arch or platform.machine(), (f"sm_{target.sm}",), CROSS),
        versions=versions_of(target, product.versions),
        passes=tuple(passes),
        members=tuple(MemberSpec(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in sorted(files.items())),
    )
    text = stated.to_bytes()
    contract.from_bytes(text, str(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as out:
            for name, data in [(CONTRACT, text), *sorted(files.items())]:
                out.writestr(zipfile.ZipInfo(name), data)
        os.replace(partial, path)
    except OSError as error:
        raise ContractError(
            "the package of sources can not be written",
            where=str(path),
            facts=error.strerror or type(error).__name__,
            do="give a path in a folder that exists and can be written to",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    data = path.read_bytes()
    return Artifact(path, hashlib.sha256(data).hexdigest(), len(data), stated)


def finish(source: str | Path, path: str | Path, *, cuda_dir: str | Path | None = None) -> Artifact:
    """On the target's host: compiles a package of sources and writes the artifact that `load` and the runner take.

    cuda_dir: the CUDA toolkit, with include/cuda.h; CUDA_HOME or /usr/local/cuda where it is not given.
    Raises ContractError for a damaged package or another torch or kind of host, LowerError where CMake fails.
    """
    source = Path(source)
    stated, files = read_sources(source)
    _require_host(stated, str(source))
    cuda = Path(cuda_dir or os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    with tempfile.TemporaryDirectory(prefix="compiled_attn-") as name:
        folder = Path(name)
        for member, data in files.items():
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_bytes(data)
        options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DCUDA_DIR={cuda}"]
        _run(["cmake", "-S", str(folder), "-B", str(folder / "build"), *options])
        _run(["cmake", "--build", str(folder / "build")])
        metadata = {**json.loads(files["metadata.json"]), "AOTI_MACHINE": platform.machine()}
        metadata.pop("AOTI_CPU_ISA", None)
        members = {
            "model.wrapper.cpp": files["model.cpp"],
            "model.wrapper_metadata.json": json.dumps(metadata).encode(),
            "model.wrapper.so": (folder / "build" / "libmodel.so").read_bytes(),
            **{Path(n).name: b for n, b in files.items() if n.endswith(".cubin")},
        }
        raw = folder / "raw.pt2"
        with zipfile.ZipFile(raw, "w") as out:
            for member, data in members.items():
                out.writestr(package.FOLDER + member, data)
            out.writestr(archive.ROOT + "archive_format", b"pt2")
            out.writestr(archive.ROOT + "archive_version", b"0")
            out.writestr(archive.ROOT + "byteorder", b"little")
        return write_artifact(
            path,
            raw,
            stated.call,
            targets.load(stated.target.name),
            passes=stated.passes,
            needs=replace(stated.target, machine=platform.machine()),
            versions={k: v for k, v in stated.versions.items() if k not in ("torch", "python", "compiled_attn")},
        )


def read_sources(path: str | Path) -> tuple[Contract, dict[str, bytes]]:
    """A package of sources, every file checked against its contract. Raises ContractError."""
    where = str(path)

    def refuse(what: str, facts: str) -> ContractError:
        return ContractError(what, where=where, facts=facts, do="export the model again, or fetch the file again")

    try:
        with zipfile.ZipFile(path) as found:
            names = found.namelist()
            files = {name: found.read(name) for name in names}
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise refuse("the file is no package of sources", f"{type(error).__name__}: {error}") from None
    if CONTRACT not in files or len(names) != len(files):
        raise refuse("the file is no package of sources", f"it holds no single {CONTRACT}, or a file twice")
    stated = contract.from_bytes(files.pop(CONTRACT), where)
    if sorted(m.name for m in stated.members) != sorted(files):
        differing = sorted({m.name for m in stated.members} ^ set(files))
        raise refuse("the files are not those that the contract names", f"the difference: {', '.join(differing[:3])}")
    for member in stated.members:
        data, parts = files[member.name], Path(member.name).parts
        if ".." in parts or Path(member.name).is_absolute():
            raise refuse("a file has a name that is not allowed", member.name)
        if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
            raise refuse(
                f"file {member.name} is not the one that the contract names",
                f"stated are {member.size} bytes of SHA-256 {member.sha256[:12]}, found {len(data)} others",
            )
    return stated, files


def _require_host(stated: Contract, where: str) -> None:
    built, here = (v.split("+")[0] for v in (stated.versions.get("torch", "nothing"), torch.__version__))
    if built != here:
        raise ContractError(
            "the sources were made with another torch",
            where=where,
            facts=f"made with {built}, this is {here}",
            do=f"install torch=={built}, or export the model again with torch {here}",
        )
    if sys.platform != stated.target.platform:
        raise ContractError(
            "the sources are for another system",
            where=where,
            facts=f"they are for {stated.target.platform}, this is {sys.platform}",
            do=f"finish them on the {stated.target.name}",
        )


def _files(product: Product, target: Target) -> dict[str, bytes]:
    """The package's files by name, from AOTInductor's archive of sources and the kernels beside it."""
    with zipfile.ZipFile(product.package) as raw:
        members = {name.rsplit("/", 1)[-1]: raw.read(name) for name in raw.namelist()}

    def one(suffix: str) -> bytes:
        return next(data for name, data in members.items() if name.endswith(suffix))

    code = one(".wrapper.cpp").decode()
    kernels = {name: cubin for name, _, cubin in _LOAD.findall(code)}
    code = _COMMANDS.sub("", _LOAD.sub(lambda m: f'kernels_.{m[1]} = loadKernel("{m[3]}"', code))
    weights = one("_serialized_weights.bin")
    files = {
        "CMakeLists.txt": CMAKE.format(
            target=target.name, capability=target.sm / 10, torch=torch.__version__.split("+")[0]
        ).encode(),
        "model.cpp": code.encode(),
        "constants.S": _constants(weights).encode(),
        "weights.bin": weights,
        "metadata.json": one(".wrapper_metadata.json"),
    }
    for name, cubin in kernels.items():
        files[f"kernels/{cubin}"] = members[cubin]
        files[f"kernels/{name}.ptx"] = (product.folder / f"{name}.ptx").read_bytes()
    return files


def _constants(weights: bytes) -> str:
    """What the library knows of its weights: their size, and the number that ends them, as the linker sees them."""
    data = len(weights).to_bytes(8, "little") + weights[-8:]
    lines = [
        "# Size of what is appended to the library, and the number that it ends with.",
        '\t.section\t.rodata, "a"',
        "\t.balign 64",
        "\t.globl\t_binary_constants_bin_start",
        "_binary_constants_bin_start:",
        "\t.byte " + ", ".join(map(str, data)),
        "\t.globl\t_binary_constants_bin_end",
        "_binary_constants_bin_end:",
        '\t.section\t.note.GNU-stack, "", %progbits',
    ]
    return "\n".join(lines) + "\n"


def _run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise LowerError(
            "the host code can not be built",
            where=command[0],
            facts="CMake is not on PATH",
            do="install cmake and g++ (Debian: apt-get install cmake g++), then try again",
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise LowerError(
            "the host code can not be built",
            where=" ".join(command[:2]),
            facts=next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no output")[:400],
            do="see the compiler's message; torch's CUDA build and the CUDA toolkit's headers must be there",
        )
