"""What learning would cost on several ranks: the model's own sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from rjepa_triton import RGC
from rjepa_triton.bench.cli import bench
from rjepa_triton.online import counting
from rjepa_triton.planning import cost, devices, sharding

H100 = cost.rates(devices.known()["h100"])
LINK = sharding.Link(50e9, 5e-6)


def problem(units: int, batch: int) -> cost.Problem:
    return counting.problem(RGC(units, device="meta"), batch, torch.float32, gpu=True)


def test_one_rank_costs_what_a_learner_without_a_mesh_does() -> None:
    whole = problem(512, 8)
    alone = sharding.scaled(whole, 1, 16, H100, LINK)
    forms = cost.form_costs(whole, 16, None, H100, 1)
    assert alone.seconds == next(one.seconds for one in forms if one.form == "chunk")
    assert alone.sending == 0


def test_a_rank_has_its_share_and_receives_the_others_states() -> None:
    whole = problem(4096, 256)
    assert whole.gamma_bytes == 4096 * 4096 * 4 * 2 * 256 * 4  # 137 GB
    for ranks in (2, 4, 64):
        one = sharding.scaled(whole, ranks, 16, H100, LINK)
        own = replace(whole, units=4096 // ranks)
        assert one.state_bytes - own.window_bytes(16) - own.layer_state_bytes == whole.gamma_bytes // ranks
        assert one.sent == sharding.Sent(1, (ranks - 1) * (4096 // ranks) * 256 * 2 * 4)
        hops = {2: 1, 4: 2, 64: 6}[ranks]
        assert one.sending == pytest.approx(hops * 5e-6 + one.sent.bytes / 50e9)
    assert sharding.gathered(4, 10, 1, 2, 4, 3, dense=False) == sharding.Sent(1, 3 * 3 * 2 * 3 * 4)


def test_a_gradient_is_reduced_once_an_update() -> None:
    assert sharding.reduced(1, 100, 4) == sharding.Sent(0, 0)
    assert sharding.reduced(4, 100, 4) == sharding.Sent(2, 600)


def test_the_command_prints_strong_and_weak_scaling() -> None:
    asked = ["plan", "--device", "h100", "--hidden", "4096", "--batch", "256", "--markdown"]
    shown = CliRunner().invoke(bench, [*asked, "--ranks", "1024"])
    assert shown.exit_code == 0
    assert shown.output.count("| 1,024 |") == 2
    for option, value, says in (
        ("--ranks", "0", "--ranks must be at least 1"),
        ("--link", "0", "--link must be"),
    ):
        bad = CliRunner().invoke(bench, [*asked, "--ranks", "4", option, value])
        assert bad.exit_code == 2
        assert says in bad.output
