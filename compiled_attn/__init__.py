"""compiled_attn: a compiler for attention models on torch.export and Inductor.

import compiled_attn as ca
fast = ca.compile(model)                    # a callable with the same numbers
art = ca.export(model, (x,), path="m.pt2")  # an artifact that runs with no Python
"""

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "capture",
    "compile",
    "decoder",
    "doctor",
    "export",
    "generate",
    "load",
    "load_decoder",
    "observe",
    "ops",
    "passes",
    "targets",
    "zoo",
]

_FUNCTIONS = {
    "capture": "compiled_attn.runtime.capture",
    "compile": "compiled_attn.runtime.compile",
    "decoder": "compiled_attn.runtime.generate",
    "doctor": "compiled_attn.runtime.doctor",
    "export": "compiled_attn.runtime.export",
    "generate": "compiled_attn.runtime.generate",
    "load": "compiled_attn.runtime.load",
    "load_decoder": "compiled_attn.runtime.decoder_file",
    "observe": "compiled_attn.runtime.observe",
}
_MODULES = {
    "ops": "compiled_attn.ops",
    "passes": "compiled_attn.passes",
    "targets": "compiled_attn.ir.targets",
    "zoo": "compiled_attn.zoo",
}


def __getattr__(name: str) -> Any:
    """Imports a name at its first use, so that `import compiled_attn` is quick and needs no optional package."""
    import importlib

    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'compiled_attn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
