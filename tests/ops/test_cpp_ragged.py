"""Ragged attention in C++: the kernel for every instruction set, and the template in Inductor's code and packages."""

from __future__ import annotations

from pathlib import Path

import cpp_library
import laws
import pytest
import torch
from hypothesis import example, given
from ragged_strategies import RaggedSpec, ragged_specs

from compiled_attn.ir import _torch
from compiled_attn.ops.ragged import ragged_attention
from compiled_attn.ops.templates.base import templates_in, templates_in_package
from compiled_attn.runtime import lower

TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1.5e-2}
NAME = "cpp_ragged_attention"

variants = pytest.mark.parametrize("variant", cpp_library.VARIANTS, ids=lambda v: v.name)


@variants
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(spec=ragged_specs())
@example(spec=RaggedSpec((1,), width=1, value_width=1))
@example(spec=RaggedSpec((197, 1, 60, 0, 131), width=64, value_width=64, heads=3))
@example(spec=RaggedSpec((70, 0, 300), (20, 5, 150), width=33, value_width=7))
@example(spec=RaggedSpec((150, 33, 64), width=16, options={"scale": 0.3, "causal": True}))
def test_the_kernel_equals_float64_and_writes_nothing_beside(variant, dtype, spec):
    if not cpp_library.runnable(variant):
        pytest.skip(f"this CPU lacks {sorted(variant.needs)}")
    q, k, v, q_offsets, k_offsets = spec.make(dtype)
    room = torch.full((q.shape[0], spec.heads, spec.value_width + 2), torch.nan, dtype=dtype)
    out = room[..., 1:-1]
    cpp_library.ragged_attention(variant, q, k, v, q_offsets, k_offsets, out, **spec.options)
    wide = (t.double() for t in (q, k, v))
    wanted = ragged_attention.reference(*wide, q_offsets, k_offsets, **spec.options)
    assert room[..., 0].isnan().all() and room[..., -1].isnan().all()
    laws.near(out.double(), wanted, TOLERANCE[dtype] * max(1.0, spec.options["scale"] * spec.width / 4))


class Packed(torch.nn.Module):
    """Queries, keys and values in strided views with pointwise work before and behind."""

    def forward(self, x: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        q, k, v = x.unflatten(1, (3, 2, 20)).unbind(1)
        return torch.ops.compiled_attn.ragged_attention(q * 1.5, k, v + 1, begins, begins, scale=0.3).relu() + 1


def inputs(lengths, dtype=torch.float32):
    begins = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(begins[-1]), 120, dtype=dtype, generator=torch.Generator().manual_seed(1)), begins


def test_inductors_code_holds_the_template_and_refuses_offsets_that_cut_otherwise():
    lower.register()
    x, begins = inputs((5, 0, 30))
    with torch.no_grad():
        compiled, code = _torch.compile_and_read(Packed(), x, begins)
        assert templates_in(code) == {NAME}
        laws.near(compiled(x, begins), Packed()(x, begins), 2e-5)
        for wrong in ([0, 5, 4, 35], [0, 5, 5, 36], [1, 5, 5, 35]):
            with pytest.raises(RuntimeError, match="q_offsets does not cut all packed rows"):
                compiled(x, torch.tensor(wrong))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_package_holds_the_template_and_takes_any_number_of_rows_and_sequences(dtype, tmp_path: Path):
    shapes = ({0: torch.export.Dim("rows", min=0, max=9999)}, {0: torch.export.Dim("ends", min=2, max=64)})
    exported = torch.export.export(Packed(), inputs((5, 0, 30), dtype), dynamic_shapes=shapes, strict=False)
    lower.register()
    path = _torch.aoti_package(exported, str(tmp_path / "packed.pt2"), {})
    assert templates_in_package(path) == {NAME}
    loader = _torch.package_loader(path)
    for lengths in ((5, 0, 30), (1,), (197, 1, 60, 131)):
        x, begins = inputs(lengths, dtype)
        laws.near(loader.boxed_run([x, begins])[0], Packed()(x, begins), {torch.float32: 2e-5}.get(dtype, 4e-2))
