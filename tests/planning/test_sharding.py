"""What learning would cost on several ranks: the model's own sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from rjepa_triton import RGC
from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.planner import plan, scale, scale_plot
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


def test_the_plot_shows_the_tables_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(scale_plot, "save", lambda figure, path: drawn.append(figure) or [path])
    asked = ["plan", "--device", "h100", "--hidden", "512", "--batch", "8", "--ranks", "8"]
    shown = CliRunner().invoke(bench, [*asked, "--plot", str(tmp_path / "scaling.png")])
    assert shown.exit_code == 0, shown.output
    assert f"wrote {tmp_path / 'scaling.png'}" in " ".join(shown.output.split())
    (figure,) = drawn
    question, device = plan.Question(512, 8), devices.known()["h100"]
    for axes, weak in zip(figure.axes, (False, True), strict=True):
        want = [one for _, one in scale.predicted(question, device, 8, scale.link_of(50, 5), weak)]
        step, sending, ideal = axes.get_lines()
        assert list(step.get_xdata()) == [1, 2, 4, 8]
        assert list(step.get_ydata()) == [one.seconds for one in want]
        assert list(sending.get_ydata()) == [one.sending for one in want[1:]]
        assert ideal.get_ydata()[-1] == want[0].seconds / (1 if weak else 8)


def test_one_rank_is_drawn_too(tmp_path: Path) -> None:
    asked = ["plan", "--device", "h100", "--hidden", "512", "--ranks", "1", "--plot", str(tmp_path / "one")]
    assert CliRunner().invoke(bench, asked).exit_code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"one.png", "one.svg"}
