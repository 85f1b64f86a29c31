"""VICReg's and SIGReg's terms against plain numpy and a closed form; collapse without them, and none with them."""

from __future__ import annotations

import math
from pathlib import Path

import noise
import numpy as np
import pytest
import torch

from rjepa_triton.rjepa import config, regularizers
from rjepa_triton.rjepa.backbone import GaborBank
from rjepa_triton.rjepa.encoder import Encoder
from rjepa_triton.rjepa.model import RJEPA
from rjepa_triton.rjepa.train import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_vicreg_is_its_two_sums() -> None:
    h = np.random.default_rng(0).standard_normal((7, 6, 4)) * [0.3, 0.9, 1.5, 2.0]
    rows = h.reshape(-1, 4)
    covariance = np.cov(rows.T)
    spread = sum(max(0.0, 1 - math.sqrt(covariance[j, j] + 1e-4)) for j in range(4)) / 4
    between = sum(covariance[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    assert float(regularizers.vicreg(torch.from_numpy(h))) == pytest.approx(spread + between / 25, rel=1e-12)


def test_sigreg_is_the_epps_pulley_statistic() -> None:
    """With the weight of a normal distribution the integral has a closed form: sums over pairs, and over rows."""
    h = torch.from_numpy(np.random.default_rng(1).standard_normal((40, 5)) * [0.2, 1, 1, 2, 3] + 0.3)
    directions = torch.randn(5, regularizers.DIRECTIONS, generator=torch.Generator().manual_seed(3))
    along = (h @ (directions / directions.norm(dim=0)).double()).numpy()
    count = len(h)
    want = []
    for x in along.T:
        pairs = np.exp(-((x[:, None] - x) ** 2) / 2).sum() / count**2
        single = np.exp(-(x**2) / 4).sum() * 2 / math.sqrt(2) / count
        want.append(pairs - single + 1 / math.sqrt(3))
    assert float(regularizers.sigreg(h, 3)) == pytest.approx(np.mean(want), rel=1e-3)
    assert (
        float(regularizers.sigreg(h, 3))
        == float(regularizers.sigreg(h, 3))
        != float(regularizers.sigreg(h, 4))
    )


@pytest.mark.parametrize("kind", ["vicreg", "sigreg"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    h = (
        torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .mul(0.7)
        .requires_grad_()
    )
    assert torch.autograd.gradcheck(lambda rows: regularizers.TERMS[kind](rows, 5), h)


def test_normal_rows_have_the_least_of_both() -> None:
    rows = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    for term in regularizers.TERMS.values():
        least = float(term(rows, 0))
        assert least < 0.02
        for other in (0.1 * rows, rows[:, :1].expand(-1, 6), torch.zeros_like(rows)):
            assert float(term(other, 0)) > least + 0.05


def variance(regularizer: str, stop_gradient: bool, strength: float = 1.0) -> float:
    """The mean variance of h after some training of a linear F and G over inputs that don't predict one another."""
    torch.manual_seed(0)
    encoder = Encoder(GaborBank(), units=6, hidden=8, embedding=4, learning="rfp")
    model = RJEPA(
        encoder,
        kind="square",
        predictor="linear",
        stop_gradient=stop_gradient,
        regularizer=regularizer,
        strength=strength,
    ).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    x = torch.randn(6, 40, 6)
    for _ in range(100):
        optimizer.zero_grad()
        model.from_inputs(x).total(lambda losses: losses.mean()).backward()
        optimizer.step()
    with torch.no_grad():
        return float(encoder.encode(x).h.flatten(0, 1).var(0).mean())


def test_without_a_stopped_gradient_h_collapses_and_a_regularizer_holds_it() -> None:
    assert variance("none", False) < 0.01
    assert variance("none", True) > 0.05
    assert variance("vicreg", False) > 0.3
    assert variance("sigreg", False, 10.0) > 0.3
    assert variance("sigreg", False, 0.5) < 0.01  # where the square loss pulls harder


def test_a_stopped_gradient_is_the_default_and_evaluations_have_no_regularizer() -> None:
    torch.manual_seed(0)
    encoder = Encoder(GaborBank(), units=5, hidden=8, embedding=3)
    x = torch.randn(4, 7, 5)
    model = RJEPA(encoder, kind="square", stop_gradient=False, regularizer="sigreg", strength=2.0)
    found = model.from_inputs(x)
    h = found.encoding.h
    want = (h[1:] - model.predictor(h[:-1])).square().mean(-1)
    torch.testing.assert_close(found.representation, want)
    assert not found.target.requires_grad
    torch.testing.assert_close(found.regularizer, 2 * regularizers.sigreg(h, 0))
    assert found.regularizer is not None
    torch.testing.assert_close(
        found.total(lambda losses: losses.mean()), found.representation.mean() + found.regularizer
    )
    (own,) = torch.autograd.grad(found.representation.sum(), encoder.embedding.weight, retain_graph=True)
    (both,) = torch.autograd.grad(want.sum(), encoder.embedding.weight)
    torch.testing.assert_close(own, both)
    assert int(model.drawn) == 1
    with torch.no_grad():
        assert model.from_inputs(x).regularizer is None
    assert model.eval().from_inputs(x).regularizer is None
    assert int(model.drawn) == 1
    assert RJEPA(encoder).from_inputs(x).regularizer is None


def test_what_does_not_go_together_is_refused() -> None:
    encoder = Encoder(GaborBank(), units=5, hidden=8)
    with pytest.raises(
        ValueError, match="regularizer must be one of 'none', 'vicreg', 'sigreg', got 'barlow'"
    ):
        RJEPA(encoder, regularizer="barlow")
    with pytest.raises(ValueError, match="stop_gradient=False goes with target='h', got 'context_free'"):
        RJEPA(encoder, target="context_free", stop_gradient=False)
    for asked, says in {
        "model.regularizer=barlow": "model.regularizer must be one of",
        "model.regularizer_weight=-1": "model.regularizer_weight must be at least 0, got -1",
    }.items():
        with pytest.raises(ValueError, match=says):
            config.read(None, [asked])
    with pytest.raises(
        ValueError, match=r"model\.stop_gradient=false goes with model\.target='h', got 'ema'"
    ):
        config.read(None, ["model.stop_gradient=false", "model.target=ema"])
    for asked in ("model.stop_gradient=false", "model.regularizer=vicreg"):
        with pytest.raises(ValueError, match=r"\(online\) goes with model\."):
            config.read(None, [asked, "train.updates=1"])


def test_an_interrupted_run_draws_the_directions_that_a_whole_one_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    own = [
        "data.source=pictures",
        f"data.files=[{','.join(noise.pictures(tmp_path, 2))}]",
        "train.lr_recurrent=1e-2",
    ]
    small = [
        "data.steps=4",
        "data.train=4",
        "data.test=2",
        "model.units=4",
        "train.batch=2",
        "train.epochs=2",
    ]
    said = config.read(None, [*own, *small, "model.regularizer=sigreg", "model.stop_gradient=false"])
    whole = Trainer(said, tmp_path / "whole", lambda _: None)
    whole.run()
    first, done = Trainer(said, tmp_path / "cut", lambda _: None), 0

    def end() -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(end)
    second = Trainer(said, tmp_path / "cut", lambda _: None)
    second.run()
    assert int(second.model.drawn) == int(whole.model.drawn) == 4
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
