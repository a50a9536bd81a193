"""The contract of an artifact: what it takes, gives, needs and consists of, as canonical JSON inside the package.

    {"call": {...}, "contract_version": 2, "members": [...], "passes": [...], "target": {...}, "versions": {...}}

Canonical: keys sorted, no spaces, ASCII, each key once; a contract written otherwise is refused. The C++ runner
(runtime/cpp) reads the same form under the same rules; where one of the two changes, so does the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import expr as ex
from compiled_attn.runtime.expr import Expr

VERSION = 2
MEMBER = "model/extra/compiled_attn_contract.json"
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
DTYPES = frozenset({*INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64", "complex128"})
HEX = re.compile(r"[0-9a-f]{64}\Z")
MAX_RANK = 32
NATIVE, CROSS = "built on its target", "cross-compiled, not run on the target"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the flat inputs or outputs.

    shape: sizes, symbolic where they may vary.  order: its dimensions from the outermost in memory to the innermost;
    the memory is dense in that order (contiguous is 0, 1, 2, ...).  mutated: the call writes into it (state).
    """

    name: str
    dtype: str
    shape: tuple[Expr, ...]
    order: tuple[int, ...]
    device: str
    mutated: bool = False


@dataclass(frozen=True)
class ConstantSpec:
    """An input or output that is no tensor: its value was fixed by the export."""

    name: str
    value: int | float | bool | str | None


@dataclass(frozen=True)
class SizeSpec:
    """An output that is an integer computed from the inputs' sizes."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Range:
    """Allowed sizes of a symbol, both ends included; max None: no upper end.

    bound: the inputs' shapes determine it (False: it depends on the data, and only outputs mention it).
    """

    min: int
    max: int | None
    bound: bool = True


@dataclass(frozen=True)
class Call:
    """How the model is called. arguments: names of forward's arguments, positional ones first (`positional` of them).

    in_tree, out_tree: torch's serialised pytree specs of (args, kwargs) and of the result. guards: conditions on the
    symbols that the compiled code relies on, besides the ranges.
    """

    arguments: tuple[str, ...]
    positional: int
    inputs: tuple[TensorSpec | ConstantSpec, ...]
    outputs: tuple[TensorSpec | ConstantSpec | SizeSpec, ...]
    symbols: Mapping[str, Range]
    guards: tuple[Expr, ...]
    in_tree: str
    out_tree: str

    @property
    def tensors(self) -> list[TensorSpec]:
        return [i for i in self.inputs if isinstance(i, TensorSpec)]

    @property
    def state(self) -> list[str]:
        """Names of the inputs that the call writes into."""
        return [t.name for t in self.tensors if t.mutated]


@dataclass(frozen=True)
class Needs:
    """The machine an artifact was built for. isa: instruction set extensions, in the kernel's spelling, sorted.

    A GPU's compute capability stands there as sm_80.  origin: NATIVE, or CROSS, where no such GPU was at hand.
    """

    name: str
    device: str
    platform: str
    machine: str
    isa: tuple[str, ...]
    origin: str = NATIVE


@dataclass(frozen=True)
class PassRecord:
    """A pass that changed the program, and its options."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class MemberSpec:
    """Another member of the package."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Contract:
    """All of it. versions: of torch and of what else took part, by name. members: in the archive's order."""

    call: Call
    target: Needs
    versions: Mapping[str, str]
    passes: tuple[PassRecord, ...]
    members: tuple[MemberSpec, ...] = ()

    def stamp(self) -> str:
        """Digest of everything but the members: the package's own metadata repeats it."""
        whole = to_json(self)
        parts = [canonical(whole[key]) for key in ("call", "passes", "target", "versions")]
        return hashlib.sha256(b"\n".join(parts)).hexdigest()

    def to_bytes(self) -> bytes:
        return canonical(to_json(self))


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def to_json(contract: Contract) -> dict[str, Any]:
    """The contract as JSON values."""
    call = contract.call
    return {
        "contract_version": VERSION,
        "call": {
            "arguments": list(call.arguments),
            "positional": call.positional,
            "inputs": [_leaf_to_json(i) for i in call.inputs],
            "outputs": [_leaf_to_json(o) for o in call.outputs],
            "symbols": {k: {"min": r.min, "max": r.max, "bound": r.bound} for k, r in call.symbols.items()},
            "guards": list(call.guards),
            "in_tree": call.in_tree,
            "out_tree": call.out_tree,
        },
        "target": {**vars(contract.target), "isa": list(contract.target.isa)},
        "versions": dict(contract.versions),
        "passes": [{"name": p.name, "options": dict(p.options)} for p in contract.passes],
        "members": [vars(m) for m in contract.members],
    }


def _leaf_to_json(leaf: TensorSpec | ConstantSpec | SizeSpec) -> dict[str, Any]:
    kind = {TensorSpec: "tensor", ConstantSpec: "constant", SizeSpec: "size"}[type(leaf)]
    return {"kind": kind, **vars(leaf)}


