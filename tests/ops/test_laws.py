"""Every law of tests/laws.py, asked of every op on each of its inputs."""

from __future__ import annotations

import laws
import pytest
import torch
from strategies import BAD_INPUTS, INPUTS

from compiled_attn.ops import OPS

CASES = [pytest.param(OPS[name], inputs, id=f"{name}: {inputs.name}") for name in OPS for inputs in INPUTS[name]]
BAD = [pytest.param(OPS[name], *bad, id=f"{name}: {bad[1]}") for name in OPS for bad in BAD_INPUTS[name]]
cases = pytest.mark.parametrize(("op", "inputs"), CASES)


def test_every_op_has_inputs_good_and_bad():
    assert set(INPUTS) == set(OPS) == set(BAD_INPUTS)


@cases
def test_the_shape_rule_tells_what_the_op_gives(op, inputs):
    laws.fake_equals_real(op, inputs)


@cases
@pytest.mark.parametrize("dtype", laws.ROUNDING, ids=str)
def test_the_decomposition_equals_the_reference(op, inputs, dtype):
    laws.decomposition_equals_reference(op, inputs, dtype)


@cases
def test_the_gradient_is_that_of_the_equation(op, inputs):
    laws.gradient_equals_autograd_of_the_reference(op, inputs)


@cases
def test_the_cost_is_whole_and_symbolic_where_sizes_are(op, inputs):
    laws.cost_counts_every_byte_and_reads_no_hint(op, inputs)


@pytest.mark.parametrize(("op", "arguments", "words"), BAD)
def test_bad_input_gets_a_worded_error(op, arguments, words):
    laws.bad_input_gets_a_worded_error(op, arguments, words)


def test_the_gradients_of_attention_agree_with_finite_differences():
    q, k, v, bias = (a.requires_grad_() for a in INPUTS["attention"][1].make(torch.float64))
    call = OPS["attention"].overload
    assert torch.autograd.gradcheck(lambda *args: call(*args, scale=0.25), (q, k, v, bias), fast_mode=True)
