"""What single values in a graph are: scalars behind constants, casts, readers that do not count."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from compiled_attn.ir.program import Program

aten = torch.ops.aten

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar}
ADD = {aten.add.Tensor, aten.add.Scalar}
SUBTRACT = {aten.sub.Tensor, aten.sub.Scalar}
FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
FLOOR = {aten.clamp_min.default, aten.clamp.default, aten.maximum.default, aten.max.other}
ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default}


def scalar(program: Program, value: Any) -> float | None:
    """The number that a Python scalar, or a node of one element made of constants alone, holds; None for any other.

    Parameters and buffers are no constants: they may change after capture.
    """
    if isinstance(value, (bool, torch.SymBool)):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    fake = value.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.dim() > 6 or any(size != 1 for size in fake.shape if _is_int(size)):
        return None
    if not all(_is_int(size) for size in fake.shape) or fake.is_complex():
        return None
    found = _evaluate(program, value, depth=12)
    return None if found is None else float(found.reshape(()).item())


def _is_int(size: Any) -> bool:
    return isinstance(size, int)


def _evaluate(program: Program, node: fx.Node, depth: int) -> torch.Tensor | None:
    if node.op == "placeholder":
        return _constant(program, node)
    if depth == 0 or node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    values: dict[fx.Node, torch.Tensor] = {}
    for source in node.all_input_nodes:
        found = _evaluate(program, source, depth - 1)
        if found is None or found.numel() > 1:
            return None
        values[source] = found
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) and result.numel() == 1 else None


def _constant(program: Program, node: fx.Node) -> torch.Tensor | None:
    for spec in program.signature.input_specs:
        if getattr(spec.arg, "name", None) == node.name and spec.kind == InputKind.CONSTANT_TENSOR:
            if program.origin.get(spec.target or ""):
                return None  # folded from weights, which may change
            found = program.constants.get(spec.target or "")
            return found if isinstance(found, torch.Tensor) else None
    return None


def readers(node: fx.Node) -> list[fx.Node]:
    """Users of a node, without the checks of its metadata and the reads of its sizes."""
    return [u for u in node.users if u.target not in ASSERTIONS and u.target is not aten.sym_size.int]


def erase_checks(node: fx.Node) -> None:
    """Drops the checks of a node's metadata, which would keep it alive; capture has proved them."""
    for user in list(node.users):
        if user.target in ASSERTIONS and not user.users:
            user.graph.erase_node(user)


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments (training programs keep such ops)."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def is_tensor(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument by position or by keyword."""
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def normal_dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def inactive_dropout(node: fx.Node) -> bool:
    """Dropout that passes its input through: not in training, or with probability 0."""
    if node.target is not aten.dropout.default:
        return False
    return not argument(node, 2, "train", False) or argument(node, 1, "p", 0.0) == 0.0


def active_dropout(node: fx.Node) -> float | None:
    """The probability of a dropout that drops."""
    if node.target is aten.dropout.default and not inactive_dropout(node):
        return float(argument(node, 1, "p", 0.0))
    if node.target is operator.getitem and node.args[1] == 0:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is aten.native_dropout.default:
            return float(argument(source, 1, "p", 0.0)) if argument(source, 2, "train", True) else 0.0
    return None


def finite_floor(value: float) -> bool:
    """Whether adding any score to `value` leaves it as it is: more negative than any score's rounding reaches."""
    return math.isfinite(value) and value <= -1e30
