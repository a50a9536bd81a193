"""The linear map on packed weights in C++ (kernels/cpp/gemm.h): register tiles over blocks of columns, epilogue inside.

Memory: y is written once; a block of the packed weights stays in the second-level cache while rows of x pass by it.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.linear import pairs
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, pointers, written

NAME = "cpp_gemm"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::packed_linear, else the sentence that says why not."""
    del kwargs
    x, packed = args[:2]
    because = refuses(x.dtype, x.shape[1], target)
    if because is None and packed.shape[2] % lanes(target):
        return f"its blocks have {packed.shape[2]} columns, no multiple of this target's {lanes(target)} lanes"
    return because


def refuses(dtype: torch.dtype, inner: Any, target: Any) -> str | None:
    """Because of what the kernel does not serve a linear map of that element and input width; None where it does."""
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its elements are {dtype}, the kernel takes float32 and bfloat16"
    if dtype == torch.bfloat16 and "avx512_bf16" not in target.needs:
        return f"target {target.name} has no product of bfloat16 pairs that the kernel uses (AVX512-BF16)"
    if not isinstance(inner, int) or inner % pairs(dtype):
        return f"its input width is {inner}; bfloat16 is multiplied in pairs"
    return None


def lanes(target: Any) -> int:
    """float32 lanes of the vectors that the kernel uses on a target."""
    return {"avx512": 16, "avx2": 8}.get(target.isa, 4)


def columns(outer: int, target: Any) -> int:
    """W for N output columns: 3 or 4 vectors (two where registers are 16), whichever fills the last block better."""
    vectors = -(-outer // lanes(target))
    widest = (2,) if target.isa in ("avx2", "sse4") else (3, 4)
    if vectors <= widest[-1]:
        return vectors * lanes(target)
    return max(widest, key=lambda width: (vectors % width or width) / width) * lanes(target)


def last(outer: int, target: Any) -> int:
    """Columns of the last block that the kernel computes, whole vectors."""
    rest = (outer - 1) % columns(outer, target) + 1
    return -(-rest // lanes(target)) * lanes(target)


TEMPLATE = Template(NAME, "packed_linear", "cpu", accepts)


def lowering(
    x: Any, packed: Any, bias: Any = None, residual: Any = None, *, outer: int, activation: str = "none"
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if x.get_device().type != "cpu" or x.get_dtype() not in CTYPES:
        return None
    inputs = {"x": x, "packed": packed}
    inputs |= {name: value for name, value in (("bias", bias), ("residual", residual)) if value is not None}
    width = int(packed.get_size()[2])
    out = (x.get_dtype(), [x.get_size()[0], outer], [outer, 1])

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "gemm.h"), statements(views, width, activation)

    return _torch.cpp_template(NAME, inputs, [out], source)[0]


def statements(views: dict[str, Any], width: int, activation: str) -> str:
    """C++ that fills `out_0`."""
    x, residual, out = views["x"], views.get("residual"), views["out_0"]
    beside = "0" if residual is None else residual.strides[0]
    ctype = CTYPES[x.dtype]
    tensors = pointers(views, ("x", "packed", "bias", "residual"))
    return (
        f"static_assert({width} % compiled_attn_cpp::kWidth == 0, "
        '"the weights were packed for another instruction set");\n'
        f"compiled_attn_cpp::GemmShape s{{{x.sizes[0]}, {x.sizes[1]}, {out.sizes[1]}, "
        f"{x.strides[0]}, {beside}, {out.strides[0]}}};\n"
        f"compiled_attn_cpp::gemm<{ctype}, compiled_attn_cpp::Activation::{activation}, "
        f"{width} / compiled_attn_cpp::kWidth, compiled_attn_cpp::last_vectors({out.sizes[1]}, {width})>"
        f"(s, {tensors}, {written(out)});\n"
    )


def standalone(dtype: torch.dtype, outer: int, activation: str, target: Any) -> str:
    """C++ of `kernel(x, packed, bias, residual, out, M, K, N)` on dense tensors, for measuring the kernel by itself.

    One source serves all N with blocks and a last block as wide as those of `outer`.
    """
    ctype = CTYPES[dtype]
    arguments = "const void* x, const void* packed, const void* bias, const void* residual, void* out"
    casts = ", ".join(f"(const {ctype}*){name}" for name in ("x", "packed", "bias", "residual"))
    return (
        f"{marked(NAME, 'gemm.h')}\n"
        f'extern "C" void kernel({arguments}, int64_t rows, int64_t inner, int64_t outer) {{\n'
        "  compiled_attn_cpp::GemmShape s{rows, inner, outer, inner, outer, outer};\n"
        f"  using namespace compiled_attn_cpp;\n  gemm<{ctype}, Activation::{activation}, "
        f"{columns(outer, target)} / kWidth, {last(outer, target)} / kWidth>(s, {casts}, ({ctype}*)out);\n}}\n"
    ).replace("compiled_attn_cpp::Bf16", "Bf16")
