"""Device profiles: what the data says, how a device is found, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rjepa_triton.bench.kernels import roofline
from rjepa_triton.planning import cost, devices, work

CPUS = ("epyc-2", "xeon-2", "cpu")


def test_every_rate_says_what_it_is_from() -> None:
    for device in devices.known().values():
        assert set(devices.NEEDED) <= set(device.rates)
        assert {rate.basis for rate in device.rates.values()} <= set(devices.BASES)
        told = {rate.basis for rate in device.rates.values()} & {"measured", "fitted"}
        assert bool(told) == bool(device.sources), device.key
        assert device.basis().count(":") == len({rate.basis for rate in device.rates.values()})
    assert {"a100", "h100", "h200", "b200", "mi300x"} <= set(devices.known())


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "h100"),
        ("NVIDIA H100 PCIe", "gpu", "gpu"),  # slower: not this profile's
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100"),
        ("NVIDIA H200", "gpu", "h200"),
        ("NVIDIA B200", "gpu", "b200"),
        ("AMD Instinct MI300X", "gpu", "mi300x"),
        ("AMD EPYC", "cpu", "epyc-2"),
        ("AMD EPYC", "gpu", "gpu"),
        ("AMD EPYC 7763 64-Core Processor", "cpu", "cpu"),
        ("Intel(R) Xeon(R) Processor", "cpu", "xeon-2"),
    ],
)
def test_a_device_is_found_by_its_own_name(name: str, kind: str, key: str) -> None:
    assert devices.find(name, kind) is devices.known()[key]


def test_the_learner_takes_the_profile_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(work, "device_name", lambda device: "Intel(R) Xeon(R) Processor")
    xeon = devices.known()["xeon-2"]
    assert cost.rates_of(torch.device("cpu")) == cost.rates(xeon)
    assert cost.rates_of(torch.device("cpu"), torch.float64).flop_per_second == xeon.rate("float64")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cost.rates_of(torch.device("cpu")).flop_per_second == xeon.rate("float32") / 2
    monkeypatch.setattr(work, "device_name", lambda device: "something else")
    assert cost.rates_of(torch.device("cpu")) == cost.CPU


def test_the_roofline_takes_the_same_numbers() -> None:
    for key, gpu in roofline.GPUS.items():
        device = devices.known()[key]
        assert (gpu.name, gpu.copy, gpu.bfloat16) == (
            device.name,
            device.rates["copy"],
            device.rates["bfloat16"],
        )


def good() -> dict[str, Any]:
    rates = {name: [1e9, "measured"] for name in devices.NEEDED}
    return {
        "name": "x",
        "kind": "cpu",
        "matches": ["x"],
        "memory_bytes": 1e9,
        "rates": rates,
        "sources": "here",
    }


def test_a_profile_is_written_as_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"x": good()}))
    made = devices.load(file)["x"]
    assert devices.parse("x", made.to_dict(), "there") == made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"speed": 1}, "device 'x' has unknown fields: speed"),
        ({"kind": "tpu"}, "kind of device 'x' must be one of 'gpu', 'cpu', got 'tpu'"),
        ({"rates": {"copy": [1.0, "measured"]}}, "lacks the rates float64, float32, call"),
        ({"rates": {"copy": [1.0, "guessed"]}}, "basis of copy of device 'x' must be one of"),
        ({"rates": {"copy": [0.0, "measured"]}}, "copy of device 'x' must be above 0, got 0.0"),
        ({"rates": {"speed": [1.0, "measured"]}}, "a rate of device 'x' must be one of"),
    ],
)
def test_a_wrong_profile_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        devices.parse("x", {**good(), **change}, "there")


def test_a_file_that_has_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, says in (
        ("{", "not JSON"),
        ("[]", "must be an object of profiles"),
        ('{"x": 1}', "must be an object"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            devices.load(file)
    with pytest.raises(ValueError, match=r"device must be one of 'a100'.*got 'tpu'"):
        devices.by_key("tpu")
