"""Checks what an artifact is called with, and puts its results together again, as the contract says.

Converted without a word: a tensor whose memory order differs from the wanted one is copied into it (not state, which
the call writes into: that is an error). Everything else that differs is a ContractError: nothing is cast, moved,
broadcast or padded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils import _pytree as pytree

from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import expr as ex
from compiled_attn.runtime.contract import Call, ConstantSpec, Range, SizeSpec, TensorSpec
from compiled_attn.runtime.expr import Expr


@dataclass(frozen=True)
class _Argument:
    """One argument of forward. spec: its pytree; count: number of leaves."""

    name: str
    spec: Any
    count: int
    is_leaf: bool


class Caller:
    """Binds, checks and converts arguments; restores results. Holds no state between calls, so it is thread-safe."""

    def __init__(self, call: Call, where: str, device: torch.device) -> None:
        self.call, self.where, self.device = call, where, device
        self.in_spec = load_tree(call.in_tree, where)
        self.out_spec = load_tree(call.out_tree, where)
        self.arguments = self._arguments()
        self.names = [a.name for a in self.arguments]
        self.has_state = bool(call.state)
        self.dtypes = [getattr(torch, i.dtype) if isinstance(i, TensorSpec) else None for i in call.inputs]

    def _arguments(self) -> list[_Argument]:
        args, kwargs = pytree.tree_unflatten([0] * self.in_spec.num_leaves, self.in_spec)
        values = [*args, *kwargs.values()]
        names = [*self.call.arguments[: len(args)], *kwargs]
        leaves = sum(pytree.tree_structure(v).num_leaves for v in values)
        if len(args) != self.call.positional or len(names) != len(values) or leaves != len(self.call.inputs):
            raise ContractError(
                "the contract's argument names do not fit its pytree",
                where=self.where,
                facts=f"{len(values)} arguments in the pytree; {self.call.positional} positional ones are named",
                do="export the model again",
            )
        specs = [pytree.tree_structure(v) for v in values]
        leaf = pytree.tree_structure(0)
        return [_Argument(n, s, s.num_leaves, s == leaf) for n, s in zip(names, specs, strict=True)]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat leaves of a call, in the contract's order. Raises ContractError for a wrong set of arguments."""
        names = self.names
        if len(args) > len(names):
            raise self._error(
                "the call has too many arguments",
                f"{len(args)} positional ones are given, the artifact takes {len(names)}: {', '.join(names)}",
                "pass exactly these",
            )
        given = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name in given or name not in names:
                problem = "given twice" if name in given else "not taken"
                raise self._error(
                    f"argument {name} is {problem}",
                    f"the artifact takes {', '.join(names)}",
                    "pass exactly these, once",
                )
        given.update(kwargs)
        leaves: list[Any] = []
        for argument in self.arguments:
            if argument.name not in given:
                raise self._error(
                    f"argument {argument.name} is missing",
                    f"the artifact takes {', '.join(names)}; given are {', '.join(given) or 'none'}",
                    f"pass {argument.name} as well",
                )
            value = given[argument.name]
            leaves += [value] if argument.is_leaf else self._flatten(argument, value)
        return leaves

    def _flatten(self, argument: _Argument, value: Any) -> list[Any]:
        try:
            return argument.spec.flatten_up_to(value)
        except (ValueError, TypeError, KeyError):
            raise self._error(
                f"argument {argument.name} has another structure",
                f"exported as {_short(argument.spec)}, given as {_short(pytree.tree_structure(value))}",
                "pass the structure that the model was exported with",
            ) from None

    def check(self, leaves: Sequence[Any]) -> tuple[list[torch.Tensor], dict[str, int]]:
        """The tensors to run on, in the wanted memory order, and the sizes of the symbols. Raises ContractError."""
        tensors: list[torch.Tensor] = []
        wanted: list[TensorSpec] = []
        for spec, dtype, value in zip(self.call.inputs, self.dtypes, leaves, strict=True):
            if isinstance(spec, ConstantSpec):
                self._check_constant(spec, value)
            else:
                self._check_tensor(spec, dtype, value)
                tensors.append(value)
                wanted.append(spec)
        sizes = self._check_sizes(wanted, tensors)
        tensors = [self._arranged(s, t) for s, t in zip(wanted, tensors, strict=True)]
        self._check_overlap(wanted, tensors)
        return tensors, sizes

    def _check_constant(self, spec: ConstantSpec, value: Any) -> None:
        if type(value) is not type(spec.value) or value != spec.value:
            raise self._error(
                f"input {spec.name} has another value",
                f"the export fixed it to {spec.value!r}, given is {_kind(value)}",
                f"pass {spec.value!r}, or export the model with the other value",
            )

    def _check_tensor(self, spec: TensorSpec, dtype: torch.dtype | None, value: Any) -> None:
        if type(value) is not torch.Tensor and type(value) is not torch.nn.Parameter:
            raise self._error(
                f"input {spec.name} is no plain tensor",
                f"wanted {describe(spec)}, given is {_kind(value)}",
                "pass a torch.Tensor",
            )
        if value.layout is not torch.strided or value.is_conj() or value.is_neg() or value.is_quantized:
            raise self._error(
                f"input {spec.name} has another layout",
                f"wanted strided memory, given is {value.layout}" + (", lazily negated" if value.is_neg() else ""),
                "pass x.to_dense() or x.resolve_neg().resolve_conj()",
            )
        if value.dtype is not dtype:
            raise self._error(
                f"input {spec.name} has another dtype",
                f"wanted {describe(spec)}, given is {str(value.dtype)[6:]}",
                f"convert it: {spec.name}.to(torch.{spec.dtype})",
            )
        if value.device != self.device:
            raise self._error(
                f"input {spec.name} is on another device",
                f"wanted {self.device}, given is {value.device}",
                f"move it: {spec.name}.to('{self.device}')",
            )
        if value.dim() != len(spec.shape):
            raise self._error(
                f"input {spec.name} has another rank",
                f"wanted {describe(spec)}, given is [{', '.join(map(str, value.shape))}]",
                "reshape it to the wanted dimensions",
            )

    def _check_sizes(self, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        rest: list[tuple[TensorSpec, int, Expr, int]] = []
        for spec, tensor in zip(specs, tensors, strict=True):
            for dim, (size, found) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
                if isinstance(size, int):
                    if size != found:
                        raise self._wrong_size(spec, dim, str(size), found)
                elif isinstance(size, str) and size not in sizes:
                    self._check_range(spec, dim, size, found)
                    sizes[size] = found
                else:
                    rest.append((spec, dim, size, found))
        for spec, dim, size, found in rest:
            solved = ex.solve(size, found, sizes) if ex.symbols_of(size) - set(sizes) else None
            if solved is not None:
                self._check_range(spec, dim, *solved)
                sizes[solved[0]] = solved[1]
        for spec, dim, size, found in rest:
            value = _value(size, sizes)
            if value != found:
                state = ", ".join(f"{k}={v}" for k, v in sorted(sizes.items()) if k in ex.symbols_of(size))
                wanted = state if isinstance(size, str) else f"{ex.text(size)} = {value} ({state})"
                raise self._wrong_size(spec, dim, wanted if value is not None else ex.text(size), found)
        for guard in self.call.guards:
            if _value(guard, sizes) != 1:
                state = ", ".join(f"{k}={sizes[k]}" for k in sorted(ex.symbols_of(guard)) if k in sizes)
                raise self._error(
                    "the inputs' sizes break a condition of the export",
                    f"it relies on {ex.text(guard)}, given is {state}",
                    "pass sizes that satisfy it, or export the model for these",
                )
        return sizes

    def _check_range(self, spec: TensorSpec, dim: int, symbol: str, found: int) -> None:
        allowed = self.call.symbols[symbol]
        if found < allowed.min or (allowed.max is not None and found > allowed.max):
            raise self._error(
                f"input {spec.name} has a size out of range in dimension {dim}",
                f"{symbol} is allowed {range_text(allowed)}, given is {found}",
                "pass a size within the range, or export the model with a wider one",
            )

    def _wrong_size(self, spec: TensorSpec, dim: int, wanted: str, found: int) -> ContractError:
        return self._error(
            f"input {spec.name} has another size in dimension {dim}",
            f"wanted {wanted}, given is {found}",
            "pass the wanted size, or export the model with this dimension dynamic",
        )

    def _arranged(self, spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_contiguous() and all(a < b for a, b in pairwise(spec.order)):
            return tensor
        strides = strides_of(tensor.shape, spec.order)
        same = all(n <= 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))
        if same or tensor.numel() == 0:
            return tensor
        if spec.mutated:
            raise self._error(
                f"state {spec.name} has another memory order",
                f"wanted strides {strides}, given are {tensor.stride()}; the call writes into it, so it is not copied",
                "pass state as the model's export had it (contiguous)",
            )
        copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        return copy.copy_(tensor)

    def _check_overlap(self, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> None:
        if not self.has_state:
            return
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes, s) for s, t in zip(specs, tensors, strict=True) if t.nbytes]
        for start, end, spec in spans:
            for other_start, other_end, other in spans:
                if spec.mutated and other is not spec and start < other_end and other_start < end:
                    raise self._error(
                        f"state {spec.name} shares memory with input {other.name}",
                        "the call writes into the one while it reads the other",
                        f"pass {other.name}.clone()",
                    )

    def restore(self, results: Sequence[Any], sizes: Mapping[str, int]) -> Any:
        """The result in its pytree; AOTInductor gives one for each leaf, constants included.

        Raises ContractError where the compiled code gave what the contract excludes.
        """
        leaves: list[Any] = []
        for spec, result in zip(self.call.outputs, results, strict=True):
            if isinstance(spec, ConstantSpec):
                leaves.append(spec.value)
            elif isinstance(spec, SizeSpec):
                leaves.append(int(result.item()))
            else:
                leaves.append(self._check_result(spec, result, sizes))
        return pytree.tree_unflatten(leaves, self.out_spec)

    def _check_result(self, spec: TensorSpec, tensor: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
        wanted = [e if isinstance(e, int) else _value(e, sizes) for e in spec.shape]
        agrees = len(wanted) == tensor.dim() and all(w in (None, n) for w, n in zip(wanted, tensor.shape, strict=True))
        if agrees and tensor.dtype is getattr(torch, spec.dtype):
            return tensor
        raise self._error(
            f"output {spec.name} is not what the contract states",
            f"stated {describe(spec)}, computed {str(tensor.dtype)[6:]}[{', '.join(map(str, tensor.shape))}]",
            "export the model again; this artifact's code and contract do not belong together",
        )

    def _error(self, what: str, facts: str, do: str) -> ContractError:
        return ContractError(what, where=self.where, facts=facts, do=do)


def load_tree(text: str, where: str) -> Any:
    """A pytree spec from its serialised form; classes of transformers are imported when they are met."""
    try:
        return pytree.treespec_loads(text)
    except NotImplementedError as error:
        if '"transformers.' in text:
            importlib.import_module("transformers.modeling_outputs")
            return pytree.treespec_loads(text)
        raise ContractError(
            "a container of the model's inputs or outputs is not known here",
            where=where,
            facts=str(error).splitlines()[0],
            do="import the module that defines and registers it (torch.utils._pytree) before loading",
        ) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ContractError(
            "the contract is not well formed",
            where=where,
            facts=f"a pytree spec can not be read ({type(error).__name__})",
            do="export the model again; a contract is never edited by hand",
        ) from None


def strides_of(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of dense memory whose dimensions lie in `order`, outermost first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def describe(spec: TensorSpec) -> str:
    """`float32[batch, 3, 224, 224]`."""
    return f"{spec.dtype}[{', '.join(ex.text(e) for e in spec.shape)}]"


def range_text(allowed: Range) -> str:
    """`1 to 16`, `1 or more`."""
    return f"{allowed.min} or more" if allowed.max is None else f"{allowed.min} to {allowed.max}"


def _value(size: Expr, sizes: Mapping[str, int]) -> int | None:
    try:
        return ex.evaluate(size, sizes)
    except ex.Undefined:
        return None


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{value!r:.40}" if isinstance(value, (int, float, bool, str, type(None))) else f"a {type(value).__name__}"


def _short(spec: Any) -> str:
    return " ".join(str(spec).split())[:120]
