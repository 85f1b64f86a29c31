"""Powers of a sweep whose machine has caches: they are the algorithm's, once the caches are taken out."""

from __future__ import annotations

import pytest
from sweeps import LEVELS, made

from rjepa_triton.bench.harness.record import Record
from rjepa_triton.bench.scaling import powers, tables

SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
RATES = {"L1": 100e9, "L2": 40e9, "L3": 20e9, "memory": 5e9}


def seconds_a_byte(size: float) -> float:
    """Of the level that holds so many bytes."""
    name = next((name for name, most in LEVELS.items() if size <= most), "memory")
    return 1 / RATES[name]


def sweep(passes: float, power: float = 2.0) -> list[Record]:
    """A stream whose step takes so many passes over Γ, times N^(power - 2), and 2 µs whatever N is."""
    out = []
    for n in SIZES:
        moved = 32 * n**2 * seconds_a_byte(32 * n**2)
        out.append(made("pass", n, 1e-6 + moved))
        out.append(made("rfp-stream", n, 2e-6 + passes * moved * n ** (power - 2)))
    return out


@pytest.mark.parametrize("power", [2.0, 2.5])
def test_each_level_of_memory_shows_the_power_above_a_pass(power: float) -> None:
    found = powers.levels(sweep(3.0, power), "rfp-stream", 1)
    assert [level.name for level in found] == ["L2", "L3", "memory"]
    for level in found:
        # in L2 what doesn't grow is a large part, and its fit is a little off
        assert level.power.value == pytest.approx(power - 2, abs=0.12 if level.name == "L2" else 0.01)
        assert level.power.half_width < 0.25
    if power == 2:
        assert all(level.ratio == pytest.approx(3, rel=0.05) for level in found)
    # times alone say something else: from one level to the next they rise faster
    raw = powers.slopes(sweep(3.0, power), "rfp-stream", 1)["time"]
    assert raw is None or raw.value > power + 0.1


def test_the_shape_of_what_carries_gamma_is_told_without_caches() -> None:
    found = powers.shape(sweep(3.0), "rfp-stream", 1)
    assert found is not None
    assert found.name == "N²"


def test_levels_need_passes_caches_and_points() -> None:
    records = sweep(3.0)
    assert powers.levels([r for r in records if r.algorithm != "pass"], "rfp-stream", 1) == []
    assert (
        powers.levels([made(r.algorithm, r.params["N"], 1.0, payload={}) for r in records], "rfp-stream", 1)
        == []
    )
    few = [r for r in records if r.params["N"] in (48, 64, 256, 2048)]
    assert powers.levels(few, "rfp-stream", 1) == []


def test_counted_powers_are_of_the_largest() -> None:
    records = [
        made("rtrl", n, None, payload={"flop": n**4 + 1e4 * n**3, "bytes": float(n**3)})
        for n in (8, 4096, 6144, 8192)
    ]
    found = powers.slopes(records, "rtrl", 1)
    assert found["bytes"] is not None
    assert found["bytes"].value == pytest.approx(3)
    assert found["flop"] is not None
    assert 3 < found["flop"].value < 4
    assert found["flop"].first == 4096
    assert powers.slopes(records[:3], "rtrl", 1)["flop"] is None


def test_crossings_have_intervals() -> None:
    records = [made("rtrl", n, 1e-9 * n**4) for n in SIZES] + [made("rfp-step", n, 1e-3) for n in SIZES]
    ((a, b, n, low, high, seconds),) = powers.crossings(records, 1)
    assert (a, b) == ("rtrl", "rfp-step")
    assert n == pytest.approx(1e6**0.25, rel=0.03)
    assert low <= n <= high
    assert high / low < 1.02
    assert seconds == pytest.approx(1e-3)


def test_tables_show_them() -> None:
    titles = [str(table.title) for table in tables.tables(sweep(2.0))]
    assert any("power of N" in title for title in titles)
    assert any("pass over Γ's bytes, offsets taken off" in title for title in titles)
