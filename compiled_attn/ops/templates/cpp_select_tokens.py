"""Token selection in C++ (kernels/cpp/select_tokens.h): rank, gather and fuse in one pass over the tokens.

Memory: two int32 a scored token, and C floats a thread for the fused token. Work: n * n comparisons a picture.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.templates.base import Template, marked
from compiled_attn.ops.templates.cpp_attention import CTYPES, DTYPES

NAME = "cpp_select_tokens"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::select_tokens, else the sentence that says why not."""
    del kwargs
    x, score = args[:2]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if x.dtype not in DTYPES:
        return f"its tokens are {x.dtype}, the kernel moves float32 and bfloat16"
    if score.dtype not in DTYPES:
        return f"its scores are {score.dtype}, the kernel ranks float32 and bfloat16"
    return None


TEMPLATE = Template(NAME, "select_tokens", "cpu", accepts)


def lowering(x: Any, score: Any, keep: Any, *, prefix: int = 1, fuse: bool = False) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if x.get_device().type != "cpu" or x.get_dtype() not in DTYPES or score.get_dtype() not in DTYPES:
        return None
    batch, _, channels = x.get_size()
    count = keep + prefix + int(fuse)
    tokens = (x.get_dtype(), [batch, count, channels], [count * channels, channels, 1])
    index = (torch.int64, [batch, keep], [keep, 1])

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "select_tokens.h"), _body(views, prefix, fuse)

    return _torch.cpp_template(NAME, {"x": x, "score": score}, [tokens, index], source, scalars={"keep": keep})


def _body(views: dict[str, Any], prefix: int, fuse: bool) -> str:
    x, score, tokens, index = (views[name] for name in ("x", "score", "out_0", "out_1"))
    kinds = f"{CTYPES[x.dtype]}, {CTYPES[score.dtype]}"
    lines = ["compiled_attn_cpp::SelectShape s{};"]
    values = (*x.sizes, prefix, views["keep"])
    names = ("batch", "tokens", "channels", "prefix", "keep")
    lines += [f"s.{name} = {value};" for name, value in zip(names, values, strict=True)]
    for name, view in (("x", x), ("score", score), ("out", tokens)):
        if view is not None:
            lines += [f"s.{name}[{i}] = {view.strides[i]};" for i in range(2)]
    lines.append(f"s.fuse = {str(fuse).lower()};")
    read = [f"reinterpret_cast<const {CTYPES[v.dtype]}*>({v.pointer})" for v in (x, score)]
    to = "nullptr" if tokens is None else f"reinterpret_cast<{CTYPES[tokens.dtype]}*>({tokens.pointer})"
    places = "nullptr" if index is None else index.pointer
    lines.append(f"compiled_attn_cpp::select_tokens<{kinds}>(s, {', '.join(read)}, {to}, {places});")
    return "\n".join(lines) + "\n"
