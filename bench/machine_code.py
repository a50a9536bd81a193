"""Compiles every Triton kernel x configuration x target to machine code, with no GPU, and records what it needs.

    python bench/machine_code.py                      # candidates in order until one fits, for every case and target
    python bench/machine_code.py --all --again        # every candidate of the kernels that have changed
    python bench/machine_code.py --all --kernel local_attention  # every candidate of one kernel
    python bench/machine_code.py --chosen --sm 80 90  # only what the record chooses: prints one JSON line a compile

The first two write compiled_attn/ops/templates/machine_code.json under the installed triton's version:
kernel -> case -> configuration -> "sm_80" -> [registers a thread, bytes spilled a thread, shared bytes a block].
Strides and pointers are taken as multiples of 16, the innermost stride as 1; head widths fill their block but for 8
columns, so that the masks are there. Must not run under TRITON_INTERPRET.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compiled_attn.ir import targets
from compiled_attn.ops.kernels import (
    attention,
    cached_attention,
    class_row,
    decay_attention,
    depthwise,
    depthwise_gradient,
    depthwise_input_gradient,
    local_attention,
    local_attention_columns,
    local_attention_rows,
    neighborhood,
    ragged_attention,
    select_tokens,
)
from compiled_attn.ops.templates import (
    triton_attention,
    triton_cached_attention,
    triton_class_row,
    triton_decay_attention,
    triton_depthwise,
    triton_depthwise_gradient,
    triton_depthwise_input_gradient,
    triton_local_attention,
    triton_local_backward,
    triton_neighborhood,
    triton_ragged_attention,
    triton_select_tokens,
)
from compiled_attn.ops.templates.triton_config import BLOCKS, KERNELS, RECORD, SM_LEAST, Config, MachineCode, offered

SOURCES = (
    "attention.py",
    "cached_attention.py",
    "class_row.py",
    "decay_attention.py",
    "depthwise.py",
    "depthwise_gradient.py",
    "depthwise_input_gradient.py",
    "local_attention.py",
    "local_attention_columns.py",
    "local_attention_rows.py",
    "neighborhood.py",
    "ragged_attention.py",
    "select_tokens.py",
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {t.sm: t.shared_bytes_per_block for t in map(targets.load, targets.names()) if t.sm >= SM_LEAST}


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel: its candidates, and how to compile it but for them."""

    kernel: str
    name: str
    function: Any
    dtype: torch.dtype
    configs: tuple[Config, ...]
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def types(self) -> dict[str, str]:
        """Triton types of the arguments that are no constants."""
        element = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        pointers = {"logits_ptr": "fp32", "lse_ptr": "fp32", "row_ptr": "fp32", "score_ptr": "fp32", "index_ptr": "i64"}
        pointers |= {"q_offsets_ptr": "i64", "k_offsets_ptr": "i64", "positions_ptr": "i64", "queries_ptr": "i64"}
        pointers |= {
            f"{name}_ptr": "fp32"
            for name in ("peak", "total", "sum", "sums", "mass", "mean", "dbias", "drelative", "decay")
        }
        types = {}
        for argument in self.function.arg_names:
            if argument.endswith("_ptr"):
                types[argument] = "*" + pointers.get(argument, element)
            else:
                types[argument] = "fp32" if argument in ("scale", "eps") else "i32"
        return types


