"""PruneTokens on stock models equals the rule in plain PyTorch, picture by picture; what it refuses, and how."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from models import enliven, timm_model

sys.path.insert(0, str(Path(__file__).parent))

from prune_reference import pruned
from test_reorganize_tokens import capture_raised, poolers, raised, stock, tensors, worst

from compiled_attn.ir.errors import PassError
from compiled_attn.ir.notes import Notes
from compiled_attn.ir.verify import verify
from compiled_attn.passes.base import run_passes
from compiled_attn.passes import pipelines
from compiled_attn.passes.prune_tokens import PruneTokens, with_kept_masks
from compiled_attn.runtime.capture import capture

MASS = {"mass": (0.9, 0.8, 0.85), "at": (0, 1, 2)}
THRESHOLD = {"threshold": 0.05, "at": (0, 2), "keep_at_least": 3, "keep_at_most": 9}
MODELS = ("deit_small_patch16_224", "vit_base_patch16_224", "ViTModel", "Dinov2Model")
MORE = ("deit3_small_patch16_224", "vit_small_patch14_dinov2", "DeiTModel", "flexivit_small")


@functools.cache
def cleaned(name, *, full=False):
    """A stock model captured with symbolic batch, its attention raised and masks that hide nothing dropped."""
    model, side = stock(name, full=full)
    program = capture(model, (torch.randn(2, 3, side, side),), dynamic_shapes=({0: "batch"},))
    return run_passes(program, pipelines.portable(), None, Notes())[0]


def prune(program, notes=None, **options):
    """The program pruned and verified, with its masks as a second output."""
    changed, _ = run_passes(program, [PruneTokens(**options)], None, Notes() if notes is None else notes)
    asked = with_kept_masks(changed)
    verify(asked, changed, after="kept masks")
    return asked


def check(program, model, side, options, batch, *, counts_differ=True):
    x = torch.randn(batch, 3, side, side)
    with torch.no_grad():
        out, masks = prune(program, **options)(x)
        want, wanted = pruned(model, x, **options)
    assert [m.tolist() for m in masks] == [m.tolist() for m in wanted]
    assert worst(tensors(out), want) < 1e-5
    if counts_differ:
        assert batch == 1 or len({*masks[-1].sum(1).tolist()}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_pruned_equals_the_rule_picture_by_picture(name):
    model, side = stock(name)
    for options, batch in ((MASS, 6), (THRESHOLD, 1), (THRESHOLD, 9)):
        check(cleaned(name), model, side, options, batch, counts_differ=False)
