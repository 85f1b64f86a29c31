"""Tensors in files, which are written whole and have a digest that is checked when they are read.

No code in a file is run: files are read by safetensors or torch.load(weights_only=True). A file without a digest, of an
earlier version or of another program, is read as it is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _files

DIGEST, ALGORITHM = "digest", "sha256 "  # a safetensors file's entry, and what its value begins with


def save(path: Path, state: Any) -> None:
    """What torch.save writes, sealed. Raises OSError, naming the file, which is then what it was."""
    body = io.BytesIO()
    torch.save(state, body)
    _files.write_bytes(path, _files.sealed(body.getvalue()))


def unpickled(path: Path) -> Any:
    """What `save` or torch.save wrote to a file, on the CPU.

    Raises ValueError, naming the file, if it is empty or damaged, or can't be read without running code; OSError.
    """
    data = _content(path)
    _files.check_seal(data, path)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on what pickle, zipfile and its own reader raise
        raise ValueError(f"{path} can't be read with weights_only=True: {_files.first_line(error)}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError, naming the file, which is then what it was."""
    from safetensors.torch import save

    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    _files.write_bytes(path, save(whole, {"format": "pt", DIGEST: ALGORITHM + _digest(whole)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError, naming the file, if it is damaged or not one; OSError."""
    from safetensors import safe_open

    _content(path, 1)
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it isn't a mapping
    except Exception as error:  # of a broken header, safetensors raises errors of several kinds
        raise ValueError(f"{path} can't be read as safetensors: {_files.first_line(error)}") from None
    has_digest = DIGEST in said or any(map(_looks_like_a_digest, said.values()))
    if has_digest and said.get(DIGEST) != ALGORITHM + _digest(found):
        raise ValueError(f"{path} is damaged: its tensors don't have the SHA-256 that was stored with them")
    return found


def is_safetensors(path: Path) -> bool:
    """Whether a file is in that format, by its name or its content."""
    with path.open("rb") as body:
        begin = body.read(9)
    return path.suffix == ".safetensors" or (begin[8:] == b"{" and not begin.startswith(b"PK"))


def _content(path: Path, most: int = -1) -> bytes:
    """The first bytes of a file, or all. Raises ValueError for an empty one."""
    with path.open("rb") as body:
        data = body.read(most)
    if not data:
        raise ValueError(f"{path} is empty")
    return data


def _looks_like_a_digest(value: str) -> bool:
    """Whether it has a digest's length and mostly its digits: its name and beginning may be damaged with the rest."""
    digits = value[len(ALGORITHM) :]
    return len(digits) == 64 and sum(digit in "0123456789abcdef" for digit in digits) >= 48


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the tensors' names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name!r} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
