"""Calls of local attention as specs that shrink and print, and the fixed ones that every law asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from compiled_attn.ops.local_geometry import Axis, axes_of

LAYOUTS = ("dense", "fused", "heads outside")


@dataclass(frozen=True)
class LocalSpec:
    """One call. queries: the sizes of q's spatial axes; a sequence per option, None as the op takes it."""

    queries: tuple[int, ...] = (9, 7)
    window: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    shift: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    border: str = "clamp"
    causal: tuple[bool, ...] | None = None
    sinks: int = 0
    batch: int = 2
    heads: int = 2
    width: int = 8
    value_width: int = 8
    bias: bool = False
    relative: bool = False
    layout: str = "dense"
    dtype: torch.dtype = torch.float32
    scale: float = 0.3
    softcap: float = 0.0
    seed: int = 0

    @property
    def axes(self) -> tuple[Axis, ...]:
        rank = len(self.queries)
        return axes_of(
            rank,
            self.window,
            self.stride,
            self.dilation,
            self.shift,
            self.block,
            self.border,
            self.causal,
            self.sinks,
        )

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(a.keys(n) for a, n in zip(self.axes, self.queries, strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        names = ("window", "stride", "dilation", "shift", "block", "causal")
        lists = {n: None if getattr(self, n) is None else list(getattr(self, n)) for n in names}
        return {**lists, "border": self.border, "sinks": self.sinks, "scale": self.scale, "softcap": self.softcap}

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """q, k, v, bias, relative."""
        random = torch.Generator().manual_seed(self.seed)
        sizes = ((self.queries, self.width), (self.keys, self.width), (self.keys, self.value_width))
        q, k, v = (self._laid_out(spatial, width, random) for spatial, width in sizes)
        offsets = [a.offsets for a in self.axes]
        bias = torch.randn(self.heads, *offsets, generator=random) if self.bias else None
        relative = torch.randn(self.batch, *self.queries, self.heads, sum(offsets), generator=random)
        return q, k, v, bias, relative.to(self.dtype) if self.relative else None

    def make(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The op's positional arguments in `dtype`."""
        return tuple(None if t is None else t.to(dtype) for t in replace(self, dtype=dtype).tensors())

    def _laid_out(self, spatial: tuple[int, ...], width: int, random: torch.Generator) -> torch.Tensor:
        """Random [B, *spatial, H, width], NaN around it in memory."""
        shape = (self.batch, *spatial, self.heads, width)
        if self.layout == "dense":
            memory = torch.full(shape, torch.nan, dtype=self.dtype)
        elif self.layout == "fused":
            memory = torch.full((*shape[:-2], 3, *shape[-2:]), torch.nan, dtype=self.dtype).select(-3, 1)
        else:
            gapped = (self.heads, self.batch, *(n + 1 for n in spatial), width + 3)
            memory = torch.full(gapped, torch.nan, dtype=self.dtype)
            for i, n in enumerate(spatial):
                memory = memory.narrow(2 + i, 1, n)
            memory = memory[..., 2 : width + 2].movedim(0, -2)
        return memory.copy_(torch.randn(shape, generator=random))


CASES: dict[str, LocalSpec] = {
    "neighborhood with bias": LocalSpec(bias=True),
    "dilated, with a remainder": LocalSpec(window=(3, 3), dilation=(2, 3), queries=(8, 11), bias=True, layout="fused"),
    "window wider than the map": LocalSpec(window=(5, 3), queries=(3, 7), bias=True, value_width=4),
    "windows": LocalSpec(window=(4, 2), stride=(4, 2), queries=(8, 6), bias=True, layout="heads outside"),
    "shifted windows": LocalSpec(
        window=(4, 4), stride=(4, 4), shift=(2, 2), queries=(8, 9), border="mask", bias=True, batch=1
    ),
    "halo": LocalSpec(window=(6, 6), stride=(4, 4), queries=(8, 8), border="zero", relative=True),
    "halo, strided queries": LocalSpec(
        window=(6, 6), stride=(4, 4), block=(2, 2), queries=(4, 6), border="zero", relative=True, bias=True
    ),
    "grid": LocalSpec(window=(4, 4), dilation=(2, 2), queries=(8, 8), bias=True),
    "sliding and causal, with sinks": LocalSpec(
        queries=(17,), window=(5,), border="mask", causal=(True,), sinks=2, bias=True
    ),
    "sliding and capped": LocalSpec(
        queries=(17,), window=(5,), border="mask", causal=(True,), scale=1.0, softcap=1.5, bias=True
    ),
    "three dimensions, causal in time": LocalSpec(
        queries=(4, 5, 6), window=(2, 3, 3), causal=(True, False, False), bias=True, width=4, value_width=4
    ),
}


def _bad(**changed: Any) -> dict[str, Any]:
    spec = LocalSpec()
    q, k, v, bias, relative = spec.tensors()
    return {"q": q, "k": k, "v": v, "bias": bias, "relative": relative, **spec.options, **changed}


BAD: list[tuple[dict[str, Any], str]] = [
    (_bad(q=torch.zeros(2, 9, 8)), "q has 3 dimensions"),
    (_bad(k=torch.zeros(2, 9, 7, 2, 4)), "q and k disagree on the head width"),
    (_bad(k=torch.zeros(2, 9, 6, 2, 8)), "k and v disagree on the size of spatial axis 1"),
    (_bad(k=torch.zeros(2, 9, 6, 2, 8), v=torch.zeros(2, 9, 6, 2, 8)), "k and q disagree on the size of spatial axis"),
    (_bad(v=torch.zeros(2, 9, 7, 3, 8)), "q and v disagree on the number of heads"),
    (_bad(v=torch.zeros(2, 9, 7, 2, 8).bfloat16()), "q and v disagree on the element type"),
    (_bad(bias=torch.zeros(2, 5, 4)), "bias has the shape"),
    (_bad(relative=torch.zeros(2, 9, 7, 2, 9)), "relative has the shape"),
    (_bad(window=[3]), "window has 1 numbers"),
    (_bad(border="wrap"), "there is no border 'wrap'"),
    (_bad(stride=[4, 1]), "spatial axis 0 has no such pattern"),
    (_bad(shift=[0, 1]), "spatial axis 1 has no such pattern"),
    (_bad(window=[4, 4], stride=[4, 4], block=[3, 4]), "spatial axis 0 has no such pattern"),
    (_bad(sinks=1), "sinks are keys of a sequence"),
    (_bad(softcap=-1.0), "softcap is -1"),
]


@st.composite
def local_specs(draw: st.DrawFn) -> LocalSpec:
    """Patterns of one to three axes: sizes below the window, beside its multiples, remainders of the dilation."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    most = (150, 24, 8)[rank - 1]
    kind = draw(st.sampled_from(["neighborhood", "dilated", "windows", "halo", "strided halo", "causal"]))
    rows = [draw(_axis(kind, most, 12 if rank == 1 else 7 if rank == 2 else 4)) for _ in range(rank)]
    queries, window, stride, block, dilation, shift, causal = zip(*rows, strict=True)
    widths = st.one_of(st.sampled_from([8, 16, 32, 64, 80, 128]), st.integers(1, 40))
    width = draw(widths)
    plain = all(b == s for b, s in zip(block, stride, strict=True))
    sinks = draw(st.sampled_from([0, 0, 1, 3])) if rank == 1 and plain and dilation == (1,) else 0
    return LocalSpec(
        queries=queries,
        window=window,
        stride=stride,
        dilation=dilation,
        shift=shift,
        block=block,
        border=draw(st.sampled_from(["clamp", "mask", "zero"])),
        causal=causal if plain else None,
        sinks=sinks,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        width=width,
        value_width=draw(st.one_of(st.just(width), widths)),
        bias=draw(st.booleans()),
        relative=draw(st.integers(0, 3)) == 0,
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        scale=draw(st.sampled_from([0.05, 0.3, 1.0])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def _axis(draw: st.DrawFn, kind: str, most: int, widest: int) -> tuple[int, int, int, int, int, int, bool]:
    """queries, window, stride, block, dilation, shift, causal."""
    queries, window = draw(st.integers(1, most)), draw(st.integers(1, widest))
    dilation = draw(st.integers(1, 4)) if kind == "dilated" else 1
    causal = kind == "causal" and draw(st.booleans())
    if kind in ("neighborhood", "dilated"):
        return queries, window, 1, 1, dilation, 0, False
    stride = window if kind == "windows" else draw(st.integers(1, window))
    if kind != "strided halo":
        return queries, window, stride, stride, dilation, draw(st.integers(0, stride - 1)), causal
    block = draw(st.sampled_from([b for b in range(1, stride + 1) if stride % b == 0]))
    blocks = draw(st.integers(1, max(1, most // stride)))
    return (blocks * block if block != stride else queries), window, stride, block, 1, 0, False
