"""What a peer costs beside its speed: compile time cold and warm, start-up of what it wrote, peak memory, size."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, build
from bench.peers import PEERS


def of(case: Case, peer: str) -> dict[str, Any]:
    """What new processes spend.

    compile_cold_s, compile_warm_s: to the first answer, with an empty and with a filled cache; peak_mib of the second.
    artifact_mib, start_s, start_peak_mib: of a process that loads the artifact and answers once.
    """
    from bench.run import child

    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        extra = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "XDG_CACHE_HOME": f"{folder}/xdg"}
        command = ["-m", "bench.costs", json.dumps({"case": case.as_dict(), "peer": peer, "folder": folder})]
        cold = child([*command, "prepare"], case.threads, extra)
        warm = child([*command, "prepare"], case.threads, extra)
        start = child([*command, "start"], case.threads, extra) if peer in STARTS else {}
    found: dict[str, Any] = {}
    for label, got in (("cold", cold), ("warm", warm)):
        if isinstance(got, dict):
            found[f"compile_{label}_s"] = got["seconds"]
            found["peak_mib"] = got["peak_mib"]
    return {**found, **(start if isinstance(start, dict) else {"start_because": start})}


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    case = Case(**job["case"])
    model, x = build(case)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        began = time.perf_counter()
        PEERS[job["peer"]](case, model, x, Path(folder)).call()
        return {"seconds": round(time.perf_counter() - began, 2), "peak_mib": peak_mib()}


def start(job: dict[str, Any], began: float) -> dict[str, Any]:
    """Loads what the peer exports, made here by a child where it is not there yet, and answers once."""
    case, folder = Case(**job["case"]), Path(job["folder"])
    if not (folder / "exported").exists():
        from bench.run import child

        child(["-m", "bench.costs", json.dumps(job), "export"], case.threads)
        fresh = child(["-m", "bench.costs", json.dumps(job), "start"], case.threads)
        return fresh if isinstance(fresh, dict) else {"start_because": fresh}
    path = Path((folder / "exported").read_text())
    STARTS[job["peer"]][1](path, case)
    size = sum(p.stat().st_size for p in path.parent.iterdir() if p.is_file() and p.name != "x.pt")
    return {
        "start_s": round(time.perf_counter() - began, 2),
        "start_peak_mib": peak_mib(),
        "artifact_mib": round(size / 2**20, 1),
    }


def export(job: dict[str, Any]) -> dict[str, Any]:
    case, folder = Case(**job["case"]), Path(job["folder"])
    model, x = build(case)
    place = folder / "artifact"
    place.mkdir()
    torch.save(x, place / "x.pt")
    path = STARTS[job["peer"]][0](case, model, x, place)
    (folder / "exported").write_text(str(path))
    return {}


def _export_ours(case: Case, model: Any, x: torch.Tensor, folder: Path) -> Path:
    import compiled_attn as ca

    path = folder / "model.pt2"
    ca.export(model, (x,), path=path, target="cpu", precision=None if case.precision == "float32" else case.precision)
    return path


def _start_ours(path: Path, _case: Case) -> None:
    import compiled_attn as ca

    ca.load(path)(torch.load(path.with_name("x.pt")))


def _export_onnx(case: Case, model: Any, x: torch.Tensor, folder: Path) -> Path:
    from bench.peers import _onnx_file

    return _onnx_file(case, model, x, folder)


def _start_onnxruntime(path: Path, case: Case) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: torch.load(path.with_name("x.pt")).numpy()})


def _start_openvino(path: Path, case: Case) -> None:
    import openvino as ov

    hint = {"float32": "f32", "bf16": "bf16"}[case.precision]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": case.threads}
    compiled = ov.Core().compile_model(str(path), "CPU", options)
    compiled(torch.load(path.with_name("x.pt")).numpy())


STARTS = {
    "ours": (_export_ours, _start_ours),
    "onnxruntime": (_export_onnx, _start_onnxruntime),
    "openvino": (_export_onnx, _start_openvino),
}


def peak_mib() -> float:
    """Largest resident memory of this process so far (on Linux rusage would count the parent's before the fork)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return round(int(line.split()[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


if __name__ == "__main__":
    BEGAN = time.perf_counter()
    warnings.simplefilter("ignore")
    JOB, WHAT = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(JOB["case"]["threads"])
    with torch.no_grad():
        print(json.dumps({"prepare": prepare, "export": export, "start": lambda j: start(j, BEGAN)}[WHAT](JOB)))
