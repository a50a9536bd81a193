"""A paper of the zoo as a case: its tiny network, its inputs, and what counts as the same answer."""

from __future__ import annotations

import inspect

import torch
from laws import near
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compiled_attn import zoo


def tiny(paper: zoo.Paper) -> nn.Module:
    torch.manual_seed(0)
    return paper.model(paper.tiny).eval()


def inputs(paper: zoo.Paper, batch: int, seed: int = 1) -> tuple[Tensor, ...]:
    return paper.inputs(paper.tiny, batch, torch.Generator().manual_seed(seed))


def dynamic(model: nn.Module, args: tuple[Tensor, ...]) -> dict[str, dict[int, str]]:
    return {name: {0: "batch"} for name, _ in zip(inspect.signature(model.forward).parameters, args, strict=False)}


def same(found: object, wanted: object, tolerance: float) -> None:
    """Equal up to `tolerance` of each output's largest value; exactly where the type has no fractions."""
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        near(a, b, tolerance)
