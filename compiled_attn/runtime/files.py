"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compiled_attn.ir.errors import ContractError


def require_writable(path: str | Path) -> None:
    """Raises ContractError, before any work, where no file can appear at `path`."""
    path = Path(path)
    if path.is_dir():
        facts = "a folder stands there"
    elif not path.parent.is_dir():
        facts = f"there is no folder {path.parent}"
    elif not os.access(path.parent, os.W_OK):
        facts = f"the folder {path.parent} can not be written to"
    else:
        return
    raise ContractError(
        "the artifact can not be written",
        where=str(path),
        facts=facts,
        do="give a path in a folder that exists and can be written to",
    )


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then takes its place in one step, so that any number of processes may do so at once."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
