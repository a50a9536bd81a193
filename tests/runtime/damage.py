"""Ways to damage or forge an artifact: each a function of its bytes, and the first sentence that must answer it."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

from compiled_attn.runtime import archive, contract, package

Edit = Callable[[dict[str, Any]], None]


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The contract as JSON, and the other members."""
    members, _ = archive.unpack(memoryview(data), "")
    text = members.pop(contract.MEMBER)
    return json.loads(bytes(text)), {n: bytes(b) for n, b in members.items()}


def sealed(stated: dict[str, Any], members: dict[str, bytes]) -> bytes:
    """An archive whose contract holds `stated`, every digest in it computed afresh, by someone who knows our writer."""
    stated["members"] = [
        {"name": n, "size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in members.items()
    ]
    text = contract.canonical(stated)
    pieces = archive.pack([(contract.MEMBER, text), *members.items()], hashlib.sha256(text).hexdigest())
    return b"".join(pieces)


def forged(edit: Edit, *, restamp: bool = False) -> Callable[[bytes], bytes]:
    """A damage: the contract edited and sealed again; restamp: the stamp in the package's metadata as well."""

    def damage(data: bytes) -> bytes:
        stated, members = parts(data)
        edit(stated)
        if restamp:
            text = b"\n".join(contract.canonical(stated[k]) for k in ("call", "passes", "target", "versions"))
            stamp = hashlib.sha256(text).hexdigest()
            for name in members:
                if name.endswith("_metadata.json"):
                    members[name] = json.dumps({**json.loads(members[name]), package.STAMP: stamp}).encode()
        return sealed(stated, members)

    return damage


def _rezipped(data: bytes, add: Callable[[zipfile.ZipFile], None], method: int = zipfile.ZIP_STORED) -> bytes:
    """The archive written by Python's zipfile, with the same comment."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        add(target)
        target.comment = source.comment
    return buffer.getvalue()


def _nothing(target: zipfile.ZipFile) -> None:
    del target


def _twice(target: zipfile.ZipFile) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.writestr("model/archive_format", b"pt2")


def _added(data: bytes) -> bytes:
    members, digest = archive.unpack(memoryview(data), "")
    return b"".join(archive.pack([*members.items(), ("model/data/aotinductor/model/z.so", b"x")], digest))


def _replaced(data: bytes) -> bytes:
    members, digest = archive.unpack(memoryview(data), "")
    library = next(n for n in members if n.endswith(".so"))
    changed = bytearray(members[library])
    changed[len(changed) // 2] ^= 1
    return b"".join(archive.pack([(n, bytes(changed) if n == library else b) for n, b in members.items()], digest))


def _edited_alone(data: bytes) -> bytes:
    members, digest = archive.unpack(memoryview(data), "")
    members[contract.MEMBER] = memoryview(bytes(members[contract.MEMBER]).replace(b'"torch":"2', b'"torch":"3'))
    return b"".join(archive.pack(list(members.items()), digest))


def _flipped_payload(data: bytes) -> bytes:
    at = data.index(b"AOTInductorModelBase(")
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def set_at(*path: Any) -> Edit:
    """Sets the value at a path of the contract: set_at("call", "inputs", 0, "dtype", "float64")."""
    *keys, last, value = path

    def edit(stated: dict[str, Any]) -> None:
        place: Any = stated
        for key in keys:
            place = place[key]
        place[last] = value

    return edit


def _longer(stated: dict[str, Any]) -> None:
    x = stated["call"]["inputs"][0]
    x["shape"].append(1)
    x["order"].append(2)


CUT = "the artifact is cut short, or bytes follow its end"
STRAY = "a byte outside the members is not what the members give"
CLASH = "the contract contradicts the package"
FORM = "the contract is not well formed"

DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: d[:0], "the file is no compiled_attn artifact"),
    "a text": (lambda d: b"hello" + d[5:90], "the file is no compiled_attn artifact"),
    "without its last byte": (lambda d: d[:-1], CUT),
    "half of it": (lambda d: d[: len(d) // 2], CUT),
    "a byte behind": (lambda d: d + b"\0", CUT),
    "a byte in front": (lambda d: b"\0" + d, STRAY),
    "without a comment": (lambda d: d[:-96] + b"\0\0", "the package has no contract"),
    "a flipped byte of the comment": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), ""),
    "a flipped byte of a member": (_flipped_payload, "is damaged"),
    "a member replaced": (_replaced, "is not the one that the contract names"),
    "a member added": (_added, "the members are not those that the contract names"),
    "a member added by zipfile": (lambda d: _rezipped(d, lambda z: z.writestr("model/x", b"x")), STRAY),
    "a member twice": (lambda d: _rezipped(d, _twice), "two members are named model/archive_format"),
    "a member compressed": (lambda d: _rezipped(d, _nothing, zipfile.ZIP_DEFLATED), "is compressed"),
    "a member outside": (
        lambda d: d.replace(b"model/archive_format", b"model/../ive_format."),
        "a member has a name that is not allowed",
    ),
    "the contract edited": (_edited_alone, "the contract does not match the digest in the archive"),
    "another contract version": (
        forged(set_at("contract_version", 3)),
        "the contract has a version that this library does not know",
    ),
    "a field missing": (forged(lambda c: c.pop("passes")), FORM),
    "a field more": (forged(set_at("note", "hello")), FORM),
    "no dtype": (forged(set_at("call", "inputs", 0, "dtype", "float31")), FORM),
    "a forged dtype": (forged(set_at("call", "inputs", 0, "dtype", "float64")), CLASH),
    "a forged name": (forged(set_at("call", "inputs", 0, "name", "z")), CLASH),
    "a forged rank": (forged(_longer), CLASH),
    "a forged output": (forged(set_at("call", "outputs", 0, "name", "z")), CLASH),
    "a forged size": (forged(set_at("call", "inputs", 0, "shape", 1, 9), restamp=True), CLASH),
    "a forged dtype, restamped": (forged(set_at("call", "inputs", 0, "dtype", "float64"), restamp=True), CLASH),
    "a forged rank, restamped": (forged(set_at("call", "inputs", 0, "order", [0]), restamp=True), FORM),
    "an unknown origin, restamped": (forged(set_at("target", "origin", "run on the target"), restamp=True), FORM),
    "another origin": (forged(set_at("target", "origin", "cross-compiled, not run on the target")), CLASH),
    "a forged structure, restamped": (forged(set_at("call", "in_tree", "[1, {}]"), restamp=True), CLASH),
    "an input less, restamped": (forged(lambda c: c["call"]["inputs"].pop(0), restamp=True), CLASH),
    "a constant less, restamped": (forged(lambda c: c["call"]["inputs"].pop(), restamp=True), CLASH),
    "instructions hidden, restamped": (forged(set_at("target", "isa", []), restamp=True), CLASH),
}

# what only loading asks, beside reading
AT_LOADING: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another torch": (forged(set_at("versions", "torch", "2.0.1")), "the artifact was built with another torch"),
    "no torch": (forged(lambda c: c["versions"].pop("torch")), "the artifact was built with another torch"),
    "another machine": (
        forged(set_at("target", "machine", "m68k")),
        "the artifact was built for another kind of machine",
    ),
    "another CPU": (
        forged(lambda c: c["target"]["isa"].append("avx9000")),
        "this CPU lacks instructions that the artifact needs",
    ),
}
