"""The headline picture: three curves, and three numbers that are the records'."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeps import made

from rjepa_triton.bench.harness.record import Record
from rjepa_triton.bench.scaling import headline, views

SIZES = (32, 64, 128, 256, 512, 1024)


def records(batch: int = 1) -> list[Record]:
    out = []
    for n in SIZES:
        fits = n <= 256
        out.append(
            made(
                "rtrl",
                n,
                1e-9 * n**4 if fits else None,
                batch,
                peak_bytes=64 * n**3 if fits else None,
                predicted_peak_bytes=64 * n**3,
                predicted_seconds=1e-9 * n**4,
            )
        )
        out.append(made("rfp-stream", n, 1e-9 * n**2, batch, peak_bytes=80 * n**2))
        out.append(made("bptt", n, 5e-10 * n**2, batch, peak_bytes=20 * n**2))
    return out


def test_the_numbers_are_the_records() -> None:
    rtrl, memory, bptt = headline.numbers(records())
    assert rtrl == "N = 256: a step of exact RTRL takes 65,536 times as long as RFP's."
    assert memory == "N = 1024: RTRL would need 68.7 GB, RFP 83.9 MB."
    assert bptt.startswith(
        "N = 1024: RFP takes 2.0 times as long as BPTT and 4.0 times its memory over 50 steps"
    )


def test_it_is_written_and_comes_first(tmp_path: Path) -> None:
    written = views.draw_sizes(records(), tmp_path / "scaling.jsonl")
    assert [file.name for file in written[:2]] == ["scaling-headline.png", "scaling-headline.svg"]
    text = written[1].read_text(encoding="utf-8")
    assert "<svg" in text
    assert (tmp_path / "scaling.png").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    without = [r for r in records() if r.algorithm != "bptt"]
    with pytest.raises(ValueError, match="missing: bptt"):
        headline.draw(without, tmp_path / "a")
    assert [file.name for file in views.draw_sizes(without, tmp_path / "b")] == ["b.png", "b.svg"]
    with pytest.raises(ValueError, match="can't mix batch sizes B, got 1, 8"):
        headline.draw([*records(), *records(8)], tmp_path / "a")
