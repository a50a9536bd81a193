"""Law, run under TRITON_INTERPRET=1: token selection equals a stable sort, a gather and a float64 sum."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN and the largest integer
EXAMPLES = settings().max_examples // 4  # a program costs about 5 ms here
# relative to the sum of magnitudes: rounding of a float32 sum of up to 60 terms, then of the output
ROUNDING = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# ties, both zeros, infinities and NaN beside ordinary scores
AWKWARD = (0.0, -0.0, 1.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"))

SPECS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.integers(1, 60),
        "channels": st.integers(1, 40),
        "keep": st.integers(1, 60),
        "prefix": st.integers(0, 2),
        "fuse": st.booleans(),
        "dtype": st.sampled_from(tuple(ROUNDING)),
        "score": st.sampled_from((torch.float32, torch.bfloat16)),
        "awkward": st.booleans(),
        "strided": st.booleans(),
        "blocks": st.sampled_from(((8, 16, 16), (16, 64, 64), (32, 16, 8))),
        "seed": st.integers(0, 999),
    }
)
BASE = {"batch": 2, "tokens": 21, "channels": 24, "keep": 9, "prefix": 1, "fuse": True, "dtype": torch.float32}
BASE |= {"score": torch.float32, "awkward": False, "strided": False, "blocks": (8, 16, 16), "seed": 0}


@settings(max_examples=EXAMPLES)
@given(SPECS)
@example(BASE)
@example(BASE | {"awkward": True, "fuse": False, "prefix": 0})
@example(BASE | {"keep": 21, "dtype": torch.bfloat16})
@example(BASE | {"strided": True, "prefix": 2})
def test_the_kernel_equals_sort_gather_and_sum(spec):
    generator = torch.Generator().manual_seed(spec["seed"])
    b, m, c, prefix, fuse = (spec[key] for key in ("batch", "tokens", "channels", "prefix", "fuse"))
    keep = min(spec["keep"], m)
    x = torch.randn(b, prefix + m, c, generator=generator).to(spec["dtype"])
    score = torch.randn(b, m, generator=generator).to(spec["score"])
    if spec["awkward"]:
        pick = torch.randint(len(AWKWARD), (b, m), generator=generator)
        score = torch.tensor(AWKWARD)[pick].to(spec["score"])
    if spec["strided"]:
        x, score = x.mT.contiguous().mT, score.mT.contiguous().mT
    blocks = zip(("BLOCK_M", "BLOCK_J", "BLOCK_C"), spec["blocks"], strict=True)
    config = Config(tuple(blocks), 4, 2)
    tokens, index = launch.select_tokens(x, score, keep, prefix=prefix, fuse=fuse, config=config)

    # descending, ties by lower index, NaN below -inf: a stable sort by value after one that puts NaN last
    value = torch.where(score.isnan(), float("-inf"), score.double())
    order = value.argsort(dim=1, descending=True, stable=True)
    nan_last = score.isnan().gather(1, order).to(torch.int8).argsort(dim=1, stable=True)
    order = order.gather(1, nan_last)
    assert torch.equal(index, order[:, :keep])
    wide = order[..., None].expand(b, m, c)
    ranked = x[:, prefix:].gather(1, wide)
    assert torch.equal(tokens[:, : prefix + keep], torch.cat([x[:, :prefix], ranked[:, :keep]], 1))
    assert tokens.shape[1] == prefix + keep + fuse
    if fuse:
        terms = (score.double().gather(1, order)[..., None] * ranked.double())[:, keep:]
        expected = terms.sum(1)
        scale = terms.abs().sum(1).nan_to_num(1.0, posinf=1.0).clamp(min=1e-30)
        assert_close_in_units(tokens[:, -1].double(), expected, scale, ROUNDING[spec["dtype"]])


def test_float32_denormals_keep_their_order():
    score = torch.tensor([[1e-40, 3e-40, -1e-40, 0.0, 2e-40]])
    config = Config((("BLOCK_M", 8), ("BLOCK_J", 16), ("BLOCK_C", 16)), 4, 2)
    _, index = launch.select_tokens(torch.randn(1, 5, 4), score, 5, prefix=0, fuse=False, config=config)
    assert index.tolist() == [[1, 4, 0, 3, 2]]


def assert_close_in_units(found, expected, unit, tolerance):
    """|found - expected| <= tolerance * unit, with equal NaNs and infinities."""
    finite = expected.isfinite()
    torch.testing.assert_close(found[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    assert ((found - expected)[finite].abs() <= tolerance * unit[finite]).all()
