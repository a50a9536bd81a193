"""What the shape rules of several ops share: worded refusals that never look at a symbolic size's hint."""

from typing import Any

import torch

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import OpError


def differ(a: Any, b: Any) -> bool:
    """Whether two sizes are known to differ; symbolic sizes that may be equal do not."""
    return a != b if isinstance(a, int) and isinstance(b, int) else _torch.statically_true(a != b)


def exceeds(a: Any, b: Any) -> bool:
    """Whether size a is known to be greater than b."""
    return a > b if isinstance(a, int) and isinstance(b, int) else _torch.statically_true(a > b)


def want_rank(op: str, name: str, tensor: torch.Tensor, letters: str) -> None:
    """Raises OpError unless `tensor` has one dimension per letter."""
    if tensor.dim() != len(letters):
        raise OpError(
            f"{op}: {name} has {tensor.dim()} dimensions",
            facts=f"it is [{', '.join(letters)}]; this one has the shape {tuple(tensor.shape)}",
            do=f"give {name} as [{', '.join(letters)}]",
        )


def want_equal(op: str, what: str, a: str, size_a: Any, b: str, size_b: Any) -> None:
    """Raises OpError where two sizes that must agree are known to differ."""
    if differ(size_a, size_b):
        raise OpError(
            f"{op}: {a} and {b} disagree on {what}",
            facts=f"{a} has {size_a}, {b} has {size_b}",
            do=f"give both the same {what}",
        )


def want_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise OpError(
            f"{op}: {name} holds {tensor.dtype}", facts="it takes floating-point elements", do=f"convert {name} first"
        )


def want_softcap(op: str, softcap: float) -> None:
    """Raises OpError unless scores can be bent to lie between -softcap and softcap, or are left by 0."""
    if not 0.0 <= softcap < float("inf"):
        raise OpError(
            f"{op}: softcap is {softcap}",
            facts="scores are bent to lie between -softcap and softcap; 0 leaves them",
            do="give a number from 0 on",
        )


def capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Scores s as softcap * tanh(s / softcap) (Gemma 2, section 2), or as they are where softcap is 0."""
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def bytes_of(*tensors: torch.Tensor | None) -> Any:
    """Bytes that the elements of the tensors take, a broadcast view counted in full."""
    return sum((t.numel() * t.element_size() for t in tensors if t is not None), 0)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over elements of `dtype` are made: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
