"""Law, run under TRITON_INTERPRET=1: the class row equals the equation in float64, outputs NaN-filled first."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
TOLERANCE = 2e-6  # absolute, on probabilities; inputs of any type are multiplied and summed in float32
EXAMPLES = settings().max_examples // 4  # a program costs about 5 ms here

SPECS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 4),
        "queries": st.integers(1, 9),
        "keys": st.integers(1, 90),
        "width": st.sampled_from((1, 7, 16, 24, 64, 100)),
        "dtype": st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
        "bias": st.sampled_from((None, (), (1,), (1, 1), (1, 1, 1))),
        "masked": st.booleans(),
        "packed": st.booleans(),
        "block": st.sampled_from((16, 32, 64)),
        "seed": st.integers(0, 999),
    }
)
BASE = {"batch": 2, "heads": 3, "queries": 5, "keys": 33, "width": 24, "dtype": torch.float32, "bias": None}
BASE |= {"masked": False, "packed": True, "block": 16, "seed": 0}


@settings(max_examples=EXAMPLES)
@given(SPECS)
@example(BASE)
@example(BASE | {"bias": (), "masked": True, "dtype": torch.bfloat16})
def test_the_kernels_equal_the_equation(spec):
    generator = torch.Generator().manual_seed(spec["seed"])
    b, h, n, m = spec["batch"], spec["heads"], spec["queries"], spec["keys"]
    q = torch.randn(b, h, n, spec["width"], generator=generator).to(spec["dtype"])
    k = torch.randn(b, h, m, spec["width"], generator=generator).to(spec["dtype"])
    if spec["packed"]:
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    bias = None
    if spec["bias"] is not None:
        shape = (*spec["bias"], *(b, h, n, m)[len(spec["bias"]) :])  # leading dimensions are broadcast
        bias = torch.randn(shape, generator=generator)
        if spec["masked"]:
            bias[torch.rand(shape, generator=generator) < 0.3] = float("-inf")
    row, scale = spec["seed"] % n, spec["width"] ** -0.5
    config = Config((("BLOCK_M", spec["block"]),), 4, 2)
    out = launch.class_row(q, k, bias, scale=scale, row=row, logits_config=config, mean_config=config)

    logits = q.double() @ k.double().transpose(-1, -2) * scale + (0 if bias is None else bias.double())
    expected = logits.softmax(-1).nan_to_num(0.0)[:, :, row].mean(1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)


def test_two_runs_agree_to_the_last_bit():
    q, k = torch.randn(1, 3, 5, 24), torch.randn(1, 3, 33, 24)
    config = Config((("BLOCK_M", 16),), 4, 2)
    one, two = (
        launch.class_row(q, k, None, scale=0.2, row=0, logits_config=config, mean_config=config) for _ in range(2)
    )
    assert torch.equal(one, two)
