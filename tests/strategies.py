"""What laws draw: specs and a seed, never tensors, so that a failure shrinks and prints; and each op's fixed inputs.

A spec's `tensors()` makes the inputs. Memory around them is filled with NaN, so that a read beside them shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cache_strategies
import decay_strategies
import depthwise_strategies
import local_strategies
import neighborhood_strategies
import ragged_strategies
import torch
from hypothesis import strategies as st

from compiled_attn.ops.linear import ACTIVATIONS, pack

LAYOUTS = ("heads first", "tokens first", "fused", "gapped")
BIASES = (None, "full", "heads", "keys", "queries", "tokens first", "masked", "blind")


@dataclass(frozen=True)
class AttentionSpec:
    """One call of attention. bias "masked": minus infinity here and there; "blind": some queries see nothing."""

    batch: int = 1
    heads: int = 2
    queries: int = 5
    keys: int = 7
    width: int = 16
    value_width: int = 16
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, str, str] = ("fused", "fused", "fused")
    bias: str | None = None
    bias_dtype: torch.dtype = torch.float32
    causal: bool = False
    scale: float = 0.25
    softcap: float = 0.0
    seed: int = 0

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv], and the bias, broadcast."""
        random = torch.Generator().manual_seed(self.seed)
        sizes = ((self.queries, self.width), (self.keys, self.width), (self.keys, self.value_width))
        q, k, v = (
            laid_out((self.batch, self.heads, *size), layout, self.dtype, random)
            for size, layout in zip(sizes, self.layouts, strict=True)
        )
        return q, k, v, self._bias(random)

    def _bias(self, random: torch.Generator) -> torch.Tensor | None:
        if self.bias is None:
            return None
        batch, heads, queries, keys = self.batch, self.heads, self.queries, self.keys
        shapes = {"heads": (1, heads, queries, keys), "keys": (batch, 1, 1, keys), "queries": (1, 1, queries, 1)}
        shape = shapes.get(self.bias, (batch, heads, queries, keys))
        bias = torch.randn(shape, generator=random)
        if self.bias == "keys" or self.bias == "masked":
            bias[torch.rand(shape, generator=random) < 0.4] = float("-inf")
        if self.bias == "blind":
            bias[..., :: max(1, queries // 2), :] = float("-inf")
        if self.bias == "tokens first":
            bias = bias.transpose(2, 3).contiguous().transpose(2, 3)
        return bias.to(self.bias_dtype)


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Random numbers of the shape [B, H, N, D], the last dimension dense, the rest as the layout says."""
    batch, heads, tokens, width = shape
    if layout == "heads first":
        memory = torch.full(shape, torch.nan, dtype=dtype)
    elif layout == "tokens first":
        memory = torch.full((batch, tokens, heads, width), torch.nan, dtype=dtype).transpose(1, 2)
    elif layout == "fused":
        memory = torch.full((batch, tokens, 3, heads, width), torch.nan, dtype=dtype)[:, :, 1].transpose(1, 2)
    else:
        wide = torch.full((tokens + 1, batch, heads + 1, width + 3), torch.nan, dtype=dtype)
        memory = wide[1:, :, 1:, 2 : width + 2].permute(1, 2, 0, 3)
    memory.copy_(torch.randn(shape, generator=random))
    return memory


@dataclass(frozen=True)
class SelectSpec:
    """One call of select_tokens. scores: "ties" are drawn from four values, "odd" hold NaN and infinities too."""

    batch: int = 2
    scored: int = 9
    channels: int = 8
    prefix: int = 1
    keep: int = 4
    fuse: bool = False
    scores: str = "plain"
    dtype: torch.dtype = torch.float32
    score_dtype: torch.dtype = torch.float32
    gapped: bool = False
    seed: int = 0

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, prefix + scored, C], score [B, scored]."""
        random = torch.Generator().manual_seed(self.seed)
        count = self.prefix + self.scored
        x = torch.randn(self.batch, count, self.channels, generator=random)
        score = torch.rand(self.batch, self.scored, generator=random)
        if self.scores != "plain":
            score = (score * 4).round() / 4 - 0.5
        if self.scores == "odd":
            for value in (torch.nan, torch.inf, -torch.inf, -0.0):
                score[torch.rand(score.shape, generator=random) < 0.15] = value
        x, score = x.to(self.dtype), score.to(self.score_dtype)
        if self.gapped:
            wide = torch.full((count, self.batch, self.channels + 2), torch.nan, dtype=self.dtype)
            x = wide[:, :, 1:-1].transpose(0, 1).copy_(x)
            score = torch.full((self.scored, self.batch), torch.nan, dtype=self.score_dtype).T.copy_(score)
        return x, score


DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**16)


@st.composite
def attention_specs(draw: st.DrawFn) -> AttentionSpec:
    sizes = st.one_of(st.integers(1, 20), st.integers(1, 150))
    widths = st.one_of(st.sampled_from([16, 32, 64, 80, 96, 128]), st.integers(1, 160))
    width = draw(widths)
    return AttentionSpec(
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        queries=draw(sizes),
        keys=draw(sizes),
        width=width,
        value_width=draw(st.one_of(st.just(width), widths)),
        dtype=draw(DTYPES),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        bias=draw(st.sampled_from(BIASES)),
        bias_dtype=draw(DTYPES),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([0.02, 0.125, 1.0])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        seed=draw(SEEDS),
    )


@st.composite
def select_specs(draw: st.DrawFn) -> SelectSpec:
    scored = draw(st.one_of(st.integers(1, 12), st.integers(1, 300)))
    return SelectSpec(
        batch=draw(st.integers(1, 4)),
        scored=scored,
        channels=draw(st.one_of(st.integers(1, 40), st.sampled_from([128, 192, 333]))),
        prefix=draw(st.integers(0, 2)),
        keep=draw(st.integers(0, scored)),
        fuse=draw(st.booleans()),
        scores=draw(st.sampled_from(["plain", "ties", "odd"])),
        dtype=draw(DTYPES),
        score_dtype=draw(DTYPES),
        gapped=draw(st.booleans()),
        seed=draw(SEEDS),
    )


@dataclass(frozen=True)
class LinearSpec:
    """One call of packed_linear: x [M, K], a weight [N, K] packed in blocks of `columns`."""

    rows: int = 5
    inner: int = 6
    outer: int = 10
    columns: int = 8
    bias: bool = True
    residual: bool = True
    activation: str = "none"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def weight(self) -> torch.Tensor:
        """The weight [N, K] before it is packed."""
        return torch.randn(self.outer, self.inner, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x, the packed weight, the bias and the residual."""
        random = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.rows, self.inner, generator=random).to(self.dtype)
        bias = torch.randn(self.outer, generator=random).to(self.dtype) if self.bias else None
        residual = torch.randn(self.rows, self.outer, generator=random).to(self.dtype) if self.residual else None
        return x, pack(self.weight(), self.columns), bias, residual


@st.composite
def linear_specs(draw: st.DrawFn) -> LinearSpec:
    """Ragged sizes; K even, as pairs of bfloat16 want it. `columns` is left to the test, which knows the lanes."""
    return LinearSpec(
        rows=draw(st.integers(1, 40)),
        inner=2 * draw(st.integers(1, 60)),
        outer=draw(st.integers(1, 150)),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        seed=draw(st.integers(0, 9)),
    )


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of an op. make: dtype -> positional arguments."""

    name: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    kwargs: dict[str, Any]


def _attention_inputs(spec: AttentionSpec, **kwargs: Any) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, bias = spec.tensors()
        return q.to(dtype), k.to(dtype), v.to(dtype), None if bias is None else bias.to(dtype)

    return Inputs(f"bias {spec.bias}, {kwargs}", make, {"scale": spec.scale, **kwargs})


def _linear_inputs(spec: LinearSpec) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return replace(spec, dtype=dtype).tensors()

    options = {"outer": spec.outer, "activation": spec.activation}
    return Inputs(f"bias {spec.bias}, residual {spec.residual}, {options}", make, options)


def _select_inputs(spec: SelectSpec) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x, score = spec.tensors()
        return x.to(dtype), score.to(dtype), spec.keep

    return Inputs(f"keep {spec.keep}, fuse {spec.fuse}", make, {"prefix": spec.prefix, "fuse": spec.fuse})


INPUTS: dict[str, list[Inputs]] = {
    "attention": [
        _attention_inputs(AttentionSpec(batch=2)),
        _attention_inputs(AttentionSpec(batch=2, bias="heads", value_width=8)),
        _attention_inputs(AttentionSpec(batch=2, queries=7, bias="masked"), causal=True),
        _attention_inputs(AttentionSpec(batch=2, bias="keys", layouts=("gapped",) * 3)),
        _attention_inputs(AttentionSpec(batch=2, bias="masked"), softcap=1.5),
    ],
    "attention_with_class_row": [
        _attention_inputs(AttentionSpec(batch=2)),
        _attention_inputs(AttentionSpec(batch=2, bias="heads"), row=3),
        _attention_inputs(AttentionSpec(batch=2, bias="keys")),
    ],
    "select_tokens": [
        _select_inputs(SelectSpec()),
        _select_inputs(SelectSpec(fuse=True, prefix=2)),
        _select_inputs(SelectSpec(keep=9, fuse=True, scores="ties")),
    ],
    "packed_linear": [
        _linear_inputs(LinearSpec()),
        _linear_inputs(LinearSpec(residual=False, activation="gelu")),
        _linear_inputs(LinearSpec(bias=False, residual=False, activation="relu", outer=16)),
        _linear_inputs(LinearSpec(activation="silu", columns=4)),
        _linear_inputs(LinearSpec(activation="gelu_tanh")),
    ],
    "decay_attention": [Inputs(name, spec.make, spec.options) for name, spec in decay_strategies.CASES.items()],
    "local_attention": [Inputs(name, spec.make, spec.options) for name, spec in local_strategies.CASES.items()],
    "neighborhood_apply": [
        Inputs(name, spec.make, spec.options) for name, spec in neighborhood_strategies.CASES.items()
    ],
    "depthwise_block": [Inputs(name, spec.make, spec.options) for name, spec in depthwise_strategies.CASES.items()],
    "depthwise_input_gradient": [
        Inputs(name, spec.make_input_gradient, spec.input_gradient_options)
        for name, spec in depthwise_strategies.GRADIENT_CASES.items()
    ],
    "depthwise_weight_gradient": [
        Inputs(name, spec.make_gradient, spec.gradient_options)
        for name, spec in depthwise_strategies.GRADIENT_CASES.items()
    ],
    "pack_tokens": [Inputs(name, spec.tensors, {}) for name, spec in ragged_strategies.PACK.items()],
    "unpack_tokens": [Inputs(name, spec.packed, {}) for name, spec in ragged_strategies.PACK.items()],
    "ragged_attention": [Inputs(name, spec.make, spec.options) for name, spec in ragged_strategies.ATTENTION.items()],
    "cache_append": [Inputs(name, spec.appending, {}) for name, spec in cache_strategies.APPEND.items()],
    "cache_evict": [Inputs(name, spec.evicting, {}) for name, spec in cache_strategies.EVICT.items()],
    "cached_attention": [Inputs(n, spec.attention, spec.options) for n, spec in cache_strategies.ATTENTION.items()],
}


def _bad_linear(**changed: Any) -> dict[str, Any]:
    x, packed, bias, residual = LinearSpec().tensors()
    return {"x": x, "packed": packed, "bias": bias, "residual": residual, "outer": 10, **changed}


def _bad_attention(**changed: torch.Tensor) -> dict[str, Any]:
    q, k, v, _ = AttentionSpec().tensors()
    return {"q": q, "k": k, "v": v, "bias": None, "scale": 1.0, **changed}


def _bad_select(**changed: Any) -> dict[str, Any]:
    x, score = SelectSpec().tensors()
    return {"x": x, "score": score, "keep": 4, **changed}


BAD_ATTENTION = [
    (_bad_attention(q=torch.zeros(2, 5, 16)), "q has 3 dimensions"),
    (_bad_attention(k=torch.zeros(1, 2, 7, 8)), "q and k disagree on the head width"),
    (_bad_attention(v=torch.zeros(1, 2, 6, 16)), "k and v disagree on the number of keys"),
    (_bad_attention(v=torch.zeros(1, 3, 7, 16)), "q and v disagree on the number of heads"),
    (_bad_attention(k=torch.zeros(1, 2, 7, 16).bfloat16()), "q and k disagree on the element type"),
    (_bad_attention(bias=torch.zeros(5, 6)), "bias does not broadcast"),
    (_bad_attention(bias=torch.zeros(5, 7, dtype=torch.bool)), "bias holds torch.bool"),
]

# Op -> (keyword arguments, words of the error).
BAD_INPUTS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "attention": [*BAD_ATTENTION, (_bad_attention() | {"softcap": -1.0}, "softcap is -1")],
    "attention_with_class_row": [
        *BAD_ATTENTION,
        (_bad_attention() | {"row": 5}, "there is no query 5"),
        (_bad_attention() | {"row": -1}, "there is no query -1"),
    ],
    "select_tokens": [
        (_bad_select(x=torch.zeros(2, 10)), "x has 2 dimensions"),
        (_bad_select(score=torch.zeros(2, 10)), "x and score disagree on the number of tokens"),
        (_bad_select(score=torch.zeros(3, 9)), "x and score disagree on the batch size"),
        (_bad_select(score=torch.zeros(2, 9, dtype=torch.int64)), "score holds torch.int64"),
        (_bad_select(keep=10), "cannot keep 10 tokens"),
        (_bad_select(keep=-1), "cannot keep -1 tokens"),
    ],
    "packed_linear": [
        (_bad_linear(x=torch.zeros(2, 5, 6)), "x has 3 dimensions"),
        (_bad_linear(x=torch.zeros(5, 7)), "x and packed disagree on the input width"),
        (_bad_linear(outer=17), "2 blocks of 8 columns do not hold 17"),
        (_bad_linear(outer=8), "2 blocks of 8 columns do not hold 8"),
        (_bad_linear(activation="tanh"), "there is no activation 'tanh'"),
        (_bad_linear(bias=torch.zeros(9)), "bias and outer disagree on the output width"),
        (_bad_linear(residual=torch.zeros(4, 10)), "residual and x disagree on the number of rows"),
        (_bad_linear(bias=torch.zeros(10).bfloat16()), "bias holds torch.bfloat16"),
    ],
    "decay_attention": decay_strategies.BAD,
    "local_attention": local_strategies.BAD,
    "neighborhood_apply": neighborhood_strategies.BAD,
    "depthwise_block": depthwise_strategies.BAD,
    "depthwise_input_gradient": depthwise_strategies.BAD_INPUT_GRADIENT,
    "depthwise_weight_gradient": depthwise_strategies.BAD_GRADIENT,
    **ragged_strategies.BAD,
    **cache_strategies.BAD,
}
