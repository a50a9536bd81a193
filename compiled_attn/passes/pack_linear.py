"""Chooses, for each linear map with constant weights on a CPU, the matrix product that serves it best.

    y = linear(x, w, b)        ->    y = linear(x, w, b)                             gemm "onednn": packed by freezing
    z = gelu(linear(x, v, c))  ->    z = packed_linear(x, pack(v), c, "gelu")        gemm "cpp"
    t = linear(x, u, d)        ->    t = bmm(x[None], u^T[None])[0] + d              gemm "aten"

The decision is written on the node (`meta["compiled_attn"]["gemm"]`); `apply_linear_choices` turns it into ops in
lowering, where weights are packed. GELU, ReLU, SiLU or an added residual behind the product goes into its epilogue.
Candidates:

- "cpp": our kernel (ops/kernels/cpp/gemm.h);
- "onednn": ATen's linear as it stands, which Inductor's freezing packs for oneDNN when it builds ahead of time;
- "aten": ATen's own product (MKL) on the weights as they are, written as a product of one batch, which freezing does
  not look for.

Inductor's own C++ product is not among them: where oneDNN gave 246 GF/s and MKL 104 on an AVX-512 core (197 x 384 x
1536, float32), it gave 85, and it was found in front of neither on any shape tried.

Never changes which weights are used, reads a hint of a symbolic size, or touches a product of two computed tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.program import Edit, Program
from compiled_attn.ops.linear import pack, packed_linear
from compiled_attn.ops.templates import cpp_gemm
from compiled_attn.passes.fold_constants import constant_placeholders

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target

aten = torch.ops.aten
Measure = Callable[[Mapping[str, Any], Mapping[str, Callable[[], Callable[[], Any]]]], dict[str, float]]

# Weights up to which our kernel was seen ahead of the others (AVX-512, M from 1 to 1576; by 5 to 90 %).
CPP_UP_TO = 4_000_000
# Multiply-adds from which oneDNN wins over ATen. Its call costs some 12 us more than MKL's and it then computes at
# least twice as fast: seen on Zen 5, one core, for M 1 to 1576 and K x N from 16 x 16 to 2048 x 8192.
ONEDNN_FROM = {torch.float32: 800_000, torch.bfloat16: 40_000}
UNARY: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "swish"}
ADD = (aten.add.Tensor,)
ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu", "swish": "silu"}
KEY = "compiled_attn"


@dataclass(frozen=True)
class Linear:
    """One linear map y [M, N] = x [M, K] w^T + b, and what is computed behind it.

    rows: (lowest, highest) M, highest None where it is unbounded.  epilogue: "none", "gelu", "gelu_tanh", "relu",
    "swish" or "add".
    """

    rows: tuple[int, int | None]
    inner: int
    outer: int
    dtype: torch.dtype
    bias: bool
    epilogue: str

    @property
    def text(self) -> str:
        low, high = self.rows
        rows = str(low) if low == high else f"{low}.." + ("" if high is None else str(high))
        behind = "" if self.epilogue == "none" else f" + {self.epilogue}"
        return f"{rows}x{self.inner}x{self.outer} {str(self.dtype).removeprefix('torch.')}{behind}"

    def flops(self, rows: int) -> int:
        return 2 * rows * self.inner * self.outer

    def sizes(self) -> tuple[int, ...]:
        """The M to measure: the bucket of the only one, or of the lowest and of eight times that."""
        low, high = max(self.rows[0], 1), self.rows[1]
        if low == high:
            return (bucket(low),)
        most = 8 * low if high is None else min(8 * low, high)
        return tuple(dict.fromkeys((bucket(low), bucket(most))))


def bucket(rows: int) -> int:
    """M rounded up to one of four steps an octave, so that near sizes share a measurement; exact up to 32."""
    if rows <= 32:
        return rows
    step = 1 << (rows.bit_length() - 3)
    return math.ceil(rows / step) * step


def describe(node: fx.Node, program: Program, constants: Mapping[str, str]) -> Linear | str:
    """The linear map of a node, or because of what it is left as it is."""
    x, weight, bias = operands(node)
    weight = gates(weight)[0]
    if weight.name not in constants:
        return f"its weight is computed ({weight.name}), so it can not be packed ahead"
    if bias is not None and bias.name not in constants:
        return f"its bias is computed ({bias.name})"
    value = weight.meta["val"]
    if value.dtype not in ONEDNN_FROM:
        return f"no packed product for {str(value.dtype).removeprefix('torch.')}, only for float32 and bfloat16"
    if x.meta["val"].dtype != value.dtype:
        return f"its input is {x.meta['val'].dtype} and its weight {value.dtype}"
    if value.dim() != 2:
        return f"its weight has {value.dim()} dimension"
    transposed = node.target is not aten.linear.default
    inner, outer = value.shape if transposed else reversed(value.shape)
    if not isinstance(inner, int) or not isinstance(outer, int):
        return "its weight has a symbolic size"
    low: int = 1
    high: int | None = 1
    for size in x.meta["val"].shape[:-1]:
        least, most = _torch.size_bounds(size, program.ranges)
        low, high = low * max(least, 1), None if high is None or most is None else high * most
    return Linear((low, high), inner, outer, value.dtype, bias is not None, epilogue(node))


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(input, weight, bias) of aten.linear, aten.addmm or aten.mm."""
    args: list[Any] = list(node.args)
    if node.target is aten.addmm.default:
        return args[1], args[2], args[0]
    bias = args[2] if node.target is aten.linear.default and len(args) > 2 else node.kwargs.get("bias")
    return args[0], args[1], bias if isinstance(bias, fx.Node) else None


