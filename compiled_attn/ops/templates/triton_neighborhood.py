"""neighborhood_apply as one Triton kernel (kernels/neighborhood.py): windows are mixed where they lie.

Memory: a program holds the sums of its queries in registers; weights and results move once, values from memory about
once and from the first-level cache once for each place of the window. No shared memory.
"""

from typing import Any

from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import DTYPES, Config, block_of, kind_of, offered, unfit

NAME = "triton_neighborhood"
KERNEL = "neighborhood"
MIXES = (1, 4, 16)  # blocks of mixes
WIDTHS = (16, 32, 64)  # blocks of values; wider ones are cut
SUMS = {1: (1024, 512), 4: (2048, 1024), 16: (2048, 1024)}  # that a program holds, by its mixes


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of compiled_attn::neighborhood_apply, else why not."""
    weights, v = args
    because = unfit(target)
    if because is not None:
        return because
    if v.dtype not in DTYPES:
        return f"its elements are {v.dtype}, the kernel takes float32, float16 and bfloat16"
    if not isinstance(v.shape[-1], int):
        return f"its value width {v.shape[-1]} is symbolic, the kernel is compiled for one"
    mixes = weights.shape[-2]
    if not isinstance(mixes, int) or mixes > MIXES[-1]:
        return f"it mixes each window {mixes} times, a program holds at most {MIXES[-1]}"
    if not chosen(args, kwargs, target):
        return f"no configuration fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "neighborhood_apply", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    del kwargs
    weights, v = args
    sizes = blocks(weights.shape[-2], v.shape[-1])
    return offered(KERNEL, case(v.dtype, *sizes), configs(*sizes), target)


def blocks(mixes: int, width: int) -> tuple[int, int]:
    """Mixes and values of a program, powers of two."""
    return next(size for size in MIXES if mixes <= size), min(WIDTHS[-1], block_of(width))


def grid(config: Config, pictures: Any, queries: Any, width: int) -> tuple[Any, Any]:
    """Programs for `pictures` times heads of `queries` each."""
    block_n, block_d = config.constants["BLOCK_N"], config.constants["BLOCK_D"]
    return (pictures * ((queries + block_n - 1) // block_n), (width + block_d - 1) // block_d)


def case(dtype: Any, mixes: int, width: int) -> str:
    """The name under which this specialisation's machine code is recorded."""
    return f"{kind_of(dtype)} m{mixes} d{width}"


def configs(mixes: int, width: int) -> tuple[Config, ...]:
    """Candidates for blocks of these sizes, the most promising first."""
    return tuple(
        Config((("BLOCK_N", max(1, sums // (mixes * width))), ("BLOCK_MIX", mixes), ("BLOCK_D", width)), 4, 1)
        for sums in SUMS[mixes]
    )
