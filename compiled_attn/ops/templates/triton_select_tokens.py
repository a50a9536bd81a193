"""Token selection as one Triton kernel (kernels/select_tokens.py): rank by counting, gather, and fold the rest.

Memory: scores are read from cache M / BLOCK_M times, each kept row is copied once, each dropped row is read once.
Nothing is sorted and nothing but the outputs is written.
"""

from typing import Any

from compiled_attn.ops.templates.base import Template
from compiled_attn.ops.templates.triton_config import DTYPES, Config, kind_of, offered, unfit

NAME = "triton_select_tokens"
KERNEL = "select_tokens"
TOKENS_MOST = 4096


def accepts(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> str | None:
    """None where the kernel covers this call of select_tokens, else the sentence that says why not."""
    x, score, *_ = args
    because = unfit(target)
    if because is not None:
        return because
    for name, tensor in (("tokens", x), ("scores", score)):
        if tensor.dtype not in DTYPES:
            return f"its {name} are {tensor.dtype}, the kernel reads float32, float16 and bfloat16"
    tokens = score.shape[1]
    if isinstance(tokens, int) and tokens > TOKENS_MOST:
        return f"it ranks {tokens} tokens, counting comparisons pays up to {TOKENS_MOST}"
    if not chosen(args, kwargs, target):
        return f"no configuration fits target {target.name} without spilling"
    return None


TEMPLATE = Template(NAME, "select_tokens", "cuda", accepts)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> list[Config]:
    """The configurations that fit `target` for this call, the most promising first."""
    return offered(KERNEL, case(args[0].dtype, fuse=kwargs.get("fuse", False)), configs(), target)


def grid(config: Config, batch: Any, tokens: Any, channels: Any, *, fuse: bool) -> tuple[Any]:
    """Programs to launch: per batch entry one for each block of tokens and, to fuse, one for each block of channels."""
    block_m, block_c = config.constants["BLOCK_M"], config.constants["BLOCK_C"]
    programs = (tokens + block_m - 1) // block_m
    if fuse:
        programs = programs + (channels + block_c - 1) // block_c
    return (batch * programs,)


def case(dtype: Any, *, fuse: bool) -> str:
    """The name under which this specialisation's machine code is recorded (scores in float32, the widest)."""
    return f"{kind_of(dtype)}{' fuse' if fuse else ''}"


def configs() -> tuple[Config, ...]:
    """Candidates, the most promising first."""
    sizes = ((16, 64, 64, 4), (32, 64, 64, 4), (16, 128, 128, 4))
    return tuple(Config((("BLOCK_M", m), ("BLOCK_J", j), ("BLOCK_C", c)), warps, 2) for m, j, c, warps in sizes)
