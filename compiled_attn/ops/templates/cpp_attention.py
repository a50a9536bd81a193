"""Plain attention in C++ (kernels/cpp/attention.h): online softmax, queries in the vectors' lanes, nothing packed.

Memory: a thread holds one block of at most 64 queries: D + Dv + 128 (+ 128 with a bias) floats a query.
"""

from __future__ import annotations

from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ops.templates.base import Template, marked

NAME = "cpp_attention"
DTYPES = (torch.float32, torch.bfloat16)
CTYPES = {torch.float32: "float", torch.bfloat16: "compiled_attn_cpp::Bf16"}


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::attention, else the sentence that says why not."""
    del kwargs
    q, k, v, bias = (*args, None)[:4]
    if target.kind != "cpu":
        return f"target {target.name} runs no C++"
    if q.dtype not in DTYPES:
        return f"its elements are {q.dtype}, the kernel takes float32 and bfloat16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype} but k is {k.dtype} and v is {v.dtype}"
    if bias is not None and bias.dtype not in DTYPES:
        return f"its bias is {bias.dtype}, the kernel adds float32 and bfloat16"
    for name, width in (("head width", q.shape[-1]), ("value width", v.shape[-1])):
        if not isinstance(width, int):
            return f"its {name} {width} is symbolic, the kernel's memory plan needs a number"
        if not 1 <= width <= 512:
            return f"its {name} is {width}, beyond 512 a block of queries leaves the second-level cache"
    return None


TEMPLATE = Template(NAME, "attention", "cpu", accepts)


def lowering(
    q: Any, k: Any, v: Any, bias: Any = None, *, scale: float, causal: bool = False, softcap: float = 0.0
) -> Any:
    """Inductor's lowering, of its own values; None where the kernel does not cover the call."""
    if not covered(q, bias):
        return None
    inputs, out = operands(q, k, v, bias)

    def source(views: dict[str, Any]) -> tuple[str, str]:
        return marked(NAME, "attention.h"), shape(views, scale, causal, softcap) + attention_call(views)

    return _torch.cpp_template(NAME, inputs, [out], source)[0]


def attention_call(views: dict[str, Any]) -> str:
    """The C++ statement that fills `out_0`."""
    tensors = pointers(views, ("q", "k", "v", "bias"))
    return f"compiled_attn_cpp::attention<{types(views)}>(s, {tensors}, {written(views['out_0'])});\n"


def covered(q: Any, bias: Any) -> bool:
    """Whether Inductor's values are of a device and of types that the kernels of this family read."""
    dtypes = [x.get_dtype() for x in (q, bias) if x is not None]
    return q.get_device().type == "cpu" and all(d in DTYPES for d in dtypes)


def operands(q: Any, k: Any, v: Any, bias: Any) -> tuple[dict[str, Any], tuple[Any, list[Any], list[Any]]]:
    """The inputs by name, the bias broadcast to [B, H, N, M], and the output with [B, N, H, Dv] in memory."""
    batch, heads, queries, _ = q.get_size()
    width = v.get_size()[-1]
    inputs = {"q": q, "k": k, "v": v}
    if bias is not None:
        inputs["bias"] = _torch.inductor_expand(bias, [batch, heads, queries, k.get_size()[2]])
    strides = [queries * heads * width, width, heads * width, 1]
    return inputs, (q.get_dtype(), [batch, heads, queries, width], strides)


def shape(views: dict[str, Any], scale: float, causal: bool, softcap: float = 0.0) -> str:
    """C++ statements that fill `s`, the kernel's AttentionShape."""
    q, k, v, bias = views["q"], views["k"], views["v"], views.get("bias")
    sizes = (*q.sizes[:3], k.sizes[2], q.sizes[3], v.sizes[3])
    lines = ["compiled_attn_cpp::AttentionShape s{};"]
    names = ("batch", "heads", "queries", "keys", "width", "value_width")
    lines += [f"s.{name} = {size};" for name, size in zip(names, sizes, strict=True)]
    tensors = (("q", q, 3), ("k", k, 3), ("v", v, 3), ("out", views["out_0"], 3), ("bias", bias, 4))
    for name, view, count in tensors:
        if view is not None:
            lines += [f"s.{name}[{i}] = {view.strides[i]};" for i in range(count)]
    lines += [f"s.scale = {float(scale)!r};", f"s.causal = {str(causal).lower()};", f"s.softcap = {float(softcap)!r};"]
    return "\n".join(lines) + "\n"


def types(views: dict[str, Any]) -> str:
    """The kernels' template arguments: element and bias."""
    bias = views.get("bias")
    return f"{CTYPES[views['q'].dtype]}, {'float' if bias is None else CTYPES[bias.dtype]}"


def pointers(views: dict[str, Any], names: tuple[str, ...]) -> str:
    """The inputs as the kernels' arguments; one that is not there is a null pointer."""
    return ", ".join(
        f"reinterpret_cast<const {CTYPES[views[name].dtype]}*>({views[name].pointer})" if name in views else "nullptr"
        for name in names
    )


def written(view: Any) -> str:
    """An output as the kernels' argument."""
    return f"reinterpret_cast<{CTYPES[view.dtype]}*>({view.pointer})"
