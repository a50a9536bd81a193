"""The C++ kernels built once per instruction set (kept by the hash of their source) and called with raw pointers."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from compiled_attn.ir import machine
from compiled_attn.ops.depthwise import ACTIVATIONS
from compiled_attn.ops.local_geometry import Axis
from compiled_attn.ops.templates import cpp_depthwise_gradient, cpp_depthwise_input_gradient
from compiled_attn.ops.templates.base import KERNELS
from compiled_attn.ops.templates.cpp_depthwise import numbers
from compiled_attn.ops.templates.cpp_local_attention import axis_numbers, tables

SOURCE = Path(__file__).parent / "cpp" / "library.cpp"
BIAS_KINDS = {None: 0, torch.float32: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels, and how many threads they are run with.

    needs: CPU flags without which the result does not run here.
    """

    name: str
    flags: tuple[str, ...]
    lanes: int
    bf16: bool
    threads: int
    needs: frozenset[str] = frozenset()


AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
ON_X86 = (
    Variant("avx512-bf16", ("-march=x86-64-v4", "-mavx512bf16"), 16, True, 2, AVX512 | {"avx512_bf16"}),
    Variant("avx512", ("-march=x86-64-v4",), 16, False, 3, AVX512),
    Variant("avx2", ("-march=x86-64-v3",), 8, False, 2, frozenset({"avx2", "fma"})),
    Variant("plain", ("-march=x86-64",), 4, False, 1),
)
VARIANTS = ON_X86 if platform.machine() in ("x86_64", "AMD64") else (Variant("plain", (), 4, False, 1),)


def runnable(variant: Variant) -> bool:
    return variant.needs <= machine.here().flags


def library(variant: Variant) -> ctypes.CDLL:
    """The kernels compiled for a variant, which from now on share their work out to its number of threads."""
    found = _built(variant)
    found.set_threads(variant.threads)
    return found


