"""How a Triton kernel is called: as a launch that Inductor sees into, or by Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import torch


def run(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., Any]:
    """The kernel ready to be called: traceable by Inductor, or interpreted."""
    return kernel[grid] if interpreted(kernel) else torch.library.wrap_triton(kernel)[grid]


def interpreted(kernel: Any) -> bool:
    """Whether Triton was imported to interpret, on CPU tensors."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)
