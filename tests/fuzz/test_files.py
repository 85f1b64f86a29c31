"""Damaged files: an error that names the file, or the content as it was written; never anything else.

A file with a digest is read as it was written, or refused. A text file has none: what is still a valid one is read as
what it then says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import films
import numpy as np
import pytest
import tables
import torch
from fuzzing import Count, cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton import LSTM, OnlineLearner
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.record import Record, Timing
from rjepa_triton.rjepa import backbone, config, fixations, storage, video

# What a subject's reader gives of a sound file, so that an equal one can be told.
Read = Callable[[Path], Any]


def bits(body: bytearray, data: st.DataObject) -> bytes:
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) * 8 - 1))
        body[at // 8] ^= 1 << at % 8
    return bytes(body)


def piece(body: bytearray, data: st.DataObject) -> slice:
    start = data.draw(st.integers(0, len(body) - 1))
    return slice(start, start + data.draw(st.integers(1, 40)))


def swapped(body: bytearray, data: st.DataObject) -> bytes:
    a, b = sorted(data.draw(st.integers(0, len(body) - 1)) for _ in range(2))
    length = min(b - a, len(body) - b, 64)
    body[a : a + length], body[b : b + length] = body[b : b + length], body[a : a + length]
    return bytes(body)


def lines(body: bytearray, data: st.DataObject) -> bytes:
    """A line twice, moved, or left out."""
    found = bytes(body).splitlines(keepends=True)
    i, j = (data.draw(st.integers(0, len(found) - 1)) for _ in range(2))
    kind = data.draw(st.integers(0, 2))
    if kind == 0:
        found.insert(j, found[i])
    elif kind == 1:
        found.insert(j, found.pop(i))
    else:
        del found[i]
    return b"".join(found)


ODD = (
    *("", "nan", "inf", "-1", "1e400", "9" * 400, "0x10", "null", "~", "true", "[]", "{}", "[[", "'", '"', "\\", "\x00"),
    *("Γ", "\ufeff", "\u2028", "a: b: c", "*x", "&x", "!!python/object:os.system", "- ", "\t", "\r", "\r\n", ",", ";", "%"),
    *("1.5", "0", "yes", "<<: x", "? ", "|", "1e-400", "12:30:00", "2026-01-01", "--- ", "..."),
)  # fmt: skip


def inserted(body: bytearray, data: st.DataObject) -> bytes:
    """Odd text in the place of some."""
    body[piece(body, data)] = data.draw(st.sampled_from(ODD)).encode()
    return bytes(body)


def encoded(body: bytearray, data: st.DataObject) -> bytes:
    """In another encoding, with a letter that it writes in its own way."""
    text = bytes(body).decode("utf-8", "replace")
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + "é" + text[at:]
    return text.encode(
        data.draw(st.sampled_from(["utf-16", "utf-32", "latin-1", "cp500", "utf-8-sig"])), "replace"
    )


DAMAGES: dict[str, Callable[[bytearray, st.DataObject], bytes]] = {
    "bits": bits,
    "cut": lambda body, data: bytes(body[: data.draw(st.integers(0, len(body) - 1))]),
    "begun late": lambda body, data: bytes(body[data.draw(st.integers(1, len(body))) :]),
    "empty": lambda body, data: b"",
    "swapped": swapped,
    "twice": lambda body, data: bytes(body) + bytes(body),
    "more": lambda body, data: bytes(body) + data.draw(st.binary(min_size=1, max_size=30)),
    "zeros": lambda body, data: bytes(body).replace(
        bytes(body[(p := piece(body, data))]), bytes(len(body[p])), 1
    ),
    "inserted": inserted,
    "lines": lines,
    "encoded": encoded,
    "noise": lambda body, data: data.draw(st.binary(max_size=200)),
}


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return (
            bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
            if a.dtype != object
            else list(a) == list(b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


# The subjects: how each makes a sound file in a folder, how it is read, and whether a change must be noticed.


def state(folder: Path) -> Path:
    learner = OnlineLearner(LSTM(2, 3), 2, form="lazy", rewrite_every=4)
    learner.step(torch.ones(2, 2))
    storage.save(folder / "learner.pt", learner.state_dict())
    return folder / "learner.pt"


def tensors(folder: Path) -> Path:
    storage.save_tensors(
        folder / "w.safetensors", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).bfloat16()}
    )
    return folder / "w.safetensors"


def settings_file(folder: Path) -> Path:
    (folder / "run.yaml").write_text(config.text(config.read()), encoding="utf-8")
    return folder / "run.yaml"


def records(folder: Path) -> Path:
    one = Record(
        benchmark="scaling",
        algorithm="rfp-dual",
        params={"N": 8, "B": 1, "T": 4, "dtype": "float32", "device": "cpu", "threads": 1},
        status="ok",
        device="a processor",
        versions={"torch": "2.14", "triton": None},
        git=None,
        run="2026-01-01T00:00:00+00:00",
        time="2026-01-01T00:00:00+00:00",
        timing=Timing(1e-3, 0.9e-3, 1.1e-3, 9),
        payload={"x": [1, 2.5, "Γ"]},
    )
    for n in (8, 16, 32):
        record.append(folder / "records.jsonl", dataclasses.replace(one, params={**one.params, "N": n}))
    return folder / "records.jsonl"


def table(folder: Path) -> Path:
    return tables.write(folder, tables.GOOD)


def tabbed(folder: Path) -> Path:
    rows = [row.replace(",", "\t") for row in tables.GOOD]
    return tables.write(folder, rows, tables.HEADER.replace(",", "\t"), "fix.tsv")


def parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    found = pyarrow.csv.read_csv(tables.write(folder, tables.GOOD))
    pyarrow.parquet.write_table(found, folder / "fix.parquet")
    (folder / "fix.csv.yaml").rename(folder / "fix.parquet.yaml")
    return folder / "fix.parquet"


def sidecar(folder: Path) -> Path:
    made = tables.write(
        folder, tables.GOOD, movie_start={"m": {"p1": 0, "p2": 10}}, movies={"m": {"fps": 25}}
    )
    return made.with_name(made.name + ".yaml")


def listed(found: fixations.Fixations) -> list[Any]:
    return [found.onset.tolist(), len(found.report.problems)]


def picture(folder: Path) -> Path:
    return films.picture(folder, (30, 20))


def film(folder: Path) -> Path:
    return films.write(folder / "film.mp4", 5, (32, 16))


def decoded(file: Path) -> Any:
    found = video.decode(file, file.parent / "cache")
    return [found.frames.shape[0], len(found.times)]


SUBJECTS: dict[str, tuple[Callable[[Path], Path], Read, bool]] = {
    "learner.pt": (state, storage.unpickled, True),
    "weights": (tensors, storage.read_tensors, True),
    "weights, told by their content": (tensors, backbone.read, True),
    "configuration": (settings_file, config.read, False),
    "records": (records, record.load, False),
    "table": (table, lambda file: listed(fixations.read(file)), False),
    "table, bad rows left out": (table, lambda file: listed(fixations.read(file, policy="skip")), False),
    "table with tabs": (tabbed, lambda file: listed(fixations.read(file)), False),
    "parquet": (parquet, lambda file: listed(fixations.read(file)), False),
    "sidecar": (sidecar, lambda file: listed(fixations.read(file.with_suffix(""))), False),
    "picture": (picture, decoded, False),
    "film": (film, decoded, False),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_damaged_files(subject: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    make, read, has_digest = SUBJECTS[subject]
    file = make(tmp_path)
    whole, sound = file.read_bytes(), read(file)
    with Count(record_property) as count:

        @cases(30, 2000)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            damage = data.draw(st.sampled_from(list(DAMAGES)))
            body = DAMAGES[damage](bytearray(whole), data)
            file.write_bytes(body)
            count.add("damaged files")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = read(file)
                except (ValueError, OSError) as error:
                    said = str(error)
                    assert said.strip(), type(error)
                    # a sidecar and its table may each be right, but not together
                    assert file.name.removesuffix(".csv.yaml") in said, (
                        f"{type(error).__name__} doesn't name the file: {said}"
                    )
                    return
            if has_digest or body == whole:
                assert alike(found, sound), "changed content was taken"
            count.add("of them read as sound ones")

        run()


def test_damaged_entries_of_the_film_cache(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """They are decoded anew."""
    source = films.write(tmp_path / "film.mp4", 5, (32, 16))
    cache = tmp_path / "cache"
    sound = video.decode(source, cache)
    frames, times, folder = np.array(sound.frames), list(sound.times), sound.folder
    entries = sorted(path for path in folder.iterdir())
    assert len(entries) == 3
    with Count(record_property) as count:

        @cases(30, 2000)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            entry = data.draw(st.sampled_from(entries))
            damage = data.draw(st.sampled_from(list(DAMAGES)))
            body = DAMAGES[damage](bytearray(entry.read_bytes()), data)
            if data.draw(st.integers(0, 9)) == 0:
                entry.unlink()
            else:
                entry.unlink()
                entry.write_bytes(body)
            found = video.decode(source, cache)
            assert np.array_equal(found.frames, frames)
            assert list(found.times) == times
            count.add("damaged entries of the film cache")

        run()


def test_states_of_learners_that_were_read(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A state in a file without a digest, as torch.save writes it: refused by name, or a state that the learner runs on."""
    learner = OnlineLearner(LSTM(2, 3), 2, form="lazy", rewrite_every=4)
    learner.step(torch.ones(2, 2))
    file = tmp_path / "learner.pt"
    torch.save(learner.state_dict(), file)
    whole = file.read_bytes()
    with Count(record_property) as count:

        @cases(30, 2000)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            file.write_bytes(DAMAGES[data.draw(st.sampled_from(list(DAMAGES)))](bytearray(whole), data))
            count.add("damaged files")
            try:
                learner.load_state_dict(storage.unpickled(file))
            except (ValueError, OSError, TypeError) as error:
                assert file.name in str(error) or "state" in str(error)
            learner.step(torch.ones(2, 2)).sum().backward()

        run()


def test_a_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    """The controls: what the damages do is told, and the readers take a sound file."""
    for make, read, _ in SUBJECTS.values():
        folder = tmp_path / hashlib.sha256(repr(make).encode()).hexdigest()[:8]
        folder.mkdir(exist_ok=True)
        file = make(folder)
        assert alike(read(file), read(file))
    assert json.loads((records(tmp_path)).read_text(encoding="utf-8").splitlines()[0])["status"] == "ok"
