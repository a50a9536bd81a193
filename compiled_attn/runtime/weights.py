"""Weights beside the code: what a package's code asks for, and tensors of stored bytes that answer it.

Programs that share weights (a decoder's prompt and step) are built without them. Their wrapper source says of each
constant its name, dtype, shape, strides and offset; the file that holds the programs holds the bytes, each storage once
(runtime/programs.py). Tensors over the same storage share memory when they are loaded, so there is one copy there too.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from compiled_attn.ir.errors import ContractError

OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}
RAW = "data/weights/"  # where torch keeps them in a raw package
CONFIG = "weights_config.json"
ITEM_SIZE = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8}
ITEM_SIZE |= {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

_BESIDE = re.compile(r"AOTInductorModelBase\(\d+,\s*\d+,\s*\d+,\s*device_str,\s*std::move\(cubin_dir\),\s*false\)")
_FIELD = re.compile(r"^\s*constants_info_\[(\d+)\]\.(dtype|offset|shape|stride|original_fqn) = (.*);$", re.M)


@dataclass(frozen=True)
class Wanted:
    """One tensor that the code asks for. offset: of its first element in its storage, in elements, as are strides."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def reach(self) -> int:
        """Bytes that its storage has at least."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * ITEM_SIZE[self.dtype]


def wanted_by(source: str) -> dict[str, Wanted]:
    """What a wrapper source asks for, by name; nothing where the weights are in the library. Raises ValueError."""
    if not _BESIDE.search(source):
        return {}
    fields: dict[int, dict[str, str]] = {}
    for index, name, value in _FIELD.findall(source):
        fields.setdefault(int(index), {})[name] = value
    return {said["original_fqn"].strip('"'): _wanted(said) for said in fields.values()}


def _wanted(said: Mapping[str, str]) -> Wanted:
    dtype = said.get("dtype", "").removeprefix("cached_torch_dtype_")
    if set(said) != {"dtype", "offset", "shape", "stride", "original_fqn"} or dtype not in ITEM_SIZE:
        raise ValueError("a constant of no known form")
    shape, stride = _numbers(said["shape"]), _numbers(said["stride"])
    if len(shape) != len(stride):
        raise ValueError("a constant with more strides than sizes, or fewer")
    return Wanted(dtype, shape, stride, int(said["offset"]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.strip("{}").split(",") if n.strip())


def taken_from(raw: Path) -> dict[str, bytes]:
    """The storages of a raw package's weights, by the names that its code asks by."""
    storages: dict[str, bytes] = {}
    with zipfile.ZipFile(raw) as package:
        config = next(name for name in package.namelist() if name.endswith(f"/{CONFIG}"))
        root = config.split("/", 1)[0]
        names = {name: entry[0] for name, entry in json.loads(package.read(config)).items()}
        for file in set(names.values()):
            tensor = torch.load(io.BytesIO(package.read(f"{root}/{RAW}{file}")), map_location="cpu", weights_only=True)
            storages[file] = bytes(_bytes_of(tensor.untyped_storage()).numpy())
    return {name: storages[file] for name, file in names.items()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def require_fit(wanted: Mapping[str, Wanted], given: Mapping[str, int], where: str) -> None:
    """given: name -> bytes of its storage. Raises ContractError where the code asks for others."""
    if set(wanted) != set(given):
        raise ContractError(
            "the weights are not those that the code asks for",
            where=where,
            facts=f"the difference: {', '.join(sorted(set(wanted) ^ set(given))[:3])}",
            do="export the decoder again; an index is never edited by hand",
        )
    for name in sorted(wanted):
        if wanted[name].reach > given[name]:
            raise ContractError(
                f"the weight {name} is cut short",
                where=where,
                facts=f"the code reads {wanted[name].reach} bytes, there are {given[name]}",
                do="export the decoder again; an index is never edited by hand",
            )


def stored(payload: memoryview, device: torch.device) -> torch.Tensor:
    """Stored bytes in memory of their own, aligned as torch aligns it."""
    made = torch.empty(payload.nbytes, dtype=torch.uint8)
    if payload.nbytes:
        made.numpy().data[:] = payload
    return made.to(device)


def tensors(wanted: Mapping[str, Wanted], stores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the code asks for, each over the store of its name; no byte is copied."""
    found = {}
    for name, want in wanted.items():
        empty = torch.empty(0, dtype=getattr(torch, want.dtype), device=stores[name].device)
        found[name] = empty.set_(stores[name].untyped_storage(), want.offset, want.shape, want.stride)
    return found
