"""The roofline's picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from rjepa_triton.bench.harness.record import Record, Timing
from rjepa_triton.bench.kernels import plot as roofline_plot
from rjepa_triton.bench.kernels.cases import KERNELS


def made(kernel: str, by: str = "torch", device: str = "a machine", timed: bool = True) -> Record:
    params = {"kernel": kernel, "by": by, "N": 256, "B": 1, "device": "cpu", "threads": 2}
    payload = {
        "bytes": 1e6,
        "flop": 2e6,
        "flop_per_second": 1e9,
        "copy_bytes_per_second": 1e10,
        "gemm_flop_per_second": 1e11,
    }
    return Record(
        "kernels", f"{kernel}/{by}", params, "ok" if timed else "error", device, {}, None, "", "",
        timing=Timing(2e-3, 2e-3, 2e-3, 9) if timed else None, payload=payload,
    )  # fmt: skip


def test_every_kernel_is_drawn(tmp_path: Path) -> None:
    records = [made(name, by) for name in KERNELS for by in ("triton", "torch", "compile")]
    written = roofline_plot.draw(records, tmp_path / "kernels.jsonl")
    assert [path.name for path in written] == ["kernels.png", "kernels.svg"]
    text = written[1].read_text()
    assert "copy, 10 GB/s" in text
    assert "float32 products, 100 GFLOP/s" in text


def test_devices_are_not_mixed_and_something_must_be_timed(tmp_path: Path) -> None:
    first, *_ = KERNELS
    with pytest.raises(ValueError, match="can't mix devices, got a machine, another"):
        roofline_plot.draw([made(first), made(first, device="another")], tmp_path / "x")
    with pytest.raises(ValueError, match="has a time to draw"):
        roofline_plot.draw([made(first, timed=False)], tmp_path / "x")
