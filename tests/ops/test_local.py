"""Local attention against its patterns written out by hand, and against the models that define them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from laws import near
from local_strategies import LocalSpec, local_specs

from compiled_attn.ir import _torch
from compiled_attn.ops import local_attention
from compiled_attn.ops.local_geometry import Axis


def seen(axis: Axis, query: int, keys: int) -> list[tuple[int | None, int]]:
    """(position, or None for a key of zeros; place in a bias table, or -1), written out from the definition."""
    d, w = axis.dilation, axis.window
    residue, t = query % d, query // d
    members = list(range(residue, keys, d))
    g = math.floor((t - axis.shift) / axis.block)
    origin = g * axis.stride + axis.shift
    stand = origin + t - axis.shift - g * axis.block
    start = origin - (w - axis.stride if axis.causal else (w - axis.stride + 1) // 2)
    if axis.border == "clamp" and not axis.causal:
        start = max(0, min(start, len(members) - w))
    found: list[tuple[int | None, int]] = []
    for at in range(start, start + w):
        inside = 0 <= at < len(members)
        if (not inside and axis.border != "zero") or (axis.causal and at > stand):
            continue
        found.append((members[at] if inside else None, at - stand + w - 1))
    for sink in range(min(axis.sinks, keys)):
        if not start <= sink < start + w and not (axis.causal and sink > stand):
            found.append((sink, -1))
    return found


def by_hand(spec: LocalSpec) -> torch.Tensor:
    """The op in float64, query by query and key by key."""
    q, k, v, bias, relative = (None if t is None else t.double() for t in spec.tensors())
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    starts = [0, *itertools.accumulate(a.offsets for a in spec.axes)]
    for place in itertools.product(*(range(n) for n in spec.queries)):
        slots = [seen(a, i, n) for a, i, n in zip(spec.axes, place, spec.keys, strict=True)]
        scores, values = [], []
        for chosen in itertools.product(*slots):
            at = [position for position, _ in chosen]
            row = (slice(None), *[0 if p is None else p for p in at])
            there = float(None not in at)
            score = there * spec.scale * (q[(slice(None), *place)] * k[row]).sum(-1)
            if spec.softcap:
                score = spec.softcap * torch.tanh(score / spec.softcap)
            tabled = [r for _, r in chosen]
            if bias is not None and min(tabled) >= 0:
                score = score + bias[(slice(None), *tabled)]
            if relative is not None and min(tabled) >= 0:
                for begin, r in zip(starts, tabled, strict=False):
                    score = score + relative[(slice(None), *place)][..., begin + r]
            scores.append(score)
            values.append(there * v[row])
        if scores:
            p = torch.softmax(torch.stack(scores), 0)
            out[(slice(None), *place)] = (p.unsqueeze(-1) * torch.stack(values)).sum(0)
    return out


@given(spec=local_specs())
@example(spec=LocalSpec(queries=(2,), window=(7,), dilation=(3,), border="zero", bias=True))
@example(spec=LocalSpec(queries=(9,), window=(4,), stride=(4,), shift=(3,), border="mask", relative=True))
def test_reference_and_decomposition_equal_the_pattern_written_out(spec):
    spec = spec if math.prod(spec.queries) <= 40 else LocalSpec(seed=spec.seed)
    args = spec.make(torch.float64)
    wanted = by_hand(LocalSpec(**{**spec.__dict__, "dtype": torch.float64}))
    near(local_attention.reference(*args, **spec.options), wanted, 1e-12)
    near(local_attention.decomposition(*args, **spec.options), wanted, 1e-12)


@pytest.mark.parametrize("sizes", [(14, 14), (14, 21)])
def test_shifted_windows_are_swins_roll_and_mask(sizes):
    import torchvision_shim  # noqa: F401
    from timm.models.swin_transformer import SwinTransformerBlock

    torch.manual_seed(0)
    block = SwinTransformerBlock(16, sizes, num_heads=2, window_size=7, shift_size=3).eval().double()
    attn = block.attn
    torch.nn.init.normal_(attn.relative_position_bias_table)
    x = torch.randn(2, *sizes, 16, dtype=torch.float64)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    bias = attn.relative_position_bias_table.view(13, 13, 2).flip(0, 1).permute(2, 0, 1)
    options = {"window": [7, 7], "stride": [7, 7], "shift": [3, 3], "border": "mask", "scale": attn.scale}
    with torch.no_grad():
        found = attn.proj(local_attention(q, k, v, bias, **options).flatten(-2))
        near(found, block._attn(x), 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_borders_and_relative_logits_are_halonets(stride):
    import torchvision_shim  # noqa: F401
    from timm.layers.halo_attn import HaloAttn

    torch.manual_seed(0)
    attn = HaloAttn(32, stride=stride, num_heads=4, block_size=8, halo_size=3).eval().double()
    for table in (attn.pos_embed.height_rel, attn.pos_embed.width_rel):
        torch.nn.init.normal_(table)
    x = torch.randn(2, 32, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        q = attn.q(x).permute(0, 2, 3, 1).unflatten(-1, (4, 8))
        k, v = attn.kv(x).permute(0, 2, 3, 1).unflatten(-1, (4, 16)).split(8, -1)
        # HaloNet counts a window's keys from the window's own start, which lies `halo` before the block's.
        tables = [
            torch.nn.functional.pad(t[3:], (0, 0, 0, 3)) for t in (attn.pos_embed.height_rel, attn.pos_embed.width_rel)
        ]
        relative = torch.cat([q @ t.T for t in tables], -1)
        options = {
            "window": [14, 14],
            "stride": [8, 8],
            "block": [8 // stride] * 2,
            "border": "zero",
            "scale": attn.scale,
        }
        found = local_attention(q, k, v, None, relative, **options).flatten(-2).permute(0, 3, 1, 2)
        near(found, attn(x), 1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        LocalSpec(queries=(16, 24), window=(7, 7), bias=True),
        LocalSpec(queries=(16, 24), window=(4, 4), stride=(4, 4), shift=(2, 2), border="mask", bias=True),
        LocalSpec(queries=(16, 24), window=(8, 8), stride=(4, 4), border="zero", relative=True),
        LocalSpec(queries=(16, 24), window=(3, 3), dilation=(2, 3), bias=True),
    ],
    ids=["neighborhood", "shifted", "halo", "dilated"],
)
def test_symbolic_sizes_leave_no_guard_in_the_shape_rule_and_run_in_the_decomposition(spec):
    args = spec.make(torch.float32)
    shape_env, fakes = _torch.symbolic_fakes(args[:3])
    local_attention.shape(*fakes, None, None, **spec.options)
    assert not shape_env.guards

    class Net(torch.nn.Module):
        def forward(self, *args):
            return local_attention.decomposition(*args, **spec.options)

    batch = torch.export.Dim("batch", min=1, max=9)
    rows = 4 * torch.export.Dim("rows", min=2, max=20)
    shapes = [{0: batch, 1: rows}] * 3 + [None] * 2
    shapes[4] = {0: batch, 1: rows} if spec.relative else None
    exported = torch.export.export(Net(), args, dynamic_shapes={"args": tuple(shapes)}, strict=False)
    other = LocalSpec(**{**spec.__dict__, "queries": (12, 24), "batch": 3})
    near(
        exported.module()(*other.make(torch.float32)),
        local_attention.reference(*other.make(torch.float32), **other.options),
        5e-6,
    )
