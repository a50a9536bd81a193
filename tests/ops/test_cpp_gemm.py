"""The matrix product of kernels/cpp/gemm.h against float64, on every instruction set that runs here."""

import ctypes
import platform

import cpp_library
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import LinearSpec, linear_specs

from compiled_attn.ir import targets
from compiled_attn.ops.linear import ACTIVATIONS, pack, packed_linear_decomposition, unpack
from compiled_attn.ops.templates import cpp_gemm

VARIANTS = [pytest.param(v, id=v.name) for v in cpp_library.VARIANTS]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of the sum of the sizes of what is added


def run(variant, spec: LinearSpec, vectors: int, gap: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the memory beside it, which was NaN; rows of x and of the residual lie `gap` further apart."""
    x, _, bias, residual = spec.tensors()
    packed = pack(spec.weight(), vectors * variant.lanes)

    def spaced(tensor: torch.Tensor, filled: bool) -> torch.Tensor:
        wide = torch.full((tensor.shape[0], tensor.shape[1] + gap), float("nan"), dtype=tensor.dtype)
        if filled:
            wide[:, : tensor.shape[1]] = tensor
        return wide

    x, beside = spaced(x, True), None if residual is None else spaced(residual, True)
    around = spaced(torch.empty(spec.rows, spec.outer, dtype=spec.dtype), False)
    stride = spec.outer + gap
    sizes = cpp_library.longs([spec.rows, spec.inner, spec.outer, spec.inner + gap, stride, stride])
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (x, packed, bias, beside, around)]
    call = cpp_library.library(variant).call_gemm
    call(int(spec.dtype == torch.bfloat16), vectors, ACTIVATIONS.index(spec.activation), sizes, *pointers)
    return around[:, : spec.outer], around[:, spec.outer :]


@pytest.fixture(autouse=True)
def skip_what_does_not_run_here(request):
    variant = request.node.callspec.params.get("variant") if hasattr(request.node, "callspec") else None
    if variant is not None and not cpp_library.runnable(variant):
        pytest.skip(f"this machine does not run {variant.name}")


@pytest.mark.parametrize("variant", VARIANTS)
@given(spec=linear_specs(), wide=st.booleans(), gap=st.sampled_from((0, 2, 6)))
@example(LinearSpec(rows=197, inner=384, outer=100, activation="gelu"), True, 0)
@example(LinearSpec(rows=1, inner=2, outer=1, activation="gelu_tanh"), True, 0)
@example(LinearSpec(rows=90, inner=4096, outer=17, residual=False), False, 0)  # several chunks of rows
def test_the_product_and_what_follows_equal_float64_and_write_nothing_beside(variant, spec, wide, gap):
    if spec.dtype == torch.bfloat16 and not variant.bf16:
        return
    vectors = (3 if variant.lanes == 16 or platform.machine() == "aarch64" else 2) if wide else 1
    found, beside = run(variant, spec, vectors, gap)
    x, packed, bias, residual = (None if t is None else t.double() for t in spec.tensors())
    weight = spec.weight().double()
    options = {"outer": spec.outer, "activation": spec.activation}
    wanted = packed_linear_decomposition(x, packed, bias, residual, **options)
    size = x.abs() @ weight.abs().T + (0 if bias is None else bias.abs()) + (0 if residual is None else residual.abs())
    assert ((found.double() - wanted).abs() <= ROUNDING[spec.dtype] * (1 + size)).all()
    assert beside.isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_rows_is_shared_out_among_threads(variant):
    for rows in range(130):
        spec = LinearSpec(rows=rows, inner=8, outer=5, residual=False)
        x, packed, bias, _ = spec.tensors()
        wanted = packed_linear_decomposition(x, packed, bias, None, outer=5, activation=spec.activation)
        assert torch.allclose(run(variant, spec, 1)[0], wanted, rtol=0, atol=1e-5)


@given(spec=linear_specs(), columns=st.sampled_from((4, 8, 16, 48, 64)))
def test_packing_is_undone_by_unpacking(spec, columns):
    weight = spec.weight()
    assert torch.equal(unpack(pack(weight, columns), spec.outer), weight)


@pytest.mark.parametrize(
    ("target", "outer", "columns"),
    [
        ("zen5", 384, 48),
        ("zen5", 1000, 48),
        ("zen5", 64, 64),
        ("zen5", 10, 16),
        ("zen5", 80, 48),  # and two vectors of three
        ("zen5", 112, 64),  # and three of four
        ("zen5", 195, 48),
        ("x86-64-v3", 384, 16),
        ("aarch64", 384, 12),
    ],
)
def test_blocks_are_wide_and_the_last_is_not_narrow(target, outer, columns):
    assert cpp_gemm.columns(outer, targets.load(target)) == columns


@pytest.mark.parametrize(
    ("dtype", "inner", "target", "because"),
    [
        (torch.float32, 7, "zen5", None),
        (torch.bfloat16, 8, "zen5", None),
        (torch.bfloat16, 7, "zen5", "its input width is 7; bfloat16 is multiplied in pairs"),
        (torch.float16, 8, "zen5", "its elements are torch.float16, the kernel takes float32 and bfloat16"),
        (torch.bfloat16, 8, "x86-64-v4", "target x86-64-v4 has no product of bfloat16 pairs that the kernel uses"),
        (torch.float32, 8, "a100", "target a100 runs no C++"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(dtype, inner, target, because):
    found = cpp_gemm.refuses(dtype, inner, targets.load(target))
    assert found is None if because is None else found.startswith(because)
