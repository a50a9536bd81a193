"""Builds models for GPUs that are not here and writes seconds, sizes and what was checked. Nothing runs on a device.

    python -m bench.cross_table                                    # every model and target of the table
    python -m bench.cross_table --model deit_s --target a100 h100  # some of them

Each build is a line of bench/results/cross-compiled/table.jsonl, made once (--again makes it anew); table.md is written
from all lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import cases
from bench.cross_checks import check, weights_of
from compiled_attn import passes, zoo
from compiled_attn.ir import targets
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.runtime.build import Settings, prepare
from compiled_attn.runtime.export import export_build

OUT = Path(__file__).parent / "results" / "cross-compiled"
MODELS = ("deit_s", "deit_s_keep_0.7", "evit_s", "vit_tiny", "swin_tiny", "convnext_tiny")
TIMM = {
    "vit_tiny": "vit_tiny_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "convnext_tiny": "convnext_tiny",
}
TARGETS = ("a100", "h100", "l4", "orin")
SOURCES_ONLY = ("orin",)
KEY = ("model", "target", "precision", "batch")


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.cross_table", description=str(__doc__).splitlines()[0])
    p.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--target", nargs="+", default=list(TARGETS))
    p.add_argument("--precision", nargs="+", choices=["float32", "fp16", "bf16"], default=["float32", "fp16", "bf16"])
    p.add_argument("--batch", nargs="+", choices=["1", "dynamic"], default=["1", "dynamic"])
    p.add_argument("--again", action="store_true", help="build anew what the table holds already")
    p.add_argument("--out", type=Path, default=OUT)
    options = p.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "table.jsonl"
    records = {_key(r): r for r in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    wanted = [
        {"model": m, "target": t, "precision": p, "batch": b}
        for b in options.batch
        for p in options.precision
        for m in options.model
        for t in options.target
    ]
    failed = 0
    for number, job in enumerate(wanted):
        if _key(job) in records and not options.again:
            continue
        print(f"[{number + 1}/{len(wanted)}] {' '.join(job.values())}", file=sys.stderr, flush=True)
        record = build(job)
        failed += bool(record["problems"])
        records[_key(job)] = record
        ordered = [records[k] for k in sorted(records)]
        lines.write_text("".join(json.dumps(r) + "\n" for r in ordered))
        (options.out / "table.md").write_text(table(ordered))
    return 1 if failed else 0


def build(job: dict[str, str]) -> dict[str, Any]:
    """One build, checked. seconds: capture and passes, Inductor in the child, and everything."""
    model, shape, named = model_of(job["model"])
    dynamic = job["batch"] == "dynamic"
    x = torch.randn(2 if dynamic else 1, *shape)
    shapes = ({0: "batch"},) if dynamic else None
    settings = Settings.of(job["target"], precision=job["precision"], dynamic_shapes=shapes, passes=named)
    began = time.perf_counter()
    suffix = ".zip" if job["target"] in SOURCES_ONLY else ".pt2"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        try:
            made = prepare(model, (x,), None, settings)
            artifact = export_build(made, path)
        except CompiledAttnError as error:
            return {**job, "problems": [str(error)], "machine": _machine()}
        seconds = time.perf_counter() - began
        found = check(path, targets.load(job["target"]).sm, weights_of(made.program))
    fused = [note.what for note in made.notes.done if note.rule == "fused attention"]
    return {
        **job,
        "product": "sources" if suffix == ".zip" else "pt2",
        "seconds": round(seconds, 1),
        "inductor_seconds": round(made.seconds["inductor"], 1),
        "megabytes": round(artifact.size / 1e6, 1),
        "fused_attention": {name: fused.count(name) for name in sorted(set(fused))},
        **vars(found),
        "machine": _machine(),
    }


def model_of(name: str) -> tuple[nn.Module, tuple[int, ...], tuple[Any, ...]]:
    """The model in eval mode with random weights, the shape of a picture, and the passes named beside the default."""
    torch.manual_seed(0)
    if name in TIMM:
        model, x = cases.build(cases.Case(f"timm:{TIMM[name]}", 1))
        return model, tuple(x.shape[1:]), ()
    if name == "evit_s":
        return zoo.create("evit", "evit_s_k07_fuse").eval(), (3, 224, 224), ()
    named = (passes.ReorganizeTokens(keep_rate=0.7, at=(3, 6, 9)),) if name.endswith("keep_0.7") else ()
    return zoo.create("deit", "deit_s").eval(), (3, 224, 224), named


def table(records: list[dict[str, Any]]) -> str:
    """All builds as Markdown."""
    head = (
        "# Cross builds: seconds, sizes, and what was checked\n\n"
        "Made on a machine with no GPU. Nothing in this table has run on a device. Checked in each file: the compute\n"
        "capability of every cubin, spills within the budget of bench/cross_checks.py, every weight's bytes, and each\n"
        "symbol that the host code needs against libtorch's exports and CUDA's headers. Written by\n"
        "`python -m bench.cross_table`. `templates`: kernels of ours in the file; `fused`: attention left to ATen.\n"
        "Seconds were taken while other work ran beside: upper bounds.\n\n"
    )
    columns = ("model", "target", "precision", "batch", "file", "seconds", "Inductor s", "MB")
    columns += ("cubins", "templates", "fused", "registers", "spilled B", "weights", "symbols", "problems")
    rows = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for r in records:
        if "seconds" not in r:
            cells = [*(r[k] for k in KEY), *[""] * 11, r["problems"][0].splitlines()[0]]
        else:
            fused = ", ".join(f"{n} {k}" for k, n in r["fused_attention"].items()) or "-"
            cells = [
                *(r[k] for k in KEY),
                r["product"],
                r["seconds"],
                r["inductor_seconds"],
                r["megabytes"],
                r["cubins"],
                len(r["templates"]) or "-",
                fused,
                r["most_registers"],
                r["most_spilled"],
                r["weights"],
                r["symbols"],
                "; ".join(r["problems"]) or "none",
            ]
        rows.append(" | ".join(str(c) for c in cells))
    machine = sorted({r["machine"] for r in records})
    return head + "".join(f"| {row} |\n" for row in rows) + "\n" + "\n".join(machine) + "\n"


def _machine() -> str:
    import triton

    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, triton {triton.__version__}"


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[k] for k in KEY)


if __name__ == "__main__":
    raise SystemExit(main())
