"""The gradient of a depthwise convolution's input in Triton (kernels/depthwise_input_gradient.py).

Memory: the result's gradient is read from the first-level cache once for each place of the kernel that meets a row and
from memory about once for each of its rows; the input's gradient is written once.
"""

from typing import Any

from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import DTYPES, Config, kind_of, offered, unfit
from compiled_attn.ops.templates.triton_depthwise import configs as block_configs
from compiled_attn.ops.templates.triton_depthwise import grid

NAME = "triton_depthwise_input_gradient"
KERNEL = "depthwise_input_gradient"

__all__ = ["KERNEL", "TEMPLATE", "accepts", "case", "chosen", "configs", "grid"]


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of depthwise_input_gradient, else the sentence that says why not."""
    because = unfit(target)
    if because is not None:
        return because
    if args[0].dtype not in DTYPES:
        return f"its elements are {args[0].dtype}, the kernel takes float32, float16 and bfloat16"
    if not chosen(args, kwargs, target):
        return f"no configuration fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "depthwise_input_gradient", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    del kwargs
    return offered(KERNEL, case(args[0].dtype), configs(), target)


def case(dtype: Any) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return kind_of(dtype)


def configs() -> tuple[Config, ...]:
    """Candidates, the most promising first: those of the convolution without a norm."""
    return block_configs(0)
