"""Laws: what must hold of every op, and of the CUDA code of every op and paper. Plain functions of one case.

tests/ops/test_laws.py and tests/cross/test_emulated.py ask them of all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cross.emulation import Emulated
from strategies import Inputs
from torch.utils import _pytree as pytree

from compiled_attn.ir import _torch
from compiled_attn.ir.errors import OpError
from compiled_attn.ir.op import NoGradient, Op

# Relative to the largest value; both sides are rounded once or twice in the type.
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def fake_equals_real(op: Op, inputs: Inputs) -> None:
    """The shape rule gives the sizes, types and strides that the op gives, symbolic sizes included."""
    torch.library.opcheck(op.overload, inputs.make(torch.float32), inputs.kwargs)


def decomposition_equals_reference(op: Op, inputs: Inputs, dtype: torch.dtype) -> None:
    """On strided inputs; outputs of whole numbers agree exactly, and so do the strides."""
    args = inputs.make(dtype)
    wanted = _flat(op.reference(*args, **inputs.kwargs))
    found = _flat(op.decomposition(*args, **inputs.kwargs))
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        near(a, b, ROUNDING[dtype])


def gradient_equals_autograd_of_the_reference(op: Op, inputs: Inputs) -> None:
    """float64, by finite differences and against autograd through the equation."""
    if isinstance(op.gradient, NoGradient):
        return
    args = [_leaf(a) for a in inputs.make(torch.float64)]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    found = _gradients(op.overload, args, inputs.kwargs, leaves)
    wanted = _gradients(op.reference, args, inputs.kwargs, leaves)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            near(a, b, 1e-10)


def cost_counts_every_byte_and_reads_no_hint(op: Op, inputs: Inputs) -> None:
    """At least the bytes of inputs and outputs; on symbolic sizes an expression, and no guard."""
    args = inputs.make(torch.float32)
    cost = op.cost(*args, **inputs.kwargs)
    tensors = [t for t in (*_flat(args), *_flat(op.reference(*args, **inputs.kwargs))) if isinstance(t, torch.Tensor)]
    assert cost.bytes >= sum(t.numel() * t.element_size() for t in tensors)
    assert cost.flops > 0
    shape_env, fakes = _torch.symbolic_fakes(args)
    symbolic = op.cost(*fakes, **inputs.kwargs)
    assert _torch.is_symbolic(symbolic.flops) and _torch.is_symbolic(symbolic.bytes)
    assert not shape_env.guards


def bad_input_gets_a_worded_error(op: Op, arguments: dict[str, Any], words: str) -> None:
    """From eager and from the shape rule, in the parts that every error has."""
    for call in (op.overload, op.shape):
        with pytest.raises(OpError, match=words) as caught:
            call(**arguments)
        assert caught.value.facts and caught.value.do
        assert str(caught.value).startswith(op.name)


def emulated_code_equals_eager(case: Emulated, tolerance: float = 1e-5) -> None:
    """Inductor's CUDA code, Triton kernels included, gives every output that eager mode gives."""
    assert case.failure is None, f"{case.name}\n{case.failure}"
    for a, b in zip(case.found, case.wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"{case.name}: {a.dtype}{list(a.shape)} for {b.dtype}{list(b.shape)}"
        )
        near(a, b, tolerance)


def emulated_code_holds_its_templates(case: Emulated) -> None:
    """The kernels of every template that lowering chose ran."""
    assert not case.missing(), f"{case.name} chose {case.templates}; {sorted(case.missing())} did not run"


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest value; exactly where the type has no fractions."""
    if not wanted.dtype.is_floating_point:
        assert torch.equal(found, wanted)
        return
    assert found.isfinite().equal(wanted.isfinite())
    size = max(1.0, wanted.double().abs().nan_to_num(posinf=0).max().item()) if wanted.numel() else 1.0
    error = (found.double() - wanted.double()).abs().nan_to_num()
    assert wanted.numel() == 0 or error.max().item() <= tolerance * size


def _flat(tree: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return value.detach().requires_grad_()
    return value


def _gradients(call: Any, args: list[Any], kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> list[Any]:
    outs = [o for o in _flat(call(*args, **kwargs)) if o.dtype.is_floating_point]
    random = torch.Generator().manual_seed(0)
    towards = [torch.randn(o.shape, generator=random, dtype=o.dtype) for o in outs]
    return list(torch.autograd.grad(outs, leaves, towards, allow_unused=True, materialize_grads=True))
