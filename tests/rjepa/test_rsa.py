"""Representational similarity against loops over pairs in plain numpy, all permutations, and a run's own embeddings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import noise
import numpy as np
import pytest
import torch
import typer
from scipy import stats
from typer.testing import CliRunner

from rjepa_triton.rjepa import cli, config, rsa, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def by_hand(responses: np.ndarray, metric: str) -> list[float]:
    """The dissimilarities, pair by pair."""
    found = []
    for a, b in itertools.combinations(responses, 2):
        if metric == "correlation":
            found.append(1 - np.corrcoef(a, b)[0, 1])
        elif metric == "cosine":
            found.append(1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))
        else:
            found.append(float(np.sqrt(((a - b) ** 2).sum())))
    return found


@pytest.mark.parametrize("metric", rsa.METRICS)
def test_dissimilarities_are_those_of_each_pair(metric: str) -> None:
    responses = np.random.default_rng(0).standard_normal((6, 5))
    np.testing.assert_allclose(rsa.dissimilarities(responses, metric), by_hand(responses, metric), rtol=1e-12)
    order = np.array([3, 0, 5, 1, 2, 4])
    want = by_hand(responses[order], metric)
    np.testing.assert_allclose(rsa.reordered(rsa.dissimilarities(responses, metric), order), want, rtol=1e-12)


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, (2, 40)).astype(float)  # with ties
    assert rsa.correlation(a, b, "spearman") == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rsa.correlation(a, b, "pearson") == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert rsa.correlation(a, np.ones(40), "spearman") == 0


def test_the_noise_ceiling() -> None:
    """Of one pattern with noise: lower and upper bound lie around the correlation with the pattern."""
    rng = np.random.default_rng(2)
    pattern = rng.standard_normal(400)
    recorded = pattern + rng.standard_normal((8, 400))
    for kind in rsa.KINDS:
        lower, upper = rsa.noise_ceiling(recorded, kind)
        best = np.mean([rsa.correlation(pattern, one, kind) for one in recorded])
        assert lower < best < upper
    lower, upper = rsa.noise_ceiling(recorded[:2], "pearson")
    assert lower == pytest.approx(np.corrcoef(recorded[0], recorded[1])[0, 1])
    z = (recorded[:2] - recorded[:2].mean(1, keepdims=True)) / recorded[:2].std(1, keepdims=True)
    assert upper == pytest.approx(np.mean([np.corrcoef(one, z.mean(0))[0, 1] for one in z]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on seven pictures, five of which are held out."""
    folder = tmp_path_factory.mktemp("rsa")
    pictures = noise.pictures(folder, 7)
    held = ",".join(f"picture{k}" for k in range(2, 7))
    own = ["data.source=pictures", f"data.files=[{','.join(pictures)}]", f"data.held_out=[{held}]"]
    small = [
        "data.steps=6",
        "data.train=4",
        "data.test=3",
        "model.units=6",
        "train.batch=4",
        "train.epochs=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RJEPA_CACHE", str(folder / "cache"))
        train.Trainer(config.read(None, [*own, *small]), folder / "run", lambda _: None).run()
    return folder / "run"


def table(file: Path, rows: dict[str, list[float]]) -> Path:
    channels = [f"v{k}" for k in range(len(next(iter(rows.values()))))]
    lines = [f"{movie},{','.join(map(repr, values))}" for movie, values in rows.items()]
    file.write_text("\n".join([f"movie,{','.join(channels)}", *lines]) + "\n")
    return file


