"""What a package says about itself, and whether its contract agrees.

Three voices besides the contract: AOTInductor's metadata file (device, platform, machine, instruction set, and our
stamp of the contract), the generated wrapper source (number, dtypes, sizes and strides of the inputs, the pytree specs)
and the library, which must hold the same pytree specs. They are read as text: nothing of the package is run. The C++
runner asks the same questions (runtime/cpp/package.cpp).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import weights
from compiled_attn.runtime.contract import Call, Contract, TensorSpec

FOLDER = "model/data/aotinductor/model/"
STAMP = "COMPILED_ATTN_CONTRACT"
LEAF = '{"type": null'  # a leaf of a serialised pytree spec
COUNTED = 2**31 - 1  # the most that 32-bit indices count
WRAPPER_MARK = b"AOTInductorModelBase("
ISA_OF = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AMX": "amx_tile", "AMX_FP16": "amx_fp16"}

_COUNTS = re.compile(r"AOTInductorModelBase\((\d+),\s*(\d+),")
_INPUT = re.compile(r"^\s*ConstantHandle (\w+) = ConstantHandle\(input_handles\[(\d+)\]\);", re.M)
_DTYPE = re.compile(r"^\s*int32_t (\w+)_expected_dtype = aoti_torch_dtype_(\w+)\(\);", re.M)
_SIZE = re.compile(r"^\s*if \((\d+)L? != (\w+)_size\[(\d+)\]\) \{", re.M)
_RANGE = re.compile(r"^\s*if \((\w+)_size\[(\d+)\] ([<>]) (\d+)L?\) \{", re.M)
_STRIDE = re.compile(r"^\s*if \((\d+)L? != (\w+)_stride\[(\d+)\]\) \{", re.M)
_SPEC = re.compile(r'^\s*(in|out)_spec_ = R"\((.*)\)";$', re.M)


@dataclass
class InputFacts:
    """What the wrapper checks of one input when AOTInductor's own checks are on; dimension -> number."""

    dtype: str = ""
    sizes: dict[int, int] = field(default_factory=dict)
    lowest: dict[int, int] = field(default_factory=dict)
    highest: dict[int, int] = field(default_factory=dict)
    strides: dict[int, int] = field(default_factory=dict)


@dataclass
class PackageFacts:
    """What the members of a package say, without running any of them."""

    metadata: dict[str, str]
    inputs: dict[int, InputFacts]
    counts: tuple[int, int]
    specs: dict[str, str]
    library: memoryview
    weights: dict[str, weights.Wanted]  # those that are not in the library

    @property
    def isa(self) -> set[str]:
        """Extensions that AOTInductor names for its vector code, in the kernel's spelling."""
        return {ISA_OF[word] for word in self.metadata.get("AOTI_CPU_ISA", "").split() if word in ISA_OF}


def facts_of(members: Mapping[str, memoryview], where: str) -> PackageFacts:
    """Reads the facts. Raises ContractError where metadata, wrapper source or library is missing or not single."""
    model = {n: m for n, m in members.items() if n.startswith(FOLDER) and "/" not in n[len(FOLDER) :]}
    libraries = [n for n in model if n.endswith(".so")]
    wrappers = [n for n in model if n.endswith(".cpp") and WRAPPER_MARK in bytes(model[n])]
    if len(libraries) != 1 or len(wrappers) != 1:
        raise ContractError(
            "the package holds no single AOTInductor model",
            where=where,
            facts=f"wanted one library and one wrapper source in {FOLDER}, found {len(libraries)} and {len(wrappers)}",
            do="export the model again",
        )
    source = bytes(model[wrappers[0]]).decode("utf-8", "replace")
    metadata_name = wrappers[0].removesuffix(".cpp") + "_metadata.json"
    try:
        metadata = _flat_record(bytes(model.get(metadata_name, b"")))
    except (ValueError, RecursionError):
        raise ContractError(
            "the package's metadata can not be read",
            where=f"{where}, member {metadata_name}",
            facts="AOTInductor writes a flat JSON record there",
            do="export the model again",
        ) from None
    try:
        wanted = weights.wanted_by(source)
    except (ValueError, KeyError):
        raise ContractError(
            "the package asks for weights of an unknown form",
            where=f"{where}, member {wrappers[0]}",
            facts="AOTInductor writes their dtypes, shapes and strides there",
            do="export the model again",
        ) from None
    counts = _COUNTS.search(source)
    return PackageFacts(
        metadata=metadata,
        inputs=_input_facts(source),
        counts=(int(counts[1]), int(counts[2])) if counts else (-1, -1),
        specs={which: text for which, text in _SPEC.findall(source)},
        library=model[libraries[0]],
        weights=wanted,
    )


