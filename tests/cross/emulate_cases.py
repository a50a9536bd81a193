"""What is emulated: every op and every paper (a new one is a case by itself), three stock models and two passes.

A step of training too, forward and backward: of every op that has a gradient and a Triton template, and of a module.

`of(name)` gives a case's model and inputs. `Case.batched` says which first dimensions are the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from gaps import GAPS
from strategies import INPUTS, Inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from compiled_attn import passes, zoo
from compiled_attn.ir.errors import CompiledAttnError
from compiled_attn.ir.op import OPS, NoGradient, Op
from compiled_attn.ops.templates.registry import TEMPLATES
from compiled_attn.zoo.volo import OutlookAttention

# timm name -> a tiny configuration, side of the pictures
STOCK: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 48, "depth": 2, "embed_dim": 32, "num_heads": 2}, 48),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (2,), "embed_dim": 16, "num_heads": (2,)}, 56),
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
}
# name of an approximate pass -> the pass, on the first of those models
PASSES: dict[str, Any] = {
    "reorganize-tokens": passes.ReorganizeTokens(keep_rate=0.7, at=(0, 1)),
    "prune-tokens": passes.PruneTokens(mass=0.9, at=(0, 1)),
}
GAP = "emulated "  # how a case's entry in gaps.GAPS begins; a call of an op that has one is a case of its own
APART = [
    f"op {op}: {i.name}" for op in OPS for i in INPUTS[op] if any(k.startswith(f"{GAP}op {op}: {i.name}") for k in GAPS)
]
SERVED = {t.op for t in TEMPLATES if t.device == "cuda" and not t.op.endswith("_gradient")}
TRAINED = ["outlook attention", *(op for op in OPS if op in SERVED and not isinstance(OPS[op].gradient, NoGradient))]
KINDS = (("op", OPS), ("paper", zoo.PAPERS), ("timm", STOCK), ("pass", PASSES), ("train", TRAINED))
NAMES = [*(f"{kind} {name}" for kind, names in KINDS for name in names), *APART]


@dataclass(frozen=True)
class Case:
    """A model and its inputs. batched: for each tensor, in flat order, whether its first dimension is the batch.

    named: passes that change the numbers; what is wanted then is the rewritten program's, op by op.  trained: behind
    the outputs come the gradients of half their sum of squares by every floating-point parameter, buffer and input.
    """

    model: nn.Module
    args: tuple[Any, ...]
    batched: tuple[bool, ...]
    named: tuple[Any, ...] = ()
    trained: bool = False

    def dynamic_shapes(self) -> Any:
        """As torch.export takes it: first dimensions that grow are symbols, equal ones the same."""
        each = iter(self.batched)

        def one(value: Tensor) -> dict[int, str] | None:
            return {0: f"batch{value.shape[0]}"} if next(each) else None

        return pytree.tree_map(one, self.args)


def of(name: str) -> Case:
    """The case of that name: `op <op>`, `op <op>: <one of its inputs>`, `paper`, `timm`, `pass` or `train <name>`."""
    kind, rest = name.split(" ", 1)
    return {"op": _op, "paper": _paper, "timm": _stock, "pass": _pass, "train": _train}[kind](rest)


class Calls(nn.Module):
    """Every call of an op that INPUTS lists, with pointwise work behind it and, at every second, in front."""

    def __init__(self, op: Op, fixed: list[tuple[list[Any], dict[str, Any]]]) -> None:
        super().__init__()
        self.op = op
        self.fixed = fixed

    def forward(self, calls: list[list[Tensor]]) -> list[Tensor]:
        """A list of tensors for each call -> its outputs, each as it is and behind pointwise work."""
        found: list[Tensor] = []
        for i, (tensors, (args, kwargs)) in enumerate(zip(calls, self.fixed, strict=True)):
            if i % 2:
                tensors = [t * 0.5 if t.dtype.is_floating_point else t for t in tensors]
            outputs = self._outputs(args, kwargs, iter(tensors))
            found += [*outputs, *(F.silu(o) if o.dtype.is_floating_point else o + 1 for o in outputs)]
        return found

    def _outputs(self, args: list[Any], kwargs: dict[str, Any], tensors: Iterator[Tensor]) -> list[Tensor]:
        out = self.op.overload(*[next(tensors) if a is HERE else a for a in args], **kwargs)
        return [out] if isinstance(out, Tensor) else list(out)


HERE = object()  # stands in a call's arguments for a tensor


def _op(name: str) -> Case:
    name, _, one = name.partition(": ")
    op = OPS[name]
    groups: list[list[Tensor]] = []
    fixed: list[tuple[list[Any], dict[str, Any]]] = []
    batched: list[bool] = []
    for inputs in INPUTS[name]:
        wanted = inputs.name == one if one else f"op {name}: {inputs.name}" not in APART
        if not wanted:
            continue
        args = list(inputs.make(torch.float32))
        grows = growing(op, inputs, args)
        if grows and args[grows[0]].shape[0] == 1:  # a batch of one would not be a symbol
            for i in grows:
                args[i] = larger(args[i], 2)
        at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        groups.append([args[i] for i in at])
        fixed.append(([HERE if isinstance(a, Tensor) else a for a in args], inputs.kwargs))
        batched += [i in grows for i in at]
    return Case(Calls(op, fixed), (groups,), tuple(batched))


def growing(op: Op, inputs: Inputs, args: list[Any]) -> list[int]:
    """Positions of the tensors whose first dimension is the batch: the most that can grow with the first one."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    size = args[tensors[0]].shape[0]
    others = [i for i in tensors[1:] if args[i].dim() and args[i].shape[0] == size]
    for count in range(len(others), -1, -1):
        for chosen in itertools.combinations(others, count):
            grown = [larger(a, size + 1) if i in (tensors[0], *chosen) else a for i, a in enumerate(args)]
            try:
                op.overload(*grown, **inputs.kwargs)
            except (CompiledAttnError, RuntimeError):
                continue
            return [tensors[0], *chosen]
    return []


def larger(value: Tensor, size: int) -> Tensor:
    """The value with its first dimension filled up to `size` by its own rows again."""
    return value.index_select(0, torch.arange(size) % value.shape[0]) if size else value


def _paper(name: str) -> Case:
    paper = zoo.PAPERS[name]
    torch.manual_seed(0)
    model = paper.model(paper.tiny).eval()
    args = paper.inputs(paper.tiny, 2, torch.Generator().manual_seed(1))
    return Case(model, args, (True,) * len(args))


def _stock(name: str) -> Case:
    from models import enliven, timm_model

    config, side = STOCK[name]
    torch.manual_seed(0)
    model = timm_model(name, "sdpa", **config).eval()
    enliven(model)
    return Case(model, (torch.randn(2, 3, side, side),), (True,))


def _pass(name: str) -> Case:
    return replace(_stock(next(iter(STOCK))), named=(PASSES[name],))


def _train(name: str) -> Case:
    """The op's first inputs in training, or a module."""
    if name in OPS:
        return replace(_op(f"{name}: {INPUTS[name][0].name}"), trained=True)
    torch.manual_seed(0)
    return Case(OutlookAttention(8, 2), (torch.randn(2, 5, 6, 8),), (True,), trained=True)