def test_a_run_is_compared_with_responses(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    done = train.finished(run)
    assert done.data.test.x is not None
    with torch.no_grad():
        h = done.model.encoder.encode(done.data.test.x).h[-1].double().numpy()  # of 6 steps the last is late
    sources = done.data.test.sources
    means = {name: h[sources == name].mean(0) for name in dict.fromkeys(sources.tolist())}
    assert len(means) == 5
    rows = {name: values.tolist() for name, values in means.items()}
    file = table(tmp_path / "same.csv", {**rows, "picture9": rows["picture2"]})
    found = rsa.compare(done, file)
    assert found["h"]["similarity"] == pytest.approx(1)
    assert (found["stretches"], found["unseen"], found["channels"], found["subjects"]) == (5, 1, 6, 1)
    assert found["gain"][0] == pytest.approx(1 - found["x"]["similarity"])
    assert found["gain"][1] <= found["gain"][2]
    assert found["ceiling"] is None

    rng = np.random.default_rng(3)
    other = {name: (np.array(values) + rng.standard_normal(6)).tolist() for name, values in rows.items()}
    file = table(tmp_path / "responses.csv", other)
    app = typer.Typer()
    cli.add_to(app)
    given = ["--permutations", "3000", "--metric", "euclidean", "--out", str(tmp_path / "found.json")]
    shown = CliRunner().invoke(app, ["rsa", str(run), "--responses", str(file), *given])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "found.json").read_text())
    ours, theirs = (np.array(list(one.values())) for one in (means, other))
    want = by_hand(theirs, "euclidean")
    similarity = stats.spearmanr(by_hand(ours, "euclidean"), want).statistic
    assert found["h"]["similarity"] == pytest.approx(similarity)
    every = [
        stats.spearmanr(by_hand(ours[list(order)], "euclidean"), want).statistic
        for order in itertools.permutations(range(5))
    ]
    exact = np.mean(np.array(every) >= similarity - 1e-12)
    assert found["h"]["p"] == pytest.approx(exact, abs=4 * np.sqrt(exact / 3000))


def test_subjects_have_a_ceiling(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    done = train.finished(run)
    rng = np.random.default_rng(4)
    each = rng.standard_normal((3, 5, 4))
    lines = [
        f"picture{k + 2},s{s},{','.join(map(str, each[s, k].tolist()))}" for k in range(5) for s in (2, 0, 1)
    ]
    file = tmp_path / "responses.csv"
    file.write_text("\n".join(["movie,subject,a,b,c,d", *lines]) + "\n")
    found = rsa.compare(done, file, permutations=9, side="both")
    matrices = np.array([by_hand(one, "correlation") for one in each])
    assert found["ceiling"] == pytest.approx(rsa.noise_ceiling(matrices, "spearman"))
    assert (found["subjects"], found["channels"]) == (3, 4)
    assert done.data.test.x is not None
    with torch.no_grad():
        h = done.model.encoder.encode(done.data.test.x).h[-1].double().numpy()
    ours = by_hand(
        np.array([h[done.data.test.sources == f"picture{k + 2}"].mean(0) for k in range(5)]), "correlation"
    )
    want = np.mean([stats.spearmanr(ours, one).statistic for one in matrices])
    assert found["h"]["similarity"] == pytest.approx(want)
    file.write_text("\n".join(["movie,subject,a,b,c,d", *lines[:-1]]) + "\n")
    with pytest.raises(ValueError, match="subject 's1' has no row for the stretch of row 14"):
        rsa.compare(done, file)


@pytest.mark.parametrize(
    ("change", "given", "says"),
    [
        ({}, {"metric": "manhattan"}, "metric must be one of 'correlation', 'euclidean', 'cosine'"),
        ({}, {"kind": "kendall"}, "kind must be one of"),
        ({}, {"side": "all"}, "side must be one of"),
        ({}, {"permutations": 0}, "permutations must be at least 1, got 0"),
        (
            {"picture3": "3,3"},
            {},
            "must differ between channels in each stretch .* 1 of 5 don't: number 2; metric=",
        ),
        ({"picture3": "0,0"}, {"metric": "cosine"}, "must not all be 0"),
        ({"picture3": "x,1"}, {}, "row 3: a must be a number, but is 'x'"),
        ({"picture3": ",1"}, {}, "row 3: a must be a number, but is missing"),
        (
            {},
            {"side": "train"},
            "at least 4 stretches must have late fixations of the train sequences, got 0 of 5",
        ),
    ],
)
def test_what_is_wrong_is_named(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    given: dict[str, object],
    says: str,
) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    rows = {f"picture{k}": f"{k},{k * k}" for k in range(2, 7)} | change
    (tmp_path / "r.csv").write_text("\n".join(["movie,a,b", *(f"{k},{v}" for k, v in rows.items())]) + "\n")
    with pytest.raises(ValueError, match=says):
        rsa.compare(train.finished(run), tmp_path / "r.csv", **given)  # type: ignore[arg-type]


def test_a_table_without_channels(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    (tmp_path / "r.csv").write_text("movie,subject\npicture2,1\n")
    with pytest.raises(ValueError, match="no column has responses"):
        rsa.compare(train.finished(run), tmp_path / "r.csv")
