"""Who may import whom (ir <- ops <- passes <- runtime; zoo knows ops only), and where private torch may be touched."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "compiled_attn"
MAY = {
    "ir": {"ir"},
    "ops": {"ir", "ops"},
    "passes": {"ir", "ops", "passes"},
    "zoo": {"ir.errors", "ops", "zoo"},
    "runtime": {"ir", "ops", "passes", "runtime", "zoo"},
}
PRIVATE = ("torch._inductor", "torch._dynamo", "torch._functorch", "torch._export", "torch.fx.experimental")
CROSS = ROOT / "ir" / "_torch_cross.py"  # builds with no GPU at hand
COMPATIBILITY = (ROOT / "ir" / "_torch.py", ROOT / "ir" / "_torch_mends.py", CROSS)
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        if name.startswith("compiled_attn."):
            rest = name.removeprefix("compiled_attn.")
            if rest.split(".")[0] in MAY:
                assert any(rest == m or rest.startswith(f"{m}.") for m in MAY[layer]), f"{layer} imports {name}"
        if name.startswith(PRIVATE):
            assert path in COMPATIBILITY, f"{name} is private; reach it through ir/_torch.py"
        if name == "triton" or name.startswith("triton."):
            launches = path in (ROOT / "runtime" / "triton_run.py", CROSS)
            assert launches or path.is_relative_to(ROOT / "ops" / "kernels"), f"{path.name} imports triton"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_says_what_it_is_for(path):
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "no module docstring"