def cases() -> Iterator[Case]:
    """Every specialisation that a launch can ask for; the 16-bit types share one."""
    for dtype in (torch.bfloat16, torch.float32):
        for block in BLOCKS:
            width = (("D", block - 8), ("BLOCK_D", block))
            for bias in (False, True):
                for causal in (False, True):
                    yield Case(
                        triton_attention.KERNEL,
                        triton_attention.case(dtype, block, bias=bias, causal=causal),
                        attention.attention,
                        dtype,
                        triton_attention.configs(dtype, block),
                        (
                            *width,
                            ("DV", block - 8),
                            ("BLOCK_DV", block),
                            ("HAS_BIAS", bias),
                            ("CAUSAL", causal),
                            ("UPCAST", False),
                            *((f"stride_{x}", 1) for x in ("qd", "kd", "vd", "bm")),
                        ),
                    )
                yield Case(
                    triton_class_row.LOGITS_KERNEL,
                    triton_class_row.logits_case(dtype, block, bias=bias),
                    class_row.class_row_logits,
                    dtype,
                    triton_class_row.logits_configs(block),
                    (*width, ("HAS_BIAS", bias), *((f"stride_{x}", 1) for x in ("qd", "kd", "bm"))),
                )
            for causal in (False, True):
                yield Case(
                    triton_ragged_attention.KERNEL,
                    triton_ragged_attention.case(dtype, block, causal=causal),
                    ragged_attention.ragged_attention,
                    dtype,
                    triton_ragged_attention.configs(dtype, block),
                    (
                        *width,
                        ("DV", block - 8),
                        ("BLOCK_DV", block),
                        ("CAUSAL", causal),
                        ("UPCAST", False),
                        *((f"stride_{x}", 1) for x in ("qd", "kd", "vd")),
                    ),
                )
            for rank, relative in ((1, False), (2, False), (3, False), (3, True)):
                if relative and block > triton_local_attention.WIDEST_RELATIVE:
                    continue
                sizes = ("queries", "keys", "window", "step", "block", "dilation", "tile")
                yield Case(
                    triton_local_attention.KERNEL,
                    triton_local_attention.case(dtype, block, rank=rank, relative=relative),
                    local_attention.local_attention,
                    dtype,
                    triton_local_attention.configs(dtype, block),
                    (
                        *width,
                        ("DV", block - 8),
                        ("BLOCK_DV", block),
                        ("RANK", rank),
                        ("HAS_BIAS", True),
                        ("HAS_RELATIVE", relative),
                        ("HAS_SINKS", rank == 1),
                        ("UPCAST", False),
                        *((f"stride_{x}", 1) for x in ("qd", "kd", "vd")),
                        *((f"{size}_{axis}", 1) for axis in "zyx"[: 3 - rank] for size in sizes),
                    ),
                )
            yield Case(
                triton_cached_attention.SPLIT_KERNEL,
                triton_cached_attention.case(dtype, block),
                cached_attention.cached_attention_split,
                dtype,
                triton_cached_attention.split_configs(dtype, block),
                (
                    *width,
                    ("DV", block - 8),
                    ("BLOCK_DV", block),
                    ("UPCAST", False),
                    *((f"stride_{x}", 1) for x in ("qd", "kd", "vd")),
                ),
            )
            yield Case(
                triton_cached_attention.COMBINE_KERNEL,
                triton_cached_attention.case(dtype, block),
                cached_attention.cached_attention_combine,
                dtype,
                triton_cached_attention.combine_configs(),
                (("DV", block - 8), ("BLOCK_DV", block), ("BLOCK_SPLITS", triton_cached_attention.SPLITS)),
            )
        for block in triton_decay_attention.WIDTHS:
            for along in (1, 3):
                for softmax in (True, False):
                    yield Case(
                        triton_decay_attention.KERNEL,
                        triton_decay_attention.case(dtype, block, along=along, softmax=softmax),
                        decay_attention.decay_attention,
                        dtype,
                        triton_decay_attention.configs(dtype),
                        (
                            *(("D", block - 8), ("BLOCK_D", block), ("DV", block - 8), ("BLOCK_DV", block)),
                            *(("ALONG", along), ("SOFTMAX", softmax), ("CAUSAL", along == 1), ("UPCAST", False)),
                            *((f"stride_{x}", 1) for x in ("qd", "kd", "vd")),
                        ),
                    )
        for fuse in (False, True):
            yield Case(
                triton_select_tokens.KERNEL,
                triton_select_tokens.case(dtype, fuse=fuse),
                select_tokens.select_tokens,
                dtype,
                triton_select_tokens.configs(),
                (("FUSE", fuse), ("stride_xc", 1), ("stride_sm", 1)),
            )
        for block in triton_local_backward.WIDTHS:
            sizes = ("queries", "keys", "window", "step", "block", "dilation", "tile")
            for rank, relative in ((1, False), (2, False), (3, False), (3, True)):
                if relative and block > triton_local_attention.WIDEST_RELATIVE:
                    continue
                for name, kernel in (
                    (triton_local_backward.ROWS, local_attention_rows.local_attention_rows),
                    (triton_local_backward.COLUMNS, local_attention_columns.local_attention_columns),
                ):
                    yield Case(
                        name,
                        triton_local_backward.case(dtype, block, rank=rank, relative=relative),
                        kernel,
                        dtype,
                        triton_local_backward.configs(dtype, block),
                        (
                            *(("D", block - 8), ("BLOCK_D", block), ("DV", block - 8), ("BLOCK_DV", block)),
                            *(("RANK", rank), ("HAS_BIAS", True), ("HAS_RELATIVE", relative)),
                            *(("HAS_SINKS", rank == 1), ("UPCAST", False)),
                            *((f"stride_{x}", 1) for x in ("qd", "kd", "vd", "gd")),
                            *((f"{size}_{axis}", 1) for axis in "zyx"[: 3 - rank] for size in sizes),
                        ),
                    )
        for mixes in triton_neighborhood.MIXES:
            for block in triton_neighborhood.WIDTHS:
                yield Case(
                    triton_neighborhood.KERNEL,
                    triton_neighborhood.case(dtype, mixes, block),
                    neighborhood.neighborhood,
                    dtype,
                    triton_neighborhood.configs(mixes, block),
                    (("stride_wk", 1), ("stride_vd", 1)),
                )
        for block in (0, *triton_depthwise.NORM_BLOCKS):
            parts = ("HAS_BIAS", "HAS_GATE", "HAS_RESIDUAL", "NORM_WEIGHT", "NORM_BIAS")
            yield Case(
                triton_depthwise.KERNEL,
                triton_depthwise.case(dtype, block),
                depthwise.depthwise,
                dtype,
                triton_depthwise.configs(block),
                (
                    *((part, True) for part in parts),
                    ("NORM", block > 0),
                    ("ACTIVATION", "gelu"),
                    *((f"stride_{x}", 1) for x in ("xc", "gc", "rc")),
                ),
            )
        yield Case(
            triton_depthwise_gradient.KERNEL,
            triton_depthwise_gradient.case(dtype),
            depthwise_gradient.depthwise_gradient,
            dtype,
            triton_depthwise_gradient.configs(),
            (("stride_xc", 1), ("stride_gc", 1)),
        )
        yield Case(
            triton_depthwise_input_gradient.KERNEL,
            triton_depthwise_input_gradient.case(dtype),
            depthwise_input_gradient.depthwise_input_gradient,
            dtype,
            triton_depthwise_input_gradient.configs(),
            (("stride_gc", 1),),
        )
    yield Case(
        triton_class_row.MEAN_KERNEL,
        triton_class_row.MEAN_CASE,
        class_row.class_row_mean,
        torch.float32,
        triton_class_row.mean_configs(),
    )


