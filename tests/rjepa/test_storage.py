"""Tensors in files: every changed bit is noticed, and files without a digest are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rjepa_triton import _files
from rjepa_triton.rjepa import backbone, storage

STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "count": torch.tensor(3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
}
KINDS: dict[str, tuple[Callable[[Path, Any], None], Callable[[Path], Any]]] = {
    "a.pt": (storage.save, storage.unpickled),
    "a.safetensors": (storage.save_tensors, storage.read_tensors),
}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in STATE.items()
    )


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_noticed(tmp_path: Path, name: str) -> None:
    write, read = KINDS[name]
    file = tmp_path / name
    write(file, STATE)
    assert same(read(file))
    assert same(backbone.read(file))
    whole = file.read_bytes()
    step = max(1, 8 * len(whole) // 700)
    damaged = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 60))]
    for at in range(0, 8 * len(whole), step):
        damaged.append(whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :])
    taken = 0
    for body in damaged:
        file.write_bytes(body)
        said = f"{file} "
        try:
            assert same(read(file))  # a bit of the words that say where the digest is
            taken += 1
        except ValueError as error:
            said = str(error)
        assert said.startswith(f"{file} ")
    assert taken < 40


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_noticed_where_it_reaches_the_digests_name_too(tmp_path: Path, name: str) -> None:
    write, read = KINDS[name]
    file = tmp_path / name
    write(file, STATE)
    whole = file.read_bytes()
    words = (_files.SEAL,) if name == "a.pt" else (storage.DIGEST.encode(), storage.ALGORITHM.encode())
    named = bytearray(whole)
    for each in words:
        named[whole.index(each)] ^= 1
    content = whole.index(STATE["weight"].numpy().tobytes())
    for at in range(8 * content, 8 * content + 64):
        body = bytearray(named)
        body[at // 8] ^= 1 << at % 8
        file.write_bytes(body)
        with pytest.raises(ValueError, match="damaged"):
            read(file)


@pytest.mark.parametrize("name", KINDS)
def test_files_without_a_digest_and_empty_ones(tmp_path: Path, name: str) -> None:
    _, read = KINDS[name]
    file = tmp_path / name
    if name == "a.pt":
        torch.save(STATE, file)
    else:
        save_file(
            STATE, file, {"note": "a text of another program, as long as the words and digits of a digest."}
        )
    assert same(read(file))
    (tmp_path / "b").write_bytes(file.read_bytes())
    assert same(backbone.read(tmp_path / "b"))  # told by its content
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        read(file)
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        backbone.read(file)


def test_the_folder_is_gone(tmp_path: Path) -> None:
    for write, _ in KINDS.values():
        with pytest.raises(OSError, match=r"none.a can't be written: No such file or directory"):
            write(tmp_path / "none" / "a", STATE)
