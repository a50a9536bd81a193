"""Calls of the depthwise block as specs that shrink and print, and the fixed ones that every law asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from compiled_attn.ops.depthwise import ACTIVATIONS, out_sizes

LAYOUTS = ("channels last", "channels first", "gapped")


@dataclass(frozen=True)
class DepthwiseSpec:
    """One call. size: rows and columns of x.  padding: two numbers, or the four ends.  layout: of the maps; "gapped" is
    channels last with room between."""

    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    gate: bool = False
    residual: bool = False
    norm: str = "none"  # "plain": without weight and bias, "affine"
    activation: str = "none"
    layout: str = "channels last"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        rows, columns = out_sizes(self.size, self.kernel, self.stride, self.padding, self.dilation)
        return rows, columns

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        pairs = {name: list(getattr(self, name)) for name in ("stride", "padding", "dilation")}
        return {**pairs, "activation": self.activation, "norm_eps": None if self.norm == "none" else 1e-5}

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """x, weight, bias, gate, residual, norm_weight, norm_bias."""
        random = torch.Generator().manual_seed(self.seed)
        x = self._map(self.size, random)
        weight = torch.randn(*self.kernel, self.channels, generator=random)
        weight = (weight / (self.kernel[0] * self.kernel[1]) ** 0.5).to(self.dtype)
        bias = torch.randn(self.channels, generator=random).to(self.dtype)
        gate, residual = self._map(self.out, random), self._map(self.out, random)
        scale, shift = (torch.randn(self.channels, generator=random).to(self.dtype) for _ in range(2))
        affine = self.norm == "affine"
        return (
            x,
            weight,
            bias if self.bias else None,
            gate if self.gate else None,
            residual if self.residual else None,
            scale if affine else None,
            shift if affine else None,
        )

    def make(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The op's positional arguments in `dtype`."""
        return tuple(None if t is None else t.to(dtype) for t in replace(self, dtype=dtype).tensors())

    @property
    def gradient_options(self) -> dict[str, Any]:
        """The keyword arguments of depthwise_weight_gradient."""
        return {name: list(getattr(self, name)) for name in ("kernel", "stride", "padding", "dilation")}

    def gradient_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x, and the gradient of the result."""
        random = torch.Generator().manual_seed(self.seed)
        return self._map(self.size, random), self._map(self.out, random)

    def make_gradient(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The positional arguments of depthwise_weight_gradient in `dtype`."""
        return tuple(t.to(dtype) for t in replace(self, dtype=dtype).gradient_tensors())

    @property
    def input_gradient_options(self) -> dict[str, Any]:
        """The keyword arguments of depthwise_input_gradient."""
        return {name: list(getattr(self, name)) for name in ("size", "stride", "padding", "dilation")}

    def make_input_gradient(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The positional arguments of depthwise_input_gradient in `dtype`: the result's gradient and the weight."""
        spec = replace(self, dtype=dtype)
        weight = spec.tensors()[1]
        return spec.gradient_tensors()[1], weight  # type: ignore[return-value]

    def _map(self, size: tuple[int, int], random: torch.Generator) -> torch.Tensor:
        """[B, C, *size] laid out, NaN around it."""
        shape = (self.batch, self.channels, *size)
        if self.layout == "channels first":
            memory = torch.empty(shape, dtype=self.dtype)
        elif self.layout == "channels last":
            memory = torch.empty((self.batch, *size, self.channels), dtype=self.dtype).permute(0, 3, 1, 2)
        else:
            wide = torch.full((self.batch, size[0] + 1, size[1] + 2, self.channels + 3), torch.nan, dtype=self.dtype)
            memory = wide[:, 1:, 1:-1, 2:-1].permute(0, 3, 1, 2)
        return memory.copy_(torch.randn(shape, generator=random))


CASES = {
    "plain": DepthwiseSpec(),
    "strided and dilated, without a bias": DepthwiseSpec(
        size=(9, 11), kernel=(3, 5), stride=(2, 3), padding=(2, 1), dilation=(2, 1), bias=False, activation="hardswish"
    ),
    "gate and residual": DepthwiseSpec(gate=True, residual=True, activation="gelu", layout="channels first"),
    "layer norm": DepthwiseSpec(kernel=(5, 5), padding=(2, 2), norm="affine", activation="silu", layout="gapped"),
    "layer norm alone, without padding": DepthwiseSpec(kernel=(1, 3), padding=(0, 0), norm="plain", residual=True),
    "padded beyond its reach": DepthwiseSpec(size=(4, 5), kernel=(3, 1), padding=(3, 1), gate=True),
    "padded behind only, strided": DepthwiseSpec(size=(8, 6), stride=(2, 2), padding=(0, 1, 0, 1), residual=True),
    "ends that differ, beyond its reach at one": DepthwiseSpec(size=(5, 6), kernel=(3, 4), padding=(3, 0, 1, 5)),
}
GRADIENT_CASES = {
    "plain": DepthwiseSpec(),
    "strided and dilated": CASES["strided and dilated, without a bias"],
    "one row, channels first": DepthwiseSpec(size=(1, 9), kernel=(1, 4), padding=(0, 3), layout="channels first"),
    "gapped": DepthwiseSpec(kernel=(5, 5), padding=(2, 2), layout="gapped"),
    "padded behind only, strided": CASES["padded behind only, strided"],
    "ends that differ": CASES["ends that differ, beyond its reach at one"],
    "places that few positions meet": DepthwiseSpec(
        size=(9, 9), kernel=(1, 2), stride=(3, 2), padding=(0, 1), dilation=(1, 4)
    ),
}


@st.composite
def depthwise_specs(draw: st.DrawFn) -> DepthwiseSpec:
    """Any kernel that fits; channels about the lanes of a vector; maps down to one pixel."""
    lengths = st.one_of(st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 15), st.just(31))
    axes = []
    for _ in range(2):
        kernel, stride, dilation = draw(lengths), draw(st.integers(1, 3)), draw(st.integers(1, 4))
        reach = dilation * (kernel - 1) + 1
        ahead = draw(st.one_of(st.just((reach - 1) // 2), st.integers(0, reach)))
        behind = draw(st.one_of(st.just(ahead), st.integers(0, reach)))
        least = max(1, reach - ahead - behind)
        axes.append((draw(st.integers(least, least + 30)), kernel, stride, (ahead, behind), dilation))
    size, kernel, stride, ends, dilation = (tuple(pair) for pair in zip(*axes, strict=True))
    padding = tuple(first for first, _ in ends)
    if any(first != last for first, last in ends):
        padding = (*ends[0], *ends[1])
    return DepthwiseSpec(
        batch=draw(st.integers(1, 3)),
        channels=draw(st.one_of(st.integers(1, 40), st.sampled_from([16, 64, 96, 100]))),
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        residual=draw(st.booleans()),
        norm=draw(st.sampled_from(["none", "plain", "affine"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 9)),
    )


def _bad(**changed: Any) -> dict[str, Any]:
    names = ("x", "weight", "bias", "gate", "residual", "norm_weight", "norm_bias")
    return {**dict(zip(names, DepthwiseSpec().tensors(), strict=True)), "padding": [1, 1], **changed}


BAD = [
    (_bad(x=torch.zeros(5, 7, 6)), "x has 3 dimensions"),
    (_bad(weight=torch.zeros(5, 1, 3, 3)), "weight has 4 dimensions"),
    (_bad(weight=torch.zeros(3, 3, 4)), "x and weight disagree on the number of channels"),
    (_bad(bias=torch.zeros(4)), "x and bias disagree on the number of channels"),
    (_bad(weight=torch.zeros(11, 3, 5)), "the kernel does not fit along Y"),
    (_bad(gate=torch.zeros(2, 5, 7, 5)), "gate is not of the result's shape"),
    (_bad(residual=torch.zeros(2, 5, 6, 6)), "residual is not of the result's shape"),
    (_bad(norm_weight=torch.zeros(5)), "norm_weight or norm_bias without norm_eps"),
    (_bad(bias=torch.zeros(5).bfloat16()), "bias holds torch.bfloat16"),
    (_bad(activation="tanh"), "there is no activation 'tanh'"),
    (_bad(stride=[0, 1]), r"stride is \[0, 1\]"),
    (_bad(padding=[1, -1]), r"padding is \[1, -1\]"),
    (_bad(padding=[1, 1, -1, 1]), r"padding is \[1, 1, -1, 1\]"),
    (_bad(padding=[1, 1, 1]), r"padding is \[1, 1, 1\]"),
]


def _bad_gradient(**changed: Any) -> dict[str, Any]:
    spec = DepthwiseSpec()
    return {**dict(zip(("x", "grad"), spec.gradient_tensors(), strict=True)), **spec.gradient_options, **changed}


BAD_GRADIENT = [
    (_bad_gradient(x=torch.zeros(5, 7, 6)), "x has 3 dimensions"),
    (_bad_gradient(grad=torch.zeros(2, 4, 7, 6)), "x and grad disagree on the number of channels"),
    (_bad_gradient(grad=torch.zeros(3, 5, 7, 6)), "x and grad disagree on the batch size"),
    (_bad_gradient(grad=torch.zeros(2, 5, 7, 5)), "grad is not of the result's size"),
    (_bad_gradient(grad=torch.zeros(2, 5, 7, 6).half()), "grad holds torch.float16"),
    (_bad_gradient(stride=[0, 1]), r"stride is \[0, 1\]"),
]


def _bad_input_gradient(**changed: Any) -> dict[str, Any]:
    spec = DepthwiseSpec()
    tensors = spec.make_input_gradient(torch.float32)
    return {**dict(zip(("grad", "weight"), tensors, strict=True)), **spec.input_gradient_options, **changed}


BAD_INPUT_GRADIENT = [
    (_bad_input_gradient(grad=torch.zeros(5, 7, 6)), "grad has 3 dimensions"),
    (_bad_input_gradient(weight=torch.zeros(5, 1, 3, 3)), "weight has 4 dimensions"),
    (_bad_input_gradient(weight=torch.zeros(3, 3, 4)), "grad and weight disagree on the number of channels"),
    (_bad_input_gradient(size=[7, 5]), "grad is not of the result's size"),
    (_bad_input_gradient(weight=torch.zeros(3, 3, 5).half()), "weight holds torch.float16"),
    (_bad_input_gradient(padding=[1, 1, 1]), r"padding is \[1, 1, 1\]"),
]
