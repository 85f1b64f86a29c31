"""Scan-path prediction: likelihood and NSS against a raster, bits that a made world holds, and a run's own saccades."""

from __future__ import annotations

import json
from pathlib import Path

import noise
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from rjepa_triton.rjepa import cli, config, saccades, train
from rjepa_triton.rjepa.encoder import Encoding
from rjepa_triton.rjepa.patches import FixationSequences
from rjepa_triton.rjepa.saccades import Grid, Saccades

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_scores_are_those_of_a_raster() -> None:
    """The density is summed over points 0.02° apart."""
    rng = np.random.default_rng(0)
    grid, _ = Grid.of(rng.uniform(-5, 5, (40, 2)), 2.0)
    extent = np.array([[9.0, 7.0]])
    for eye in (np.zeros((1, 2)), np.array([[3.5, -2.0]])):
        shares = rng.dirichlet(np.ones(len(grid.corners)))[None]
        points = np.stack(np.meshgrid(np.arange(-4.49, 4.5, 0.02), np.arange(-3.49, 3.5, 0.02)), -1).reshape(
            -1, 2
        )
        square = grid.number(points - eye)
        weight = np.where(square >= 0, shares[0, square], 0.0)
        density = (1 - saccades.LAPSE) * weight / weight.sum() + saccades.LAPSE / len(points)
        for place in points[rng.integers(0, len(points), 10)]:
            bits, nss = saccades.scores(
                shares, grid.inside(extent, eye), grid.number(place[None] - eye), extent.prod(1)
            )
            at = density[np.abs(points - place).sum(1).argmin()]
            assert bits[0] == pytest.approx(np.log2(at * len(points)), abs=0.02)
            assert nss[0] == pytest.approx((at - density.mean()) / density.std(), abs=0.02)


def test_an_even_density_has_no_bits_and_no_nss() -> None:
    whole = Grid(np.array([[-10.0, -10.0]]), 20.0)
    extent, eye = np.array([[8.0, 6.0]]), np.zeros((1, 2))
    bits, nss = saccades.scores(np.ones((1, 1)), whole.inside(extent, eye), np.array([0]), extent.prod(1))
    assert (bits[0], nss[0]) == (pytest.approx(0), 0)
    none, _ = saccades.scores(np.zeros((1, 1)), whole.inside(extent, eye), np.array([-1]), extent.prod(1))
    assert none[0] == pytest.approx(0)


def world(count: int, seed: int) -> Saccades:
    """Saccades of 3° right, left, down or up, in a wide frame: c tells whether along x or y, the last saccade the sign."""
    rng = np.random.default_rng(seed)
    vertical, sign = rng.integers(0, 2, (2, count))
    start = rng.uniform(-6, 6, (count, 2))
    step = 3.0 * (2 * sign - 1)
    move = np.where(vertical[:, None] == 1, np.stack([0 * step, step], 1), np.stack([step, 0 * step], 1))
    context = np.stack([2.0 * vertical - 1, rng.standard_normal(count)], 1)
    sequence = np.arange(count) // 20
    before = np.stack([2.0 * sign - 1, rng.standard_normal(count)], 1)
    return Saccades(start, start + move, before, context, np.full((count, 2), 24.0), sequence, sequence)


def test_each_predictor_finds_what_it_is_told() -> None:
    """Uniform over 576 square degrees; one of four squares of 9 is 4 bits, one of two 5, the one 6."""
    found = saccades.measured(world(2000, 0), world(1000, 1), 3.0)
    bits = {name: values["bits"].mean() for name, values in found.items()}
    assert bits["uniform"] == 0
    assert bits["markov"] == pytest.approx(5, abs=0.15)
    assert bits["c"] == pytest.approx(5, abs=0.15)
    assert bits["markov+c"] == pytest.approx(6, abs=0.2)
    assert abs(bits["centre"]) < 1
    nss = {name: values["nss"].mean() for name, values in found.items()}
    assert nss["uniform"] == 0 < nss["centre"] < nss["markov"] < nss["markov+c"]