def gates(weight: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """A weight [N, K], and the computed factors [K] of its columns (GateWeights), if it has some."""
    value, factors = weight.args if weight.target is aten.mul.Tensor else (None, None)
    if not isinstance(value, fx.Node) or not isinstance(factors, fx.Node):
        return weight, None
    ranks = (value.meta["val"].dim(), factors.meta["val"].dim())
    return (value, factors) if ranks == (2, 1) else (weight, None)


def epilogue(node: fx.Node) -> str:
    """What can be computed in the product's epilogue: an activation, or the sum with a tensor of the same shape."""
    if len(node.users) != 1:
        return "none"
    user = next(iter(node.users))
    if user.target is aten.gelu.default:
        return "gelu_tanh" if user.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if user.target in ADD and user.kwargs.get("alpha", 1) == 1:
        other = next((a for a in user.args if a is not node), None)
        if isinstance(other, fx.Node) and isinstance(other.meta.get("val"), torch.Tensor):
            a, b = other.meta["val"], node.meta["val"]
            same = a.dim() == b.dim() and a.dtype == b.dtype
            if same and all(_torch.statically_true(m == n) for m, n in zip(a.shape, b.shape, strict=True)):
                return "add"
    return UNARY.get(user.target, "none")


def by_rule(case: Linear, target: Target) -> str:
    """Ours where it was seen ahead; else oneDNN where the work outweighs the cost of its call, at the smallest size."""
    if ours_is_ahead(case.inner, case.outer, case.dtype, target):
        return "cpp"
    return "onednn" if max(case.rows[0], 1) * case.inner * case.outer >= ONEDNN_FROM[case.dtype] else "aten"


def ours_is_ahead(inner: int, outer: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether our kernel was seen ahead of the others for weights of that size, at any number of rows."""
    matrix_unit = dtype == torch.bfloat16 and "amx_bf16" in target.needs  # which oneDNN uses and we do not
    seen = target.isa == "avx512" and inner * outer <= CPP_UP_TO and not matrix_unit
    return seen and cpp_gemm.refuses(dtype, inner, target) is None


def by_measure(case: Linear, measure: Measure, target: Target) -> tuple[str, dict[int, dict[str, float]]]:
    """The candidate whose worst time, relative to the best at each measured M, is least."""
    candidates: dict[str, Callable[[Linear, int], Callable[[], Any]]] = {"onednn": _onednn, "aten": _aten}
    if cpp_gemm.refuses(case.dtype, case.inner, target) is None:
        candidates["cpp"] = partial(_cpp, target)
    times = {
        rows: measure(
            {
                "what": "linear",
                "rows": rows,
                "inner": case.inner,
                "outer": case.outer,
                "dtype": str(case.dtype),
                "bias": case.bias,
                "epilogue": case.epilogue,
            },
            {name: partial(make, case, rows) for name, make in candidates.items()},
        )
        for rows in case.sizes()
    }
    worst = {
        name: max(taken[name] / min(taken.values()) for taken in times.values()) for name in next(iter(times.values()))
    }
    return min(worst, key=lambda name: worst[name]), times


def _tensors(case: Linear, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(rows, case.inner, generator=made).to(case.dtype)
    w = torch.randn(case.outer, case.inner, generator=made).to(case.dtype)
    b = torch.randn(case.outer, generator=made).to(case.dtype) if case.bias else None
    return x, w, b, torch.randn(rows, case.outer, generator=made).to(case.dtype)


def _aten(case: Linear, rows: int) -> Callable[[], Any]:
    x, w, b, other = _tensors(case, rows)
    behind: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "none": lambda y: y,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "relu": torch.relu,
        "swish": torch.nn.functional.silu,
        "add": lambda y: y + other,
    }
    last = behind[case.epilogue]
    return lambda: last(torch.nn.functional.linear(x, w, b))


def _onednn(case: Linear, rows: int) -> Callable[[], Any]:
    x, w, b, other = _tensors(case, rows)
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(w, rows)
    if case.epilogue == "add":
        return lambda: ops._linear_pointwise.binary(x, other, packed, b, "add")
    name, _, kind = case.epilogue.partition("_")
    algorithm = {"gelu": kind or "none"}.get(name, "")
    return lambda: ops._linear_pointwise(x, packed, b, name, [], algorithm)


def _cpp(target: Target, case: Linear, rows: int) -> Callable[[], Any]:
    """Our kernel, compiled by itself (once a kind of case; kept by Inductor's cache of libraries)."""
    x, w, b, other = _tensors(case, rows)
    packed, out = pack(w, cpp_gemm.columns(case.outer, target)), torch.empty(rows, case.outer, dtype=case.dtype)
    activation = ACTIVATION.get(case.epilogue, "none")
    function = _torch.cpp_function(cpp_gemm.standalone(case.dtype, case.outer, activation, target))
    residual = other if case.epilogue == "add" else None
    tensors = [0 if t is None else t.data_ptr() for t in (x, packed, b, residual, out)]

    def call() -> torch.Tensor:
        function(*tensors, rows, case.inner, case.outer)
        return out

    call.keep = (x, packed, b, residual)  # type: ignore[attr-defined]
    return call


def choose(program: Program, measure: Measure | None, target: Target, notes: Notes) -> dict[fx.Node, str]:
    """Node of `program` -> its product, for every linear map with constant weights; each is noted, misses too."""
    constants = constant_placeholders(program)
    found: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.target not in (aten.linear.default, aten.addmm.default, aten.mm.default):
            continue
        if node.target is aten.mm.default and operands(node)[1].op != "placeholder":
            continue  # a product of two computed tensors is no linear map
        case = describe(node, program, constants)
        if isinstance(case, str):
            notes.miss(node, "pack-linear", case)
            continue
        if gates(operands(node)[1])[1] is not None:
            found[node] = "cpp"
            notes.did(node, "pack-linear", f"{case.text}: cpp", "whose packed weights can take its gates")
            continue
        if not torch.backends.mkldnn.is_available():
            found[node] = "aten"
            notes.miss(node, "pack-linear", "this torch was built without oneDNN")
            continue
        if measure is None:
            found[node] = by_rule(case, target)
            notes.did(node, "pack-linear", f"{case.text}: {found[node]}", "by rule")
        else:
            found[node], times = by_measure(case, measure, target)
            notes.did(node, "pack-linear", f"{case.text}: {found[node]}", _speeds(case, times))
    return found


def _speeds(case: Linear, times: Mapping[int, Mapping[str, float]]) -> str:
    def one(rows: int, taken: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {case.flops(rows) / seconds / 1e9:.0f} GF/s" for name, seconds in taken.items())

    return "; ".join(f"M {rows}: {one(rows, taken)}" for rows, taken in times.items())


@dataclass(frozen=True)
class PackLinear:
    """Writes on every linear map with constant weights which product serves it.

    tune: "heuristic" goes by a rule, "measure" times each distinct case once with `measure`, the runtime's service.
    """

    tune: str = "heuristic"
    measure: Measure | None = field(default=None, repr=False, compare=False)
    name: ClassVar[str] = "pack-linear"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tune not in ("heuristic", "measure"):
            raise PassError(f"unknown tune {self.tune!r}", facts="it is heuristic or measure", do="choose one of them")
        if self.tune == "measure" and self.measure is None:
            raise PassError(
                "there is nothing to measure with",
                facts="tune='measure' needs the measurement service; the pass was made without one",
                do="pass measure=compiled_attn.runtime.measure.SERVICE, or let compile(tune='measure') do it",
            )

    def run(self, program: Program, target: Target, notes: Notes) -> Program:
        if target.kind != "cpu":
            return program
        chosen = choose(program, self.measure if self.tune == "measure" else None, target, notes)
        if all(node.meta.get(KEY, {}).get("gemm") == gemm for node, gemm in chosen.items()):
            return program
        edit = program.edit()
        for node, gemm in chosen.items():
            copy = edit.node_of[node]
            copy.meta[KEY] = {**copy.meta.get(KEY, {}), "gemm": gemm}
        return edit.finish(self.name)


def apply_linear_choices(program: Program, target: Target) -> Program:
    """The program with each decision turned into ops, for lowering; itself where nothing is to be turned."""
    chosen = [n for n in program.graph.nodes if n.meta.get(KEY, {}).get("gemm") in ("aten", "cpp")]
    if not chosen:
        return program
    edit = program.edit()
    names = constant_placeholders(program)
    packed: dict[tuple[str, int], fx.Node] = {}
    for node in chosen:
        old = edit.node_of[node]
        x, weight, bias = operands(old)
        if node.meta[KEY]["gemm"] == "cpp":
            _packed(edit, old, program, names, packed, target)
            continue
        with edit.graph.inserting_before(old):
            edit.replace(old, _one_batch(edit, old, x, weight, bias))
    return edit.finish("apply-linear-choices")


def _packed(
    edit: Edit,
    old: fx.Node,
    program: Program,
    names: Mapping[str, str],
    packed: dict[tuple[str, int], fx.Node],
    target: Target,
) -> None:
    """Puts our op in the place of a linear map and of what its epilogue computes; equal weights are packed once."""
    x, weight, bias = operands(old)
    weight, factors = gates(weight)
    behind = epilogue(old)
    last = old if behind == "none" else next(iter(old.users))
    value = program.tensors()[weight.name]
    value = value if old.target is aten.linear.default else value.t()
    columns = cpp_gemm.columns(value.shape[0], target)
    key = (weight.name, columns)
    if key not in packed:
        name = f"{names[weight.name]}_packed{columns}"
        packed[key] = edit.constant(name, pack(value.detach(), columns), made_from=(names[weight.name],))
    with edit.graph.inserting_before(last):
        leading = [_size(edit, old, x, d) for d in range(x.meta["val"].dim() - 1)]
        rows = edit.call(aten.reshape.default, (x, [-1, value.shape[1]]), like=old)
        residual = None
        if behind == "add":
            other = next(a for a in last.args if a is not old)
            residual = edit.call(aten.reshape.default, (other, [-1, value.shape[0]]), like=last)
        weights = packed[key]
        if factors is not None:
            _, steps, _, side = weights.meta["val"].shape
            spread = edit.call(aten.reshape.default, (factors, [1, steps, 1, side]), like=old)
            weights = edit.call(aten.mul.Tensor, (weights, spread), like=old)
        options = {"outer": value.shape[0], "activation": ACTIVATION.get(behind, "none")}
        new = edit.call(packed_linear.overload, (rows, weights, bias, residual), options, like=last)
        out = edit.call(aten.reshape.default, (new, [*leading, value.shape[0]]), like=last)
    edit.replace(last, out)


def _one_batch(edit: Edit, old: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """x [..., K] times w^T as a batch of one: [1, M, K] x [1, K, N], reshaped to [..., N], plus the bias."""
    leading = [_size(edit, old, x, d) for d in range(x.meta["val"].dim() - 1)]
    inner = x.meta["val"].shape[-1]
    if old.target is aten.linear.default:
        weight = edit.call(aten.permute.default, (weight, [1, 0]), like=old)
    outer = weight.meta["val"].shape[1]
    rows = edit.call(aten.reshape.default, (x, [1, -1, inner]), like=old)
    right = edit.call(aten.unsqueeze.default, (weight, 0), like=old)
    product = edit.call(aten.bmm.default, (rows, right), like=old)
    out = edit.call(aten.reshape.default, (product, [*leading, outer]), like=old)
    return out if bias is None else edit.call(aten.add.Tensor, (out, bias), like=old)


def _size(edit: Edit, old: fx.Node, x: fx.Node, dimension: int) -> Any:
    size = x.meta["val"].shape[dimension]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, (x, dimension), like=old)
