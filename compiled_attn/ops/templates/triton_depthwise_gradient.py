"""The gradient of a depthwise kernel in Triton (kernels/depthwise_gradient.py): one place, some channels a program.

Memory: both maps are read once for each of the kernel's places, from the caches; SHARES sums of each are written.
"""

from typing import Any

from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import DTYPES, Config, kind_of, offered, unfit

NAME = "triton_depthwise_gradient"
KERNEL = "depthwise_gradient"


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of depthwise_weight_gradient, else the sentence that says why not."""
    because = unfit(target)
    if because is not None:
        return because
    if args[0].dtype not in DTYPES:
        return f"its elements are {args[0].dtype}, the kernel takes float32, float16 and bfloat16"
    if not chosen(args, kwargs, target):
        return f"no configuration fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "depthwise_weight_gradient", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    del kwargs
    return offered(KERNEL, case(args[0].dtype), configs(), target)


def grid(config: Config, places: int, channels: Any) -> tuple[Any, Any, Any]:
    """Programs to launch for a kernel of so many places."""
    block = config.constants["BLOCK_C"]
    return (places, (channels + block - 1) // block, config.constants["SHARES"])


def case(dtype: Any) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return kind_of(dtype)


def configs() -> tuple[Config, ...]:
    """Candidates, the most promising first."""
    sizes = [(16, 64, 16, 4), (8, 32, 16, 2)]
    return tuple(Config((("BLOCK_X", x), ("BLOCK_C", c), ("SHARES", s)), warps, 2) for x, c, s, warps in sizes)