def _flat_record(data: bytes) -> dict[str, str]:
    """A JSON record of texts, in ASCII, each key once. Raises ValueError."""

    def record(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    found = json.loads(data.decode("ascii"), object_pairs_hook=record)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("no record of texts")
    return found


def _input_facts(source: str) -> dict[int, InputFacts]:
    position = {name: int(index) for name, index in _INPUT.findall(source)}
    found = {index: InputFacts() for index in position.values()}
    for name, dtype in _DTYPE.findall(source):
        if name in position:
            found[position[name]].dtype = dtype
    for size, name, dim in _SIZE.findall(source):
        if name in position:
            found[position[name]].sizes[int(dim)] = int(size)
    for name, dim, sign, bound in _RANGE.findall(source):
        if name in position:
            facts = found[position[name]]
            (facts.lowest if sign == "<" else facts.highest)[int(dim)] = int(bound)
    for stride, name, dim in _STRIDE.findall(source):
        if name in position:
            found[position[name]].strides[int(dim)] = int(stride)
    return found


def narrowed(call: Call, facts: PackageFacts) -> Call:
    """The call with the greatest sizes that the code counts in 32 bits, where it does: what runs, the contract states.

    A bound below that is none of counting, and stays a contradiction for `compare` to find.
    """
    symbols = dict(call.symbols)
    for index, tensor in enumerate(call.tensors):
        for dim, most in facts.inputs[index].highest.items() if index in facts.inputs else ():
            size = tensor.shape[dim] if dim < len(tensor.shape) else None
            if isinstance(size, str) and most >= COUNTED and (symbols[size].max or most + 1) > most:
                symbols[size] = replace(symbols[size], max=most)
    return replace(call, symbols=symbols)


def compare(contract: Contract, facts: PackageFacts, where: str) -> None:
    """Raises ContractError at the first statement of the package that the contract contradicts."""
    _compare_metadata(contract, facts, where)
    call = contract.call
    if (len(call.tensors), len(call.outputs)) != facts.counts:
        said = "{} tensors in and {} results".format(*facts.counts)
        raise _clash(where, f"{len(call.tensors)} tensors in and {len(call.outputs)} results", said)
    for which, stated in (("in", call.in_tree), ("out", call.out_tree)):
        if facts.specs.get(which) != stated:
            raise _clash(where, f"another structure of the {which}puts", "its own")
        if not _holds(facts.library, stated.encode()):
            raise _clash(where, f"a structure of the {which}puts", "a library without it")
        leaves, named = stated.count(LEAF), len(call.inputs if which == "in" else call.outputs)
        if leaves != named:
            raise _clash(where, f"{named} {which}puts", f"{leaves}")
    for index, tensor in enumerate(call.tensors):
        if index in facts.inputs:
            _compare_input(call, tensor, facts.inputs[index], where)


def _compare_metadata(contract: Contract, facts: PackageFacts, where: str) -> None:
    target, said = contract.target, facts.metadata
    stated = {
        "AOTI_DEVICE_KEY": target.device,
        "AOTI_PLATFORM": target.platform,
        "AOTI_MACHINE": target.machine,
        STAMP: contract.stamp(),
    }
    if target.device == "cuda":
        stated["AOTI_COMPUTE_CAPABILITY"] = next((f[3:] for f in target.isa if f.startswith("sm_")), "none")
    for key, value in stated.items():
        if said.get(key) != value:
            raise _clash(where, f"{key} {value}", f"{key} {said.get(key, 'nothing')}")
    missing = sorted(facts.isa - set(target.isa))
    if missing and target.device == "cpu":
        raise _clash(where, f"no need of {missing[0]}", f"AOTI_CPU_ISA {said['AOTI_CPU_ISA']}")


def _compare_input(call: Call, tensor: TensorSpec, facts: InputFacts, where: str) -> None:
    name, rank = f"input {tensor.name}", len(tensor.shape)
    if facts.dtype and facts.dtype != tensor.dtype:
        raise _clash(where, f"{name} as {tensor.dtype}", facts.dtype)
    dims = sorted({*facts.sizes, *facts.lowest, *facts.highest, *facts.strides})
    if dims and dims[-1] >= rank:
        raise _clash(where, f"{name} with {rank} dimensions", f"at least {dims[-1] + 1}")
    for dim in range(rank):
        size = tensor.shape[dim]
        at = f"{name}, dimension {dim}"
        if isinstance(size, int):
            if facts.sizes.get(dim, size) != size or dim in facts.lowest or dim in facts.highest:
                raise _clash(where, f"{at} of size {size}", f"{facts.sizes.get(dim, 'a range')}")
            continue
        if dim in facts.sizes:
            raise _clash(where, f"{at} of any size", f"{facts.sizes[dim]}")
        if isinstance(size, str):
            _compare_range(call, size, dim, facts, at, where)
    _compare_order(tensor, facts, name, where)


def _compare_range(call: Call, symbol: str, dim: int, facts: InputFacts, at: str, where: str) -> None:
    stated = call.symbols[symbol]
    lowest, highest = facts.lowest.get(dim, 0), facts.highest.get(dim)
    if lowest > 2 and stated.min < lowest:  # torch writes 2 where it means: any size, traced away from 0 and 1
        raise _clash(where, f"{at} from {stated.min}", f"from {lowest}")
    if highest is not None and (stated.max is None or stated.max > highest):
        raise _clash(where, f"{at} up to {'any size' if stated.max is None else stated.max}", f"up to {highest}")


def _compare_order(tensor: TensorSpec, facts: InputFacts, name: str, where: str) -> None:
    stride = 1
    for dim in reversed(tensor.order):
        size = tensor.shape[dim]
        if size != 1 and facts.strides.get(dim, stride) != stride:
            raise _clash(where, f"{name}, dimension {dim} of stride {stride}", f"{facts.strides[dim]}")
        if not isinstance(size, int):
            return
        stride *= max(size, 1)


def _clash(where: str, stated: str, said: str) -> ContractError:
    return ContractError(
        "the contract contradicts the package",
        where=where,
        facts=f"the contract states {stated}, the package says {said}",
        do="export the model again; a contract is never edited by hand",
    )


def _holds(library: memoryview, text: bytes) -> bool:
    return re.search(re.escape(text), library) is not None
