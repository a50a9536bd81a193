"""A step of training through one depthwise convolution, by kernel and map: ours against ATen's, in process time.

python -m bench.depthwise_gradients            table on stdout

forward, input, weight: the result and the two gradients, at strides of 1 and 2, each against `conv2d` and
`convolution_backward` on maps in channels last, with one thread. A case whose numbers are wrong gets no time. Medians
of rounds taken in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.depthwise_ops import Case, ours
from bench.timing import interleave
from compiled_attn.ir import _torch
from compiled_attn.ops.templates import cpp_depthwise_gradient, cpp_depthwise_input_gradient

BATCH = 2
CASES = [Case(k, 1, *m, stride=s) for s in (1, 2) for m in ((56, 96), (14, 384)) for k in (3, 5, 7, 13)]


def pairs_of(case: Case) -> dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """Part of the step -> (ours, ATen's)."""
    random = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn((BATCH, case.channels, side, side), generator=random)
        .to(case.dtype)
        .to(memory_format=torch.channels_last)
        for side in (case.side, -(-case.side // case.stride))
    )
    weight = torch.randn(case.kernel, case.kernel, case.channels, generator=random).to(case.dtype) / case.kernel
    zero = torch.zeros(case.channels, dtype=case.dtype)
    kernel = weight.permute(2, 0, 1).unsqueeze(1).contiguous()
    pairs = [[n, n] for n in (case.stride, case.padding, case.dilation)]

    def atens(input_too: bool, weight_too: bool) -> torch.Tensor:
        wanted = [input_too, weight_too, False]
        found: Any = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, *pairs, False, [0, 0], case.channels, wanted
        )
        return found[0] if input_too else found[1].squeeze(1).permute(1, 2, 0)

    return {
        "forward": (ours(x, weight, zero, pairs), lambda: F.conv2d(x, kernel, zero, *pairs, case.channels)),
        "input": (input_gradient(x, grad, weight, pairs), lambda: atens(True, False)),
        "weight": (weight_gradient(x, grad, case, pairs), lambda: atens(False, True)),
    }


def input_gradient(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, pairs: list[list[int]]) -> Any:
    """The template's kernel, compiled by itself."""
    function = _torch.cpp_function(cpp_depthwise_input_gradient.standalone(x.dtype))
    out = torch.empty_like(x)
    numbers = torch.tensor(cpp_depthwise_input_gradient.numbers(grad, out, weight.shape[:2], *pairs))
    tensors = torch.tensor([t.data_ptr() for t in (grad, weight, out)])

    def call() -> torch.Tensor:
        function(tensors.data_ptr(), numbers.data_ptr())
        return out

    call.keep = (grad, weight)  # type: ignore[attr-defined]
    return call


def weight_gradient(x: torch.Tensor, grad: torch.Tensor, case: Case, pairs: list[list[int]]) -> Any:
    """The template's kernel, compiled by itself."""
    function = _torch.cpp_function(cpp_depthwise_gradient.standalone(x.dtype))
    out = torch.empty(case.kernel, case.kernel, case.channels, dtype=case.dtype)
    numbers = torch.tensor(cpp_depthwise_gradient.numbers(x, grad, out.shape[:2], *pairs))
    tensors = torch.tensor([t.data_ptr() for t in (x, grad, out)])

    def call() -> torch.Tensor:
        function(tensors.data_ptr(), numbers.data_ptr())
        return out

    call.keep = (x, grad)  # type: ignore[attr-defined]
    return call


def line(case: Case) -> str:
    """The case's row: microseconds of ours and of ATen's for each part, and the ratio of the whole step."""
    cells, totals = [], [0.0, 0.0]
    for mine, theirs in pairs_of(case).values():
        found, wanted = mine().double(), theirs().double()
        if (found - wanted).abs().max().item() > 1e-4 * wanted.abs().max().item():
            return f"{case.text} wrong"
        times = interleave({"ours": mine, "aten": theirs}, rounds=7, round_seconds=0.02)
        both = [times[name].cpu_median * 1e3 for name in ("ours", "aten")]
        totals = [a + b for a, b in zip(totals, both, strict=True)]
        cells.append(f"{both[0]:9.1f} {both[1]:9.1f}")
    return f"{case.text} " + "  ".join(cells) + f"   {totals[1] / totals[0]:5.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    heads = "  ".join(f"{part:>9} {'ATen':>9}" for part in ("forward", "input", "weight"))
    print(f"{'kernel':<9} {'map':<11} {'':<9} {heads}   ATen / ours, batch {BATCH}")
    for chosen in CASES:
        print(line(chosen), flush=True)
