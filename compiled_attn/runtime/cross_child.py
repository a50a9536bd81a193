"""The child process of runtime/cross: reads a job's folder, compiles under the patches, writes an answer beside.

    python -m compiled_attn.runtime.cross_child FOLDER

FOLDER holds program.pt2 (torch.export's) and job.json. The answer is result.json, with model.pt2 and kernels/ or with
an error in four parts. A line on stdout names each stage as it begins. Its stdin is held by the parent; where that
ends, so does this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compiled_attn.ir import _torch_cross, _torch_mends
from compiled_attn.ir.errors import CompiledAttnError, LowerError
from compiled_attn.ir.targets import Target
from compiled_attn.runtime import cross_toolchain, launch
from compiled_attn.runtime.cross import STAGES
from compiled_attn.runtime.measure import cache_folder


def main() -> None:
    folder = Path(sys.argv[1])
    stages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever compilers print belongs to the log
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = compile_job(folder, lambda name: print(name, file=stages, flush=True))
    except CompiledAttnError as error:
        answer = {"error": _record(error)}
    except Exception as error:
        answer = {"error": _record(_worded(error, folder))}
        import traceback

        traceback.print_exc()
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(answer))
    partial.rename(folder / "result.json")
    stages.close()
    sys.stderr.flush()
    os._exit(0)  # torch's own clean-up would look for the device


def compile_job(folder: Path, stage: Any) -> dict[str, Any]:
    """Compiles the job in `folder`; returns kernels, seconds and versions."""
    job = json.loads((folder / "job.json").read_text())
    figures: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job["target"].items()}
    target = Target(**figures)
    _require_fit(target)
    stage(STAGES[0])
    began = time.perf_counter()
    _own_cache()
    _torch_mends.mend()
    launch.register()
    toolkit = cross_toolchain.prepare(_cache() / f"toolkit-{torch.__version__}")
    exported = torch.export.load(folder / "program.pt2")
    cross_toolchain.install_guard(toolkit)
    _use_toolkit(toolkit)
    loaded = time.perf_counter()
    stage(STAGES[1])
    options = _options(job, sources=job["sources"])
    with _torch_cross.patched(target) as cross:
        moved = _torch_cross.to_cuda(exported, cross)
        _torch_cross.compile_package(moved, str(folder / "model.pt2"), options, job["in_tree"], job["out_tree"])
        kernels = [asdict(kernel) for kernel in cross.kernels]
    _write_code(folder / "kernels", cross)
    done = time.perf_counter()
    return {
        "kernels": kernels,
        "seconds": {"load": loaded - began, "inductor": done - loaded},
        "versions": {
            "cuda headers": cross_toolchain.headers_version(cross_toolchain.headers()),
            "triton": metadata.version("triton"),
        },
    }


def _require_fit(target: Target) -> None:
    unfit = _torch_cross.misfits()
    if unfit:
        raise LowerError(
            f"the patches for a build with no {target.name} do not fit this torch",
            where="ir/_torch_cross.py",
            facts=f"torch {torch.__version__}: {unfit[0]}",
            do=f"install torch {_torch_cross.VERIFIED[-1]}.*, or build on a machine that has the GPU",
        )


def _options(job: dict[str, Any], *, sources: bool) -> dict[str, Any]:
    """Inductor's options: host code for a plain x86-64, weights in the file, kernels as cubins beside the library."""
    options: dict[str, Any] = {
        "cpp.march": job["march"],
        "cpp.simdlen": job["vector_bits"],
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.embed_kernel_binary": False,
        "aot_inductor.precompile_headers": False,  # a first build is 10 s shorter without, later ones 4 s longer
        "aot_inductor.emit_multi_arch_kernel": False,
    }
    if sources:
        options |= {
            "aot_inductor.package_cpp_only": True,
            "aot_inductor.force_mmap_weights": True,
            "cpp.simdlen": 1,  # plain loops: the host is another processor
        }
    return options


def _cache() -> Path:
    """Where cross builds keep what the next one can use; apart from Inductor's own cache, which knows no target."""
    return cache_folder() / "cross"


def _own_cache() -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_cache() / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(_cache() / "triton")


def _use_toolkit(toolkit: Path) -> None:
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit)
    os.environ["CPATH"] = os.pathsep.join([str(toolkit / "include"), *filter(None, [os.environ.get("CPATH")])])
    os.environ["LIBRARY_PATH"] = os.pathsep.join(
        [str(toolkit / "lib64"), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    )


def _write_code(folder: Path, cross: _torch_cross.Cross) -> None:
    folder.mkdir()
    for name, code in cross.code.items():
        for suffix, data in code.items():
            (folder / f"{name}.{suffix}").write_bytes(data)


def _record(error: CompiledAttnError) -> dict[str, str]:
    return {"kind": type(error).__name__, **{k: getattr(error, k) for k in ("what", "where", "facts", "do")}}


def _worded(error: Exception, folder: Path) -> LowerError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaint = next((line for line in lines if " error: " in line), lines[0] if lines else "")
    target = json.loads((folder / "job.json").read_text())["target"]["name"]
    return LowerError(
        f"Inductor could not build for {target}, which is not here",
        where=complaint[:400],
        facts=f"{type(error).__name__} in the process that carries the patches",
        do="run compiled_attn.doctor(); if it finds nothing amiss, report the model with explain()'s text",
    )


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
