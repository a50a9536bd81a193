"""The gradients of Triton launches that no kernel gives: by the vocabulary op's own rule, on the launch's arguments."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from compiled_attn.ir.op import OPS, NoGradient


def by_the_rule(name: str, launch: Any, operator: Callable[..., Any]) -> None:
    """Gives `launch`, which torch.library has made of `operator`, the gradient of the vocabulary op `name`.

    operator: its arguments bear the names of the op's, any of whose options it may leave out; the target comes last.
    """
    names = list(inspect.signature(operator).parameters)
    of_the_op = OPS[name].overload._schema.arguments
    positional = [argument.name for argument in of_the_op if not argument.kwarg_only]
    options = [argument.name for argument in of_the_op if argument.kwarg_only and argument.name in names]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        given = dict(zip(names, inputs, strict=True))
        ctx.tensors = [n for n, value in given.items() if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(given[n] for n in ctx.tensors))
        ctx.others = {n: value for n, value in given.items() if n not in ctx.tensors}

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        rule = OPS[name].gradient
        if isinstance(rule, NoGradient):
            raise ValueError(f"{name} has no gradient, {rule.because}")
        given = ctx.others | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        found = rule(tuple(given[n] for n in positional), {n: given[n] for n in options}, grads)
        by_name = dict(zip(positional, found, strict=True))
        needed = zip(names, ctx.needs_input_grad, strict=False)  # torch has one more argument of its own
        return tuple(by_name.get(n) if need else None for n, need in needed)

    launch.register_autograd(backward, setup_context=setup)
