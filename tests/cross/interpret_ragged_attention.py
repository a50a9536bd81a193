"""Law, run under TRITON_INTERPRET=1: the Triton ragged attention equals the equation, outputs NaN-filled first."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled_attn.ops.ragged import ragged_attention
from compiled_attn.ops.templates.triton_config import Config
from compiled_attn.runtime import launch

torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
# absolute, on values of about unit variance; the 16-bit types round probabilities and the output once each
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXAMPLES = settings().max_examples // 4  # a program costs about 5 ms here
LENGTHS = st.lists(st.sampled_from((0, 1, 5, 16, 17, 40, 64)), min_size=1, max_size=4)

SPECS = st.fixed_dictionaries(
    {
        "queries": LENGTHS,
        "shift": st.integers(0, 3),
        "heads": st.integers(1, 2),
        "width": st.sampled_from((1, 7, 16, 24, 64)),
        "width_v": st.sampled_from((1, 16, 24, 33)),
        "dtype": st.sampled_from(tuple(TOLERANCE)),
        "causal": st.booleans(),
        "packed": st.booleans(),
        "blocks": st.sampled_from(((16, 16), (32, 16), (16, 32), (64, 64))),
        "seed": st.integers(0, 999),
    }
)
BASE = {"queries": [33, 1, 17], "shift": 0, "heads": 2, "width": 24, "width_v": 24, "dtype": torch.float32}
BASE |= {"causal": False, "packed": True, "blocks": (16, 16), "seed": 0}


def run(spec):
    """(found, equation in float64) of a spec; shift: the keys' lengths are the queries' in another order."""
    generator = torch.Generator().manual_seed(spec["seed"])
    turn = spec["shift"] % len(spec["queries"])
    lengths = spec["queries"], spec["queries"][turn:] + spec["queries"][:turn]
    begins = [torch.tensor([0, *each]).cumsum(0) for each in lengths]
    rows = int(begins[0][-1])

    def draw(width):
        wide = torch.randn(rows, 3 if spec["packed"] else 1, spec["heads"], width, generator=generator)
        return wide.to(spec["dtype"])[:, 0]

    q, k, v = draw(spec["width"]), draw(spec["width"]), draw(spec["width_v"])
    config = Config((("BLOCK_N", spec["blocks"][0]), ("BLOCK_M", spec["blocks"][1]), ("PRECISION", "ieee")), 4, 2)
    options = {"scale": spec["width"] ** -0.5, "causal": spec["causal"]}
    found = launch.ragged_attention(q, k, v, *begins, **options, config=config)
    return found, ragged_attention.reference(q.double(), k.double(), v.double(), *begins, **options)


@settings(max_examples=EXAMPLES)
@given(SPECS)
@example(BASE)
@example(BASE | {"dtype": torch.bfloat16, "queries": [0, 40, 0, 64]})
@example(BASE | {"causal": True, "shift": 1})
@example(BASE | {"queries": [5, 0, 40], "shift": 1, "blocks": (64, 64)})
def test_the_kernel_equals_the_equation(spec):
    found, expected = run(spec)
    assert found.dtype == spec["dtype"] and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[spec["dtype"]])


@pytest.mark.parametrize("width", [100, 256])
def test_any_head_width_up_to_256_is_padded(width):
    found, expected = run(BASE | {"width": width, "width_v": width, "heads": 1})
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_many_short_sequences_and_no_row_at_all():
    for queries in ([1] * 40, [0], [0, 0, 0]):
        found, expected = run(BASE | {"queries": queries})
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[torch.float32])
