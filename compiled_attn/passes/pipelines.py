"""The only place that states an order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compiled_attn.passes.base import Pass

if TYPE_CHECKING:
    from compiled_attn.ir.targets import Target


def default(target: Target, mode: str, named: Sequence[Pass] = ()) -> list[Pass]:
    """The target's pipeline, with the passes that the user named between raising and the choice of kernels."""
    from compiled_attn.passes.canonicalize import Canonicalize

    del target, mode
    return [Canonicalize(), *named]