def test_a_centre_bias_is_found() -> None:
    """Places of a normal distribution with s = 2° in a frame of 20°: log2(400) less its entropy, log2(2πe s²)."""
    rng = np.random.default_rng(2)

    def drawn(count: int) -> Saccades:
        end = np.clip(2 * rng.standard_normal((count, 2)), -9.9, 9.9)
        start, zero = rng.uniform(-9, 9, (count, 2)), np.zeros((count, 2))
        number = np.arange(count)
        return Saccades(start, end, zero, zero, np.full((count, 2), 20.0), number // 10, number // 10)

    bits, _ = saccades.centre(drawn(5000).end, drawn(2000), 1.0)
    want = np.log2(400) - np.log2(2 * np.pi * np.e * 4)
    assert bits.mean() == pytest.approx(want, abs=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saccades")
    pictures = noise.pictures(folder, 3)
    own = [
        "data.source=pictures",
        f"data.files=[{','.join(pictures)}]",
        "data.steps=6",
        "data.train=6",
        "data.test=4",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RJEPA_CACHE", str(folder / "cache"))
        small = ["model.units=5", "train.batch=6", "train.epochs=1"]
        train.Trainer(config.read(None, [*own, *small]), folder / "run", lambda _: None).run()
    return folder / "run"


def test_a_runs_saccades(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    done = train.finished(run)
    side = done.data.test
    got = saccades.saccades(done.model, side)
    patches = side.patches
    assert isinstance(patches, FixationSequences)
    assert len(got.start) == 4  # of 6 fixations, the saccade from the fifth to the last
    for i in range(4):
        place = patches[i]["positions"].numpy()
        np.testing.assert_allclose(got.start[i], place[4], atol=1e-5)
        np.testing.assert_allclose(got.end[i], place[5], atol=1e-5)
        np.testing.assert_allclose(got.before[i], place[4] - place[3], atol=1e-5)
    assert got.extent[0].tolist() == [16, 12]
    assert side.x is not None
    with torch.no_grad():
        made: Encoding = done.model.encoder.encode(side.x)
    np.testing.assert_allclose(got.context, torch.cat([made.s, made.m], -1)[4].double().numpy())
    app = typer.Typer()
    cli.add_to(app)
    shown = CliRunner().invoke(app, ["saccades", str(run), "--out", str(tmp_path / "found.json")])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["saccades"] == {"train": 12, "test": 4}
    assert found["gain"]["bits"][0] == pytest.approx(found["markov+c"]["bits"] - found["markov"]["bits"])
    assert set(found) == {"saccades", "gain", *saccades.PREDICTORS}
    with pytest.raises(ValueError, match="cell must be a positive number of degrees, got 0"):
        saccades.predict(done, cell=0)
    shown = CliRunner().invoke(app, ["saccades", str(run), "data.order=other"])
    assert shown.exit_code == 2
    assert "saccades go with data.order='recorded', got 'other'" in shown.output


def test_all_areas_are_the_context(run: Path) -> None:
    """Of a model whose areas all recur, c has what a loop over its steps finds."""
    from rjepa_triton.rjepa import backbone
    from rjepa_triton.rjepa.encoder import Encoder
    from rjepa_triton.rjepa.model import RJEPA
    from rjepa_triton.rjepa.sequences import Sequences

    torch.manual_seed(0)
    encoder = Encoder(backbone.load("random"), preset="full", units=4, hidden=6)
    for parameter in encoder.recurrent_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = RJEPA(encoder).eval()
    patches = torch.randint(0, 255, (2, 3, 3, 50, 50), dtype=torch.uint8)
    empty = torch.zeros(3, 2, 1)
    items = [{"patches": one} for one in patches]
    side = Sequences(None, None, items, empty, None, empty, np.array(["a", "a"]))  # type: ignore[arg-type]
    with torch.no_grad():
        got = saccades._contexts(model, side)
        whole = encoder(patches.transpose(0, 1))
    torch.testing.assert_close(got[:, :, :4], whole.s, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[:, :, 4:8], whole.m, atol=1e-5, rtol=1e-4)
    last = torch.cat([values.mean((-2, -1)) for pair in whole.state.areas for values in pair], dim=-1)
    torch.testing.assert_close(got[-1, :, 8:], last, atol=1e-5, rtol=1e-4)
