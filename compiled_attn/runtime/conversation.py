"""The state of texts under way: the tensors that a decoder's programs write into, and how far each text has come."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime.call import load_tree
from compiled_attn.runtime.contract import Call, TensorSpec

POSITIONS = "slots_positions_"  # how the contract names the inputs that hold slots' positions, -1 where free


@dataclass
class Conversation:
    """Texts side by side. state, slots: what the programs take and write into.

    lengths: tokens of each text that the caches have seen.  pending: tokens said that they have not seen yet, a text.
    """

    state: dict[str, Any]
    slots: dict[str, list[torch.Tensor]]
    lengths: list[int]
    pending: list[list[int]]

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that the caches take, which no length of text changes."""
        return sum(t.numel() * t.element_size() for t in pytree.tree_leaves((self.state, self.slots)))

    def kept(self, layer: int) -> list[list[list[int]]]:
        """Positions that a layer's cache holds: text, key head, ascending."""
        texts = self.slots["positions"][layer].tolist()
        return [[sorted(p for p in head if p >= 0) for head in text] for text in texts]

    def copy(self) -> Conversation:
        """Another conversation that goes on from here by itself."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Forgets everything, in place."""
        for tensor in pytree.tree_leaves((self.state, self.slots)):
            tensor.zero_()
        for tensor in self.slots["positions"]:
            tensor.fill_(-1)
        self.lengths = [0] * self.batch
        self.pending = [[] for _ in self.lengths]

    def reorder(self, texts: Sequence[int]) -> Conversation:
        """A conversation of these texts of this one, in this order; one may be there twice (beams, shared prompts)."""
        index = torch.tensor(list(texts), dtype=torch.int64)

        def chosen(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if tensor.dim() == 0 else tensor.index_select(0, index.to(tensor.device))

        state, slots = pytree.tree_map(chosen, (self.state, self.slots))
        pending = [list(self.pending[i]) for i in texts]
        return Conversation(state, slots, [self.lengths[i] for i in texts], pending)

    def save(self, path: str | Path) -> None:
        """Writes everything to a file, which `restore` reads."""
        torch.save(
            {"tensors": self._tensors(), "lengths": self.lengths, "pending": self.pending},
            Path(path),
        )

    def restore(self, path: str | Path) -> None:
        """Takes the place of what a file holds that was saved of such a conversation. Raises ContractError."""
        saved = torch.load(Path(path), weights_only=True)
        mine, theirs = self._tensors(), saved["tensors"]
        for name, tensor in mine.items():
            other = theirs.get(name)
            if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype or len(theirs) != len(mine):
                raise ContractError(
                    "the saved conversation is not of this decoder",
                    where=str(path),
                    facts=f"{name} is {tensor.dtype}{list(tensor.shape)} here, and there "
                    + ("missing" if other is None else f"{other.dtype}{list(other.shape)}"),
                    do="restore it into decoder.fresh(batch) of the decoder that it was saved from",
                )
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        self.lengths, self.pending = list(saved["lengths"]), [list(p) for p in saved["pending"]]

    def _tensors(self) -> dict[str, torch.Tensor]:
        named, _ = pytree.tree_flatten_with_path({"state": self.state, "slots": self.slots})
        return {pytree.keystr(path): tensor for path, tensor in named}


def fresh(call: Call, batch: int, device: torch.device) -> Conversation:
    """A conversation that has not begun, of the shapes that a program's contract states.

    Raises ContractError where the program takes another number of texts.
    """
    leaves: list[Any] = []
    for spec in call.inputs:
        if not isinstance(spec, TensorSpec) or not spec.mutated:
            leaves.append(None)
            continue
        shape = [size if isinstance(size, int) else batch for size in spec.shape]
        if shape and shape[0] != batch:
            raise ContractError(
                f"the decoder does not take {batch} texts",
                where=spec.name,
                facts=f"it was built for {shape[0]}",
                do="build it with batch=None for any number, or for this one",
            )
        value = -1 if spec.name.startswith(POSITIONS) else 0
        leaves.append(torch.full(shape, value, dtype=getattr(torch, spec.dtype), device=device))
    args, kwargs = pytree.tree_unflatten(leaves, load_tree(call.in_tree, "a decoder"))
    return Conversation(args[2], kwargs["slots"], [0] * batch, [[] for _ in range(batch)])