def from_bytes(data: bytes, where: str) -> Contract:
    """Reads and checks a contract. Raises ContractError naming the field and what is wrong with it."""
    reader = _Reader(where)
    try:
        value = json.loads(data.decode("ascii"))
        same = canonical(value) == data
    except (ValueError, RecursionError) as error:
        raise reader.error("the text", f"is no JSON ({type(error).__name__})") from None
    if not same:
        raise reader.error("the text", "is not in canonical form")
    if isinstance(value, dict) and value.get("contract_version", VERSION) != VERSION:
        raise ContractError(
            "the contract has a version that this library does not know",
            where=where,
            facts=f"its version is {json.dumps(value['contract_version'])}, known is {VERSION}",
            do="load it with the compiled_attn that wrote it, or export the model again",
        )
    return reader.contract(value)


class _Reader:
    """Typed access to JSON values; every failure names the path of the field."""

    def __init__(self, where: str) -> None:
        self.where = where

    def error(self, path: str, problem: str) -> ContractError:
        return ContractError(
            "the contract is not well formed",
            where=self.where,
            facts=f"{path} {problem}",
            do="export the model again; a contract is never edited by hand",
        )

    def fail(self, path: str, problem: str) -> NoReturn:
        raise self.error(path, problem)

    def record(self, value: Any, path: str, keys: str) -> list[Any]:
        wanted = keys.split()
        if not isinstance(value, dict) or sorted(value) != sorted(wanted):
            self.fail(path, f"does not have exactly the fields {', '.join(sorted(wanted))}")
        return [value[k] for k in wanted]

    def text(self, value: Any, path: str) -> str:
        return value if isinstance(value, str) else self.fail(path, "is no text")

    def number(self, value: Any, path: str) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < ex.LIMIT
        return value if whole else self.fail(path, "is no whole number of at most 63 bits")

    def flag(self, value: Any, path: str) -> bool:
        return value if isinstance(value, bool) else self.fail(path, "is neither true nor false")

    def items(self, value: Any, path: str) -> list[tuple[Any, str]]:
        if not isinstance(value, list):
            self.fail(path, "is no list")
        return [(v, f"{path}[{i}]") for i, v in enumerate(value)]

    def entries(self, value: Any, path: str) -> list[tuple[str, Any, str]]:
        if not isinstance(value, dict):
            self.fail(path, "is no record")
        return [(k, v, f"{path}.{k}") for k, v in value.items()]

    def expression(self, value: Any, path: str) -> Expr:
        try:
            return ex.well_formed(value)
        except ValueError:
            self.fail(path, "is no expression")

    def contract(self, value: Any) -> Contract:
        call, _, members, passes, target, versions = self.record(
            value, "the contract", "call contract_version members passes target versions"
        )
        return Contract(
            call=self.call(call),
            target=self.needs(target),
            versions={k: self.text(v, p) for k, v, p in self.entries(versions, "versions")},
            passes=tuple(self.pass_record(v, p) for v, p in self.items(passes, "passes")),
            members=tuple(self.member(v, p) for v, p in self.items(members, "members")),
        )

    def call(self, value: Any) -> Call:
        keys = "arguments guards in_tree inputs out_tree outputs positional symbols"
        arguments, guards, in_tree, inputs, out_tree, outputs, positional, symbols = self.record(value, "call", keys)
        call = Call(
            arguments=tuple(self.text(v, p) for v, p in self.items(arguments, "call.arguments")),
            positional=self.number(positional, "call.positional"),
            inputs=tuple(self.input(v, p) for v, p in self.items(inputs, "call.inputs")),
            outputs=tuple(self.leaf(v, p) for v, p in self.items(outputs, "call.outputs")),
            symbols={k: self.range(k, v, p) for k, v, p in self.entries(symbols, "call.symbols")},
            guards=tuple(self.guard(v, p) for v, p in self.items(guards, "call.guards")),
            in_tree=self.text(in_tree, "call.in_tree"),
            out_tree=self.text(out_tree, "call.out_tree"),
        )
        self.consistent(call)
        return call

    def consistent(self, call: Call) -> None:
        names = [i.name for i in call.inputs]
        if len(set(names)) != len(names):
            self.fail("call.inputs", "has two inputs of one name")
        if len(set(call.arguments)) != len(call.arguments):
            self.fail("call.arguments", "has two arguments of one name")
        if call.positional > len(call.arguments):
            self.fail("call.positional", "counts more arguments than there are")
        bound = {k for k, r in call.symbols.items() if r.bound}
        taken = [e for t in call.tensors for e in t.shape] + list(call.guards)
        if not set().union(*map(ex.symbols_of, taken)) <= bound:
            self.fail("call.inputs", "mention a symbol without a range")
        if unbound := bound - determined(call):
            self.fail("call.symbols", f"has {sorted(unbound)[0]}, which no input determines")
        given = [e for o in call.outputs if isinstance(o, TensorSpec) for e in o.shape]
        given += [o.value for o in call.outputs if isinstance(o, SizeSpec)]
        if not set().union(*map(ex.symbols_of, given)) <= set(call.symbols):
            self.fail("call.outputs", "mention a symbol without a range")

    def input(self, value: Any, path: str) -> TensorSpec | ConstantSpec:
        leaf = self.leaf(value, path)
        return self.fail(path, "is a size, which is no input") if isinstance(leaf, SizeSpec) else leaf

    def leaf(self, value: Any, path: str) -> TensorSpec | ConstantSpec | SizeSpec:
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind == "constant":
            name, constant, _ = self.record(value, path, "name value kind")
            if not isinstance(constant, (int, float, bool, str, type(None))):
                self.fail(f"{path}.value", "is no constant")
            return ConstantSpec(self.text(name, f"{path}.name"), constant)
        if kind == "size":
            name, size, _ = self.record(value, path, "name value kind")
            return SizeSpec(self.text(name, f"{path}.name"), self.expression(size, f"{path}.value"))
        if kind != "tensor":
            self.fail(f"{path}.kind", "is none of constant, size, tensor")
        return self.tensor(value, path)

    def tensor(self, value: Any, path: str) -> TensorSpec:
        name, dtype, shape, order, device, mutated, _ = self.record(
            value, path, "name dtype shape order device mutated kind"
        )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self.fail(f"{path}.dtype", "is no dtype")
        sizes = tuple(self.expression(v, p) for v, p in self.items(shape, f"{path}.shape"))
        if any(isinstance(s, int) and s < 0 for s in sizes) or len(sizes) > MAX_RANK:
            self.fail(f"{path}.shape", "is no shape")
        dims = tuple(self.number(v, p) for v, p in self.items(order, f"{path}.order"))
        if sorted(dims) != list(range(len(sizes))):
            self.fail(f"{path}.order", "does not name each dimension once")
        return TensorSpec(
            name=self.text(name, f"{path}.name"),
            dtype=dtype,
            shape=sizes,
            order=dims,
            device=self.text(device, f"{path}.device"),
            mutated=self.flag(mutated, f"{path}.mutated"),
        )

    def range(self, name: str, value: Any, path: str) -> Range:
        low, high, bound = self.record(value, path, "min max bound")
        if not ex.SYMBOL.match(name):
            self.fail(path, "is no symbol")
        low = self.number(low, f"{path}.min")
        if high is not None and self.number(high, f"{path}.max") < low:
            self.fail(path, "has an empty range")
        return Range(low, high, self.flag(bound, f"{path}.bound"))

    def guard(self, value: Any, path: str) -> Expr:
        guard = self.expression(value, path)
        if not isinstance(guard, tuple) or guard[0] not in ex.CONDITIONS:
            self.fail(path, "is no condition")
        return guard

    def needs(self, value: Any) -> Needs:
        keys = "device isa machine name origin platform"
        device, isa, machine, name, origin, platform = self.record(value, "target", keys)
        if origin not in (NATIVE, CROSS):
            self.fail("target.origin", f"is neither '{NATIVE}' nor '{CROSS}'")
        return Needs(
            name=self.text(name, "target.name"),
            device=self.text(device, "target.device"),
            platform=self.text(platform, "target.platform"),
            machine=self.text(machine, "target.machine"),
            isa=tuple(self.text(v, p) for v, p in self.items(isa, "target.isa")),
            origin=origin,
        )

    def pass_record(self, value: Any, path: str) -> PassRecord:
        name, options = self.record(value, path, "name options")
        return PassRecord(
            self.text(name, f"{path}.name"), {k: v for k, v, _ in self.entries(options, f"{path}.options")}
        )

    def member(self, value: Any, path: str) -> MemberSpec:
        name, sha256, size = self.record(value, path, "name sha256 size")
        if not HEX.match(self.text(sha256, f"{path}.sha256")):
            self.fail(f"{path}.sha256", "is no SHA-256 in hex")
        return MemberSpec(self.text(name, f"{path}.name"), self.number(size, f"{path}.size"), sha256)


def determined(call: Call) -> set[str]:
    """Symbols whose sizes follow from the inputs' shapes: those that stand alone, then those in linear expressions."""
    sizes = [e for t in call.tensors for e in t.shape]
    known = {e for e in sizes if isinstance(e, str)}
    for size in sizes:
        unknown = ex.symbols_of(size) - known
        if len(unknown) == 1 and _linear(size, unknown.copy().pop(), known):
            known |= unknown
    return known


def _linear(size: Expr, name: str, known: set[str]) -> bool:
    others = {k: 5 for k in known}
    try:
        value = ex.evaluate(size, {**others, name: 7})
    except ex.Undefined:
        return False
    return ex.solve(size, value, others) == (name, 7)