@functools.cache
def _built(variant: Variant) -> ctypes.CDLL:
    """The library, from the cache folder where this source was compiled before."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "c++"
    # What Inductor compiles with, of the flags that matter to numbers.
    common = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math"]
    common += [
        "-fno-signed-zeros",
        "-Wall",
        "-Werror",
        "-Wno-psabi",
        "-Wno-unused-function",
        "-Wno-maybe-uninitialized",  # the intrinsics' own headers, in GCC 12
        "-Wno-uninitialized",
    ]
    command = [compiler, *common, *variant.flags]
    text = b"".join(p.read_bytes() for p in (SOURCE, *sorted(KERNELS.glob("*.h"))))
    key = hashlib.sha256(repr(command).encode() + text).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"compiled_attn_tests_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"kernels_{key}.so"
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}.so")
        subprocess.run([*command, "-I", str(KERNELS), str(SOURCE), "-o", str(fresh)], check=True)
        fresh.rename(path)
    return ctypes.CDLL(str(path))


def longs(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def attention(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    softcap: float = 0.0,
) -> None:
    """Fills `out` [B, H, N, Dv]; every tensor is read or written by its strides."""
    library(variant).call_attention(
        int(q.dtype == torch.bfloat16),
        *_sizes(q, k, v, out, bias),
        ctypes.c_float(scale),
        int(causal),
        ctypes.c_float(softcap),
        *(pointer(t) for t in (q, k, v, bias)),
        BIAS_KINDS[None if bias is None else bias.dtype],
        pointer(out),
    )


def class_row(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    row: torch.Tensor,
    *,
    scale: float,
    at: int,
) -> None:
    """Fills `row` [B, M] float32."""
    library(variant).call_class_row(
        int(q.dtype == torch.bfloat16),
        *_sizes(q, k, k, q, bias),
        ctypes.c_float(scale),
        *(pointer(t) for t in (q, k, bias)),
        BIAS_KINDS[None if bias is None else bias.dtype],
        pointer(row),
        ctypes.c_int64(at),
    )


def cached_attention(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor,
    out: torch.Tensor | None,
    mass: torch.Tensor | None,
    *,
    scale: float,
    window: int = 0,
    tail: int = 0,
) -> None:
    """Fills `out` [B, H, T, Dv] and `mass` [B, G, S]; either may be left out."""
    groups, slots = k.shape[1:3]
    sizes = [q.shape[0], groups, q.shape[1] // groups, q.shape[2], slots, q.shape[3], v.shape[3], window, tail]
    strides = [n for t in (q, k, v) for n in t.stride()[:3]]
    strides += [0, 0, 0] if out is None else out.stride()[:3]
    library(variant).call_cached_attention(
        int(q.dtype == torch.bfloat16),
        longs(sizes),
        longs([*strides, *positions.stride(), *queries.stride()]),
        ctypes.c_float(scale),
        *(pointer(t) for t in (q, k, v, positions, queries, out, mass)),
    )


def select_tokens(
    variant: Variant,
    x: torch.Tensor,
    score: torch.Tensor,
    tokens: torch.Tensor | None,
    index: torch.Tensor | None,
    *,
    keep: int,
    prefix: int,
    fuse: bool,
) -> None:
    """Fills `tokens` [B, prefix + keep (+ 1), C] and `index` [B, keep]; either may be left out."""
    out = (0, 0) if tokens is None else tokens.stride()[:2]
    library(variant).call_select_tokens(
        int(x.dtype == torch.bfloat16),
        int(score.dtype == torch.bfloat16),
        longs([*x.shape, prefix, keep]),
        longs([*x.stride()[:2], *score.stride(), *out]),
        int(fuse),
        *(pointer(t) for t in (x, score, tokens, index)),
    )


def ragged_attention(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> None:
    """Fills `out` [T, H, Dv]; every tensor is read or written by its strides."""
    rows, heads, width = q.shape
    library(variant).call_ragged_attention(
        int(q.dtype == torch.bfloat16),
        longs([len(q_offsets) - 1, heads, rows, k.shape[0], width, v.shape[2]]),
        longs([s for t in (q, k, v, out) for s in t.stride()[:2]]),
        ctypes.c_float(scale),
        int(causal),
        *(pointer(t) for t in (q, k, v, q_offsets, k_offsets, out)),
    )


def local_attention(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    relative: torch.Tensor | None,
    out: torch.Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    softcap: float = 0.0,
) -> None:
    """Fills `out` [B, *L, H, Dv]; every tensor is read or written by its strides."""
    rank, missing = len(axes), 3 - len(axes)
    rows = [(1, 1, Axis(1))] * missing + list(zip(q.shape[1:-2], k.shape[1:-2], axes, strict=True))
    numbers = [n for queries, keys, a in rows for n in (queries, keys, *axis_numbers(a))]
    strides = []
    for t in (q, k, v, out, relative):
        own = t.stride() if t is not None else (0,) * (rank + 2)
        strides += [own[0], *[0] * missing, *own[1 : 1 + rank], own[1 + rank]]
    own = bias.stride() if bias is not None else (0,) * (rank + 1)
    strides += [own[0], *[0] * missing, *own[1:]]
    library(variant).call_local_attention(
        int(q.dtype == torch.bfloat16),
        longs([q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1]]),
        longs(numbers),
        longs(strides),
        longs(tables(axes)),
        ctypes.c_float(scale),
        ctypes.c_float(softcap),
        *(pointer(t) for t in (q, k, v)),
        pointer(bias),
        BIAS_KINDS[None if bias is None else bias.dtype],
        pointer(relative),
        BIAS_KINDS[None if relative is None else relative.dtype],
        pointer(out),
    )


def neighborhood_apply(
    variant: Variant, weights: torch.Tensor, v: torch.Tensor, out: torch.Tensor, axes: tuple[Axis, ...]
) -> None:
    """Fills `out` [B, *L, H, M, Dv]; every tensor is read or written by its strides."""
    missing = 3 - len(axes)
    rows = [(1, 1, Axis(1))] * missing + list(zip(weights.shape[1:-3], v.shape[1:-2], axes, strict=True))
    numbers = [n for queries, keys, a in rows for n in (queries, keys, *axis_numbers(a))]
    strides = [n for t in (weights, v, out) for n in (t.stride(0), *[0] * missing, *t.stride()[1:])]
    library(variant).call_neighborhood(
        int(v.dtype == torch.bfloat16),
        longs([v.shape[0], v.shape[-2], weights.shape[-2], v.shape[-1]]),
        longs(numbers),
        longs(strides[:-1]),
        *(pointer(t) for t in (weights, v, out)),
    )


def depthwise(variant: Variant, tensors: tuple[torch.Tensor | None, ...], out: torch.Tensor, options: dict) -> None:
    """Fills `out` [B, C, Y, X]; the maps' channel stride is 1. The activation is "none" or "silu"."""
    x, weight, _, gate, residual, *_ = tensors
    pairs = [options[name] for name in ("stride", "padding", "dilation")]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    library(variant).call_depthwise(
        int(x.dtype == torch.bfloat16),
        int(options["activation"] == "silu"),
        int(options["norm_eps"] is not None),
        longs(numbers(x, gate, residual, out, weight.shape[:2], *pairs)),
        ctypes.c_float(options["norm_eps"] or 0.0),
        longs(addresses),
        pointer(out),
    )


def depthwise_gradient(
    variant: Variant, x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, options: dict[str, list[int]]
) -> None:
    """Fills `out` [I, J, C]; the maps' channel stride is 1."""
    pairs = [options[name] for name in ("stride", "padding", "dilation")]
    shape = longs(cpp_depthwise_gradient.numbers(x, grad, out.shape[:2], *pairs))
    library(variant).call_depthwise_gradient(
        int(x.dtype == torch.bfloat16), shape, *(pointer(t) for t in (x, grad, out))
    )


def depthwise_input_gradient(
    variant: Variant, grad: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, options: dict[str, list[int]]
) -> None:
    """Fills `out` [B, C, Y, X]; the maps' channel stride is 1."""
    pairs = [options[name] for name in ("stride", "padding", "dilation")]
    shape = longs(cpp_depthwise_input_gradient.numbers(grad, out, weight.shape[:2], *pairs))
    library(variant).call_depthwise_input_gradient(
        int(grad.dtype == torch.bfloat16), shape, *(pointer(t) for t in (grad, weight, out))
    )


def activation(variant: Variant, name: str, x: torch.Tensor) -> torch.Tensor:
    """The activation of every element of float32 `x`."""
    out = torch.full_like(x, torch.nan)
    library(variant).call_activation(ACTIVATIONS.index(name), pointer(x), pointer(out), ctypes.c_int64(x.numel()))
    return out


def _sizes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
) -> tuple[ctypes.Array, ctypes.Array]:
    batch, heads, queries, width = q.shape
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    strides += (0, 0, 0, 0) if bias is None else bias.expand(batch, heads, queries, k.shape[2]).stride()
    return longs([batch, heads, queries, k.shape[2], width, v.shape[3]]), longs(strides)
