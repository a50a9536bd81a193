"""Published sizes for GPUs that are not here: every build passes the static checks. None has run on a device."""

import importlib
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("nvidia")
sys.path.insert(0, str(Path(__file__).parents[2]))
checks, table = (importlib.import_module(f"bench.{name}") for name in ("cross_checks", "cross_table"))
FORMS = (("fp16", "1"), ("bf16", "dynamic"), ("float32", "1"), ("fp16", "dynamic"), ("float32", "dynamic"))
OURS = ("evit_s", "deit_s_keep_0.7")


@pytest.mark.deep
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have the target")
@pytest.mark.parametrize(
    ("model", "target", "form"),
    [(m, t, FORMS[i % len(FORMS)]) for i, (m, t) in enumerate(product(table.MODELS, table.TARGETS))],
    ids=str,
)
def test_a_published_model_builds_for_an_absent_gpu_with_nothing_against_it(model, target, form):
    if model in table.TIMM:
        import torchvision_shim  # noqa: F401

        pytest.importorskip("timm")
    record = table.build({"model": model, "target": target, "precision": form[0], "batch": form[1]})
    assert record["problems"] == ()
    assert record["most_spilled"] <= checks.SPILL_BUDGET_BYTES
    assert (len(record["templates"]) >= 12) == (model in OURS)
    fused = {"convnext_tiny": 0, "evit_s": 9, "deit_s_keep_0.7": 9, "swin_tiny": 2}  # Swin's windows are our template's
    assert sum(record["fused_attention"].values()) == fused.get(model, 12)


def test_the_table_says_that_nothing_has_run_and_what_stands_against_a_build():
    job = {"model": "deit_s", "target": "a100", "precision": "fp16", "batch": "1", "machine": "here"}
    text = table.table([job | {"problems": ["no compiler\n  where: PATH"]}])
    assert "Nothing in this table has run on a device" in text
    assert "| no compiler |" in text


def test_a_cubins_architecture_is_read_from_its_header():
    header = bytearray(64)
    header[:4], header[48:52] = b"\x7fELF", (0x570557).to_bytes(4, "little")
    assert checks.cubin_sm(bytes(header)) == 87
    with pytest.raises(ValueError, match="no ELF"):
        checks.cubin_sm(b"words")


def test_a_weight_is_found_in_its_own_memory_order_or_missed_by_name():
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    blob = b"before" + weight.permute(0, 2, 3, 1).contiguous().numpy().tobytes() + b"after"
    assert checks.missing_weights({"kept": weight, "lost": weight + 1}, blob) == ["lost"]
