"""Every Triton kernel compiles to machine code for each target, without a GPU, within the target's limits."""

import hashlib
import json

import pytest
from cross.child import python

from compiled_attn.ir import targets
from compiled_attn.ops.templates import triton_attention
from compiled_attn.ops.templates.triton_config import BLOCKS, DTYPES, KERNELS, RECORD, MachineCode, recorded

triton = pytest.importorskip("triton")

SMS = (80, 86, 87, 89, 90)
DEVICES = {80: "a100", 86: "a10", 87: "orin", 89: "l4", 90: "h100"}


def compiled(*options):
    """One record a compile: kernel, case, sm, configuration, registers, spills, shared, fits."""
    lines = python("bench/machine_code.py", "--chosen", "--sm", *map(str, SMS), *options).splitlines()
    return [json.loads(line) for line in lines]


def test_what_is_chosen_for_heads_of_64_compiles_within_the_limits_of_every_target():
    found = compiled("--case", "d64$|d64 bias$|half d64 axis$|half d64 2d$|half m16 d32$|^fp32$|fuse")
    assert {line["kernel"] for line in found} == {
        "attention",
        "cached_attention_combine",
        "cached_attention_split",
        "class_row_logits",
        "class_row_mean",
        "decay_attention",
        "depthwise",
        "depthwise_gradient",
        "depthwise_input_gradient",
        "local_attention",
        "local_attention_columns",
        "local_attention_rows",
        "neighborhood",
        "ragged_attention",
        "select_tokens",
    }
    for line in found:
        assert line["fits"], line
        assert line["spills"] == 0
        assert line["registers"] <= 255
        assert line["shared"] <= targets.load(DEVICES[line["sm"]]).shared_bytes_per_block


@pytest.mark.deep
def test_everything_that_is_chosen_compiles_within_the_limits_of_every_target():
    assert all(line["config"] and line["fits"] for line in compiled())


def test_the_record_was_made_of_these_kernels():
    sources = json.loads(RECORD.read_text())[triton.__version__]["sources"]
    for name, digest in sources.items():
        assert hashlib.sha256((KERNELS / name).read_bytes()).hexdigest() == digest, (
            f"{name} has changed since its machine code was recorded; run bench/machine_code.py --again"
        )
    assert set(sources) == {path.name for path in KERNELS.glob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("sm", SMS)
def test_the_record_holds_a_candidate_without_spills_for_every_case(sm):
    limit = targets.load(DEVICES[sm]).shared_bytes_per_block
    for kernel, cases in recorded().items():
        for case, configs in cases.items():
            fitting = [
                c for c, by_sm in configs.items() if f"sm_{sm}" in by_sm and MachineCode(*by_sm[f"sm_{sm}"]).fits(limit)
            ]
            assert fitting, f"{kernel}, {case}, sm_{sm}"


def test_the_planned_shared_memory_bounds_what_the_compiler_takes():
    for dtype in DTYPES:
        for block in BLOCKS:
            for bias in (False, True):
                case = recorded()["attention"][triton_attention.case(dtype, block, bias=bias, causal=False)]
                for config in triton_attention.configs(dtype, block):
                    planned = triton_attention.shared_bytes(config, dtype, block, bias=bias)
                    for _, _, taken in case.get(config.name, {}).values():
                        assert taken <= planned, (config.name, dtype, block, bias)
