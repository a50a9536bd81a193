"""Law, run under TRITON_INTERPRET=1: the Triton attention equals the equation in float64, outputs NaN-filled first."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
# absolute, on values of about unit variance; the 16-bit types round probabilities and the output once each
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXAMPLES = settings().max_examples // 4  # a program costs about 5 ms here

SPECS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "queries": st.integers(1, 70),
        "keys": st.integers(1, 70),
        "width": st.sampled_from((1, 7, 16, 24, 40, 64, 72)),
        "width_v": st.sampled_from((1, 16, 24, 33)),
        "dtype": st.sampled_from(tuple(TOLERANCE)),
        "bias": st.sampled_from(("none", "full", "keys", "heads", "transposed")),
        "masked": st.booleans(),
        "causal": st.booleans(),
        "layout": st.sampled_from(("contiguous", "packed", "strided")),
        "blocks": st.sampled_from(((16, 16), (32, 16), (16, 32), (64, 64))),
        "seed": st.integers(0, 999),
    }
)


def inputs(spec):
    """q, k, v, bias of a spec, laid out in memory as it says."""
    generator = torch.Generator().manual_seed(spec["seed"])

    def draw(tokens, width):
        shape = (spec["batch"], spec["heads"], tokens, width)
        x = torch.randn(shape, generator=generator).to(spec["dtype"])
        if spec["layout"] == "packed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if spec["layout"] == "strided":
            return x.repeat_interleave(3, dim=-1)[..., ::3]
        return x

    q, k, v = (
        draw(spec["queries"], spec["width"]),
        draw(spec["keys"], spec["width"]),
        draw(spec["keys"], spec["width_v"]),
    )
    b, h, n, m = *q.shape[:3], spec["keys"]
    shape = {"full": (b, h, n, m), "keys": (b, 1, 1, m), "heads": (h, n, m), "transposed": (1, h, m, n)}.get(
        spec["bias"]
    )
    if shape is None:
        return q, k, v, None
    bias = torch.randn(shape, generator=generator)
    if spec["masked"]:
        bias[torch.rand(shape, generator=generator) < 0.3] = float("-inf")
    return q, k, v, bias.transpose(-1, -2) if spec["bias"] == "transposed" else bias


def equation(q, k, v, bias, scale, causal):
    """softmax(q k^T scale + bias) v in float64; zeros where every key is masked."""
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias.double()
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v.double()


def run(spec):
    q, k, v, bias = inputs(spec)
    scale = spec["width"] ** -0.5
    blocks = (("BLOCK_N", spec["blocks"][0]), ("BLOCK_M", spec["blocks"][1]), ("PRECISION", "ieee"))
    out = launch.attention(q, k, v, bias, scale=scale, causal=spec["causal"], config=Config(blocks, 4, 2))
    return out, equation(q, k, v, bias, scale, spec["causal"])


BASE = {"batch": 1, "heads": 2, "queries": 33, "keys": 33, "width": 24, "width_v": 24, "dtype": torch.float32}
BASE |= {"bias": "none", "masked": False, "causal": False, "layout": "packed", "blocks": (16, 16), "seed": 0}


@settings(max_examples=EXAMPLES)
@given(SPECS)
@example(BASE)
@example(BASE | {"dtype": torch.bfloat16, "bias": "full", "masked": True})
@example(BASE | {"causal": True, "queries": 40, "keys": 17})
@example(BASE | {"causal": True, "queries": 17, "keys": 40, "bias": "heads"})
def test_the_kernel_equals_the_equation(spec):
    out, expected = run(spec)
    assert out.dtype == spec["dtype"]
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[spec["dtype"]])


@pytest.mark.parametrize("width", [1, 100, 129, 256])
def test_any_head_width_up_to_256_is_padded(width):
    out, expected = run(BASE | {"width": width, "width_v": width, "heads": 1, "queries": 17, "keys": 19})
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_a_row_whose_every_key_is_masked_gives_zeros_and_its_neighbours_stay():
    q, k, v, _ = inputs(BASE)
    bias = torch.zeros(33, 33)
    bias[5] = float("-inf")
    bias[6, :20] = float("-inf")  # a whole block before the first key that counts
    config = Config((("BLOCK_N", 16), ("BLOCK_M", 16), ("PRECISION", "ieee")), 4, 2)
    out = launch.attention(q, k, v, bias, scale=0.2, causal=False, config=config)
    assert out[:, :, 5].eq(0).all()
    torch.testing.assert_close(out.double(), equation(q, k, v, bias, 0.2, False), rtol=0, atol=5e-6)


def test_large_logits_do_not_overflow():
    q, k, v, _ = inputs(BASE)
    config = Config((("BLOCK_N", 16), ("BLOCK_M", 16), ("PRECISION", "ieee")), 4, 2)
    out = launch.attention(q * 1e3, k, v, None, scale=1.0, causal=False, config=config)
    torch.testing.assert_close(out.double(), equation(q * 1e3, k, v, None, 1.0, False), rtol=0, atol=5e-3)
