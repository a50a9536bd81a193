"""The op record: one block says everything about an op of the vocabulary.

`define` registers the op with `torch.library` as `torch.ops.compiled_attn.<name>` and keeps the record in `OPS`. Every
facet is present or says aloud why it is absent (`no_gradient("because ...")`); tests/ops/test_complete.py asks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "compiled_attn"


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations (a multiply-add counts two) and bytes of memory read and written.

    Both are ints, or symbolic expressions where a shape is symbolic; never hints.
    """

    flops: Any
    bytes: Any

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class NoGradient:
    """States why an op has no gradient."""

    because: str


def no_gradient(because: str) -> NoGradient:
    return NoGradient(because)


def by_vjp(decomposition: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The gradient of `decomposition` by `torch.func.vjp`, for an op whose forward it equals.

    Returns `gradient(args, kwargs, grads) -> one gradient or None per positional argument`.
    """

    def gradient(args: tuple[Any, ...], kwargs: dict[str, Any], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        wanted = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]

        def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            full = list(args)
            for i, tensor in zip(wanted, tensors, strict=True):
                full[i] = tensor
            out = decomposition(*full, **kwargs)
            outs = out if isinstance(out, tuple) else (out,)
            floating[:] = [i for i, o in enumerate(outs) if o.is_floating_point()]
            return tuple(outs[i] for i in floating)

        floating: list[int] = []
        found_vjp: Any = torch.func.vjp(forward, *(args[i] for i in wanted))
        outs, pull = found_vjp
        given = [grads[i] for i in floating]
        cotangents = tuple(
            torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outs, given, strict=True)
        )
        found = dict(zip(wanted, pull(cotangents), strict=True))
        return tuple(found.get(i) for i in range(len(args)))

    return gradient


@dataclass(frozen=True)
class Op:
    """One op: its equation, and one rule per reading of it."""

    name: str
    schema: str
    reference: Callable[..., Any]
    shape: Callable[..., Any]
    gradient: Callable[..., tuple[Any, ...]] | NoGradient
    cost: Callable[..., Cost]
    decomposition: Callable[..., Any]

    @property
    def overload(self) -> Any:
        """The `torch._ops.OpOverload` that stands in graphs."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)


OPS: dict[str, Op] = {}


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    shape: Callable[..., Any],
    gradient: Callable[..., tuple[Any, ...]] | NoGradient,
    cost: Callable[..., Cost],
    decomposition: Callable[..., Any],
) -> Op:
    """Registers an op once and returns its record.

    schema: as torch.library takes it, without the name: `(Tensor q, Tensor k, *, float scale) -> Tensor`.
    reference: runs in eager mode; returns fresh tensors.  shape: the fake rule, raises OpError in words.
    gradient: `(args, kwargs, grads) -> per positional argument`, or `no_gradient("because ...")`.
    cost: `(*args, **kwargs) -> Cost` on (fake) tensors.  decomposition: traceable, equal to the reference.
    """
    if name in OPS:
        raise ValueError(f"op {name!r} is defined twice")
    custom = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=(), schema=schema)
    custom.register_fake(shape)
    if not isinstance(gradient, NoGradient):
        _register_gradient(custom, gradient)
    op = Op(name, schema, reference, shape, gradient, cost, decomposition)
    OPS[name] = op
    _register_flops(op)
    return op


def op_of(target: Any) -> Op | None:
    """The record behind a node's target, or None where the target is not of the vocabulary."""
    if getattr(target, "namespace", None) != NAMESPACE:
        return None
    return OPS.get(target._schema.name.split("::")[1])


def _register_flops(op: Op) -> None:
    """Lets `torch.utils.flop_counter.FlopCounterMode` count the op by its own rule."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> Any:
        del out_val
        return op.cost(*args, **kwargs).flops

    register_flop_formula(op.overload.overloadpacket, get_raw=True)(flops)


def _register_gradient(custom: Any, gradient: Callable[..., tuple[Any, ...]]) -> None:
    def setup(
        ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: dict[str, Any] | None = None
    ) -> None:  # torch leaves the keywords out where an op has none
        del output
        ctx.tensor_at = [i for i, a in enumerate(inputs) if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_at))
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in inputs]
        ctx.keywords = dict(keyword_only_inputs or {})

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        args = list(ctx.others)
        for i, tensor in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
            args[i] = tensor
        found = gradient(tuple(args), ctx.keywords, grads)
        return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False))

    custom.register_autograd(backward, setup_context=setup)
