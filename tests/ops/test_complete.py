"""Every op of the vocabulary has every facet, or says aloud why not."""

import inspect

import pytest
import torch

import compiled_attn.ops  # noqa: F401
from compiled_attn.ir.op import NAMESPACE, OPS, NoGradient


def test_the_namespace_holds_what_the_records_say():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")
    }
    assert {n.split(".")[0] for n in registered} == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_every_facet(name):
    op = OPS[name]
    for facet in (op.reference, op.shape, op.cost, op.decomposition):
        assert callable(facet)
    assert inspect.getmodule(op.reference).__doc__, "the op's file states what it computes"
    assert callable(op.gradient) or (isinstance(op.gradient, NoGradient) and len(op.gradient.because) > 10)
    assert op.overload._schema.name == f"{NAMESPACE}::{name}"
