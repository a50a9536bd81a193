"""Depthwise blocks as one Triton kernel (kernels/depthwise.py): a tile of columns by channels of one row a program.

Memory: x is read from the first-level cache once for each place of the kernel and from memory about once for each of
its rows; the result is written once. No shared memory but for the norm's sums.
"""

from typing import Any

from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import DTYPES, Config, block_of, kind_of, offered, unfit

NAME = "triton_depthwise"
KERNEL = "depthwise"
NORM_MOST = 1024  # channels that one program holds
NORM_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of depthwise_block, else the sentence that says why not."""
    x, weight, *_ = args
    because = unfit(target)
    if because is not None:
        return because
    if x.dtype not in DTYPES:
        return f"its elements are {x.dtype}, the kernel takes float32, float16 and bfloat16"
    if kwargs.get("norm_eps") is not None and not (isinstance(weight.shape[2], int) and weight.shape[2] <= NORM_MOST):
        return f"its norm is over {weight.shape[2]} channels, a program holds {NORM_MOST}"
    if not chosen(args, kwargs, target):
        return f"no configuration fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "depthwise_block", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    block = norm_block(args, kwargs)
    return offered(KERNEL, case(args[0].dtype, block), configs(block), target)


def norm_block(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Channels of a program where there is a norm, a power of two; 0 where there is none."""
    return block_of(args[1].shape[2]) if kwargs.get("norm_eps") is not None else 0


def grid(config: Config, batch: Any, channels: Any, rows: Any, columns: Any) -> tuple[Any, Any]:
    """Programs to launch for a result of these sizes."""
    block_x, block_c = config.constants["BLOCK_X"], config.constants["BLOCK_C"]
    return (batch * rows * ((columns + block_x - 1) // block_x), (channels + block_c - 1) // block_c)


def case(dtype: Any, block: int) -> str:
    """The name under which this specialisation's machine code is recorded, with all that may follow the sums."""
    return kind_of(dtype) + (f" norm{block}" if block else "")


def configs(block: int) -> tuple[Config, ...]:
    """Candidates, the most promising first; `block` as norm_block gives it."""
    sizes = [(16, 64, 4), (8, 64, 4), (16, 32, 2)]
    if block:
        sizes = [(max(1, 2048 // block), block, 4), (max(1, 1024 // block), block, 4)]
    return tuple(Config((("BLOCK_X", x), ("BLOCK_C", c)), warps, 2) for x, c, warps in sizes)