def compile_for(case: Case, config: Config, sm: int) -> MachineCode:
    """Compiles one case and configuration for a compute capability and reads what the machine code needs."""
    constants = {**dict(case.constants), **config.constants}
    types = {name: "constexpr" if name in constants else kind for name, kind in case.types.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind != "constexpr" and (name.endswith("_ptr") or name.startswith("stride_"))
    }
    source = ASTSource(case.function, types, constants, aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    return MachineCode(registers, stack, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as the bundled cuobjdump reads them; spills live on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no register count: {text[-300:]}")
    return int(found[1]), int(found[2])


def sweep(record: dict[str, Any], sms: list[int], kernel: str, *, everything: bool) -> Iterator[None]:
    """Fills one triton version's record, case by case; what it holds already is not compiled again.

    Without `everything` it stops at the first candidate that fits a case and target. `kernel`: only that one, if given.
    """
    wanted = [case for case in cases() if kernel in ("", case.kernel)]
    for case in tqdm(wanted, unit="case", file=sys.stderr):
        table = record.setdefault(case.kernel, {}).setdefault(case.name, {})
        for sm in sms:
            for config in case.configs:
                needs = table.setdefault(config.name, {})
                if f"sm_{sm}" not in needs:
                    code = compile_for(case, config, sm)
                    needs[f"sm_{sm}"] = [code.registers, code.spills, code.shared]
                fits = MachineCode(*needs[f"sm_{sm}"]).fits(SHARED_LIMIT[sm])
                if fits and not everything:
                    break
        yield


def chosen(sms: list[int], pattern: str) -> Iterator[dict[str, Any]]:
    """Compiles anew, for each case whose name matches and each target, the candidate that the record chooses."""
    for case in (c for c in cases() if re.search(pattern, c.name)):
        for sm in sms:
            target = SimpleNamespace(sm=sm, shared_bytes_per_block=SHARED_LIMIT[sm])
            fitting = offered(case.kernel, case.name, case.configs, target)
            line = {"kernel": case.kernel, "case": case.name, "sm": sm, "config": None}
            if fitting:
                code = compile_for(case, fitting[0], sm)
                line |= {"config": fitting[0].name, **vars(code), "fits": code.fits(SHARED_LIMIT[sm])}
            yield line


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what the Triton kernels' machine code needs, with no GPU.")
    parser.add_argument("--sm", type=int, nargs="*", default=sorted(SHARED_LIMIT), help="compute capabilities, as 80")
    parser.add_argument("--all", action="store_true", help="every candidate, not only those up to the first that fits")
    parser.add_argument("--again", action="store_true", help="forget what is recorded of changed kernels, or of all")
    parser.add_argument("--chosen", action="store_true", help="only compile what the record chooses, print JSON lines")
    parser.add_argument("--case", default="", help="with --chosen: only cases whose name matches this pattern")
    parser.add_argument("--kernel", default="", help="record only this kernel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if options.chosen:
            for line in chosen(options.sm, options.case):
                print(json.dumps(line), flush=True)
            return
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        sources = {name: hashlib.sha256((KERNELS / name).read_bytes()).hexdigest() for name in SOURCES}
        ours = record.setdefault(triton.__version__, {"sources": sources, "kernels": {}})
        stale = {name for name, digest in sources.items() if ours["sources"].get(name) != digest}
        changed = {case.kernel for case in cases() if Path(case.function.fn.__code__.co_filename).name in stale}
        if options.again:
            ours["kernels"] = {} if not stale else {k: v for k, v in ours["kernels"].items() if k not in changed}
        elif changed & ours["kernels"].keys():
            parser.error("the kernels have changed since their machine code was recorded; give --again")
        ours["sources"] = sources
        for _ in sweep(ours["kernels"], options.sm, options.kernel, everything=options.all):
            text = json.dumps(record, indent=1, sort_keys=True)
            RECORD.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n")


if __name__ == "__main__":
    main()
