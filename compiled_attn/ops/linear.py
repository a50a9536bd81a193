"""A linear map on weights packed for our own matrix product, with what follows it in the same kernel.

Letters: M rows, K input width, N output width, W columns of a block, P elements along K that lie side by side (1 for
float32, 2 for bfloat16).
"""

import torch
import torch.nn.functional as F

from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import Cost, define, no_gradient
from compiled_attn.ops.rules import bytes_of, exceeds, want_equal, want_floating, want_rank

Tensor = torch.Tensor
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")


def pairs(dtype: torch.dtype) -> int:
    """P: elements along K that one step of the product takes."""
    return 2 if dtype == torch.bfloat16 else 1


def pack(weight: Tensor, columns: int) -> Tensor:
    """weight [N, K] as [ceil(N / W), K / P, W, P], rows of zeros beyond N; `columns` is W."""
    outer, inner = weight.shape
    blocks = -(-outer // columns)
    side = pairs(weight.dtype)
    padded = F.pad(weight, (0, 0, 0, blocks * columns - outer))
    return padded.view(blocks, columns, inner // side, side).transpose(1, 2).contiguous()


def unpack(packed: Tensor, outer: int) -> Tensor:
    """The weight [N, K] that was packed."""
    blocks, steps, columns, side = packed.shape
    return packed.transpose(1, 2).reshape(blocks * columns, steps * side)[:outer]


# packed_linear: activation(x w^T + bias) + residual


def packed_linear_decomposition(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outer: int,
    activation: str = "none",
) -> Tensor:
    y = F.linear(x, unpack(packed, outer), bias)
    if activation == "relu":
        y = torch.relu(y)
    elif activation == "silu":
        y = F.silu(y)
    elif activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual


def packed_linear_reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outer: int,
    activation: str = "none",
) -> Tensor:
    packed_linear_shape(x, packed, bias, residual, outer=outer, activation=activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    more = [None if t is None else t.to(wide) for t in (bias, residual)]
    y = packed_linear_decomposition(x.to(wide), packed.to(wide), *more, outer=outer, activation=activation)
    return y.to(x.dtype).contiguous()


def packed_linear_shape(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outer: int,
    activation: str = "none",
) -> Tensor:
    """x [M, K], packed as `pack` gives it, bias [N], residual [M, N]: [M, N], contiguous."""
    op = "packed_linear"
    want_rank(op, "x", x, "MK")
    want_rank(op, "packed", packed, "BKWP")
    want_floating(op, "x", x)
    blocks, steps, columns, side = packed.shape
    want_equal(op, "the input width", "x", x.shape[1], "packed", steps * side)
    if exceeds(outer, blocks * columns) or exceeds((blocks - 1) * columns + 1, outer):
        raise OpError(
            f"{op}: {blocks} blocks of {columns} columns do not hold {outer}",
            facts=f"they hold {(blocks - 1) * columns + 1} to {blocks * columns} columns",
            do="pack the weight with compiled_attn.ops.linear.pack and give its own N as outer",
        )
    if activation not in ACTIVATIONS:
        raise OpError(
            f"{op}: there is no activation {activation!r}",
            facts=f"there are {', '.join(ACTIVATIONS)}",
            do="use one of these, or compute it behind the op",
        )
    if bias is not None:
        want_rank(op, "bias", bias, "N")
        want_equal(op, "the output width", "bias", bias.shape[0], "outer", outer)
    if residual is not None:
        want_rank(op, "residual", residual, "MN")
        want_equal(op, "the output width", "residual", residual.shape[1], "outer", outer)
        want_equal(op, "the number of rows", "residual", residual.shape[0], "x", x.shape[0])
    for name, tensor in (("packed", packed), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise OpError(
                f"{op}: {name} holds {tensor.dtype}", facts=f"x holds {x.dtype}", do=f"convert {name} to x's dtype"
            )
    return x.new_empty((x.shape[0], outer))


def packed_linear_cost(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outer: int,
    activation: str = "none",
) -> Cost:
    """One product, and some operations an element for what follows."""
    del activation
    written = x.shape[0] * outer * x.element_size()
    return Cost(2 * x.numel() * outer, bytes_of(x, packed, bias, residual) + written)


packed_linear = define(
    "packed_linear",
    "(Tensor x, Tensor packed, Tensor? bias=None, Tensor? residual=None, *, int outer, str activation='none')"
    " -> Tensor",
    reference=packed_linear_reference,
    shape=packed_linear_shape,
    gradient=no_gradient("because it stands only in lowered inference programs; train on aten.linear"),
    cost=packed_linear_cost,
    decomposition=packed_linear_decomposition,
)
