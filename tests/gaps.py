"""Known gaps, each a strict xfail: what the tests ask for and the library does not do yet, with the reason.

A test names its gap by `@gap("id")`; when the gap is mended the test turns red until the entry goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

GAPS: dict[str, str] = {
    "first-pool-turns": "poolformerv2's first sum with an average is read in no fixed layout, so Inductor writes it"
    " channels first and the next kernel reads it across: one map turned",
    "onnx-bf16": "ONNX Runtime has no bfloat16 kernels for the CPU, so export refuses the precision in words",
}


def gap(name: str) -> Callable[[Any], Any]:
    """Marks a test as expected to fail, strictly, for the reason that GAPS gives."""
    return pytest.mark.xfail(reason=GAPS[name], strict=True)
