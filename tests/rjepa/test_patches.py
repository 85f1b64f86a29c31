"""Sequences of patches: cut where the gaze was, from the frame then shown, the same in any process."""

from __future__ import annotations

import pickle
from pathlib import Path

import films
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rjepa_triton.rjepa.fixations import FixationError
from rjepa_triton.rjepa.patches import FixationSequences, Source
from rjepa_triton.rjepa.video import VideoError


def recorded(folder: Path, rows: list[str], **options: object) -> FixationSequences:
    got = films.table(folder, rows, {"m": films.picture(folder).name})
    made: FixationSequences = FixationSequences.from_fixations(
        got,
        cache=folder / "cache",
        **{"steps": 3, "patch": 20, "degrees": 2, **options},  # type: ignore[arg-type]
    )
    return made


def test_what_an_item_holds(tmp_path: Path) -> None:
    rows = ["p,m,0,200,100,75", "p,m,300,250,110,80", "p,m,700,100,60,120", *films.looking(2, "q")]
    data = recorded(tmp_path, rows)
    assert len(data) == 1
    item = data[0]
    assert item["patches"].shape == (3, 3, 20, 20)
    assert item["patches"].dtype == torch.uint8
    for patch, (x, y) in zip(item["patches"], ((100, 75), (110, 80), (60, 120)), strict=True):
        assert patch[0, 0].tolist() == list(range(x - 10, x + 10))
        assert patch[1, :, 0].tolist() == list(range(y - 10, y + 10))
        assert (patch[2] == 7).all()
    torch.testing.assert_close(item["positions"], torch.tensor([[0.0, 0], [1, 0.5], [-4, 4.5]]))
    torch.testing.assert_close(item["actions"][:2], torch.tensor([[1, 0.5], [-5, 4]]))
    assert item["actions"][2].isnan().all()
    assert item["onsets"].tolist() == pytest.approx([0, 0.3, 0.7])
    assert item["durations"].tolist() == pytest.approx([0.2, 0.25, 0.1])
    assert (item["participant"], item["movie"]) == ("p", "m")
    assert data.unused == {"in runs shorter than a sequence": 2}
    copied = pickle.loads(pickle.dumps(data))
    assert same(copied[0], item)
    assert not copied.paths.fixations.x.flags.writeable
    with pytest.raises(IndexError, match="index must be below 1, got 1"):
        data[1]


def test_the_frame_is_the_one_shown_at_the_middle(tmp_path: Path) -> None:
    films.write(tmp_path / "m.mp4", 24, size=(200, 152))  # 40 ms a frame
    rows = ["p,m,0,30,100,75", "p,m,100,100,100,75", "p,m,300,319,100,75", "p,m,900,50,100,75"]
    got = films.table(tmp_path, rows, {"m": "m.mp4"})
    options = {"steps": 4, "patch": 20, "degrees": 2, "cache": tmp_path / "cache"}
    seen = FixationSequences.from_fixations(got, **options)[0]["patches"].float().mean((1, 2, 3))  # type: ignore[arg-type]
    want = torch.tensor([films.level(k) for k in (0, 3, 11, 23)]).float()
    torch.testing.assert_close(seen, want, atol=3, rtol=0)

    slow = films.table(tmp_path, rows, {"m": {"file": "m.mp4", "fps": 10}})
    seen = FixationSequences.from_fixations(slow, **options)[0]["patches"].float().mean((1, 2, 3))  # type: ignore[arg-type]
    want = torch.tensor([films.level(k) for k in (0, 1, 4, 9)]).float()
    torch.testing.assert_close(seen, want, atol=3, rtol=0)


def test_a_patch_covers_its_degrees_at_any_resolution(tmp_path: Path) -> None:
    big = films.picture(tmp_path, (240, 160))
    got = films.table(tmp_path, ["p,m,0,200,120,80"], {"m": big.name}, px_per_degree=20)
    data = FixationSequences.from_fixations(got, steps=1, patch=20, degrees=2, cache=tmp_path / "cache")
    patch = data[0]["patches"][0].float()
    assert abs(patch[0, 0, 0] - 101) < 2  # 2° are 40 pixels of the file, 100 to 140
    assert abs(patch[0, 0, -1] - 139) < 2
    assert abs(patch[1, 0, 0] - 61) < 2
    assert data[0]["positions"].abs().max() == 0


def test_fixations_given_in_a_frame_of_another_size_than_the_file(tmp_path: Path) -> None:
    movies: dict[str, object] = {"m": {"file": films.picture(tmp_path).name, "frame_size": [400, 300]}}
    got = films.table(tmp_path, ["p,m,0,200,200,150"], movies, px_per_degree=20)
    data = FixationSequences.from_fixations(got, steps=1, patch=20, degrees=2, cache=tmp_path / "cache")
    assert data[0]["patches"][0, 0, 0].tolist() == list(range(90, 110))
    movies = {"m": {"file": "m.png", "frame_size": [400, 400]}}
    got = films.table(tmp_path, ["p,m,0,200,200,150"], movies, px_per_degree=20)
    with pytest.raises(ValueError, match=r"m\.png: its frame of 200 × 150 pixels has another aspect than"):
        FixationSequences.from_fixations(got, steps=1, cache=tmp_path / "cache")


def test_edges(tmp_path: Path) -> None:
    rows = ["p,m,0,200,2,75", "p,m,300,200,199,149", "p,m,600,200,100,75"]
    shifted = recorded(tmp_path, rows)[0]
    assert shifted["patches"][0, 0, 0].tolist() == list(range(20))
    assert shifted["patches"][1, 1, :, 0].tolist() == list(range(130, 150))
    assert shifted["positions"][0, 0] == pytest.approx(-9.8)
    padded = recorded(tmp_path, rows, edge="pad")[0]
    assert padded["patches"][0, 0, 0].tolist() == [0] * 8 + list(range(12))
    assert padded["patches"][0, 2, 0].tolist() == [0] * 8 + [7] * 12
    assert padded["patches"][1, 1, :, 0].tolist() == [*range(139, 150), *[0] * 9]
    with pytest.raises(
        ValueError, match=r"fix\.csv: 2 patches stick out of the frame: rows 2, 3; edge='shift'"
    ):
        recorded(tmp_path, rows, edge="refuse")
    assert len(recorded(tmp_path, rows[2:], edge="refuse", steps=1)) == 1
    with pytest.raises(
        ValueError, match=r"m\.png: its frame is 200 × 150 pixels .* smaller than a patch of 160"
    ):
        recorded(tmp_path, rows, patch=160, degrees=16)
    with pytest.raises(ValueError, match="edge must be one of 'shift', 'pad', 'refuse', got 'wrap'"):
        recorded(tmp_path, rows, edge="wrap")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    steps=st.integers(1, 6),
    stride=st.integers(1, 7),
)
def test_every_fixation_is_in_a_sequence_or_counted(
    tmp_path: Path, runs: list[int], steps: int, stride: int
) -> None:
    rows = [row for k, count in enumerate(runs) for row in films.looking(count, f"p{k}")]
    if max(runs) < steps:
        with pytest.raises(ValueError, match=f"no sequence of {steps} fixations in {sum(runs)}"):
            recorded(tmp_path, rows, steps=steps, stride=stride)
        return
    data = recorded(tmp_path, rows, steps=steps, stride=stride)
    used = {(item["participant"], float(onset)) for item in data for onset in item["onsets"]}
    assert len(used) + sum(data.unused.values()) == sum(runs)
    for item in data:
        assert np.diff(item["onsets"]).tolist() == pytest.approx([0.3] * (steps - 1))


def test_a_long_gap_ends_a_sequence(tmp_path: Path) -> None:
    rows = [*films.looking(4), "p,m,5000,200,50,50", "p,m,5300,200,50,50", "p,m,5600,200,50,50"]
    data = recorded(tmp_path, rows, max_gap=1)
    assert [item["onsets"][0].item() for item in data] == [0, 5]
    assert data.unused == {"beside the sequences": 1}
    assert len(recorded(tmp_path, rows, steps=7)) == 1
    with pytest.raises(ValueError, match="max_gap must be positive, got 0"):
        recorded(tmp_path, rows, max_gap=0)


def test_segments_at_random_places(tmp_path: Path) -> None:
    """Of p's 9 fixations before a gap, 6 after it, and q's 2, T = 4 follow one another at 6 + 3 places."""
    late = [f"p,m,{9000 + 300 * k},200,50,50" for k in range(6)]
    rows = [*films.looking(9), *late, *films.looking(2, "q")]

    def onsets(segments: int, seed: int) -> list[int]:
        data = recorded(tmp_path, rows, steps=4, max_gap=1, segments=segments, seed=seed)
        assert set(data.participant.tolist()) == {"p"}
        used = {float(onset) for item in data for onset in item["onsets"]}
        assert sum(data.unused.values()) == 17 - len(used)
        assert data.unused["in runs shorter than a sequence"] == 2
        return [round(1000 * float(item["onsets"][0])) for item in data]

    places = [300 * k for k in range(6)] + [9000 + 300 * k for k in range(3)]
    assert onsets(9, 0) == places
    drawn = [onsets(2, seed) for seed in range(120)]
    assert all(first < second for first, second in drawn)
    assert onsets(2, 7) == drawn[7]
    counts = np.array([sum(place in pair for pair in drawn) for place in places])
    assert ((counts - 120 * 2 / 9) ** 2).sum() / (120 * 2 / 9 * 7 / 9) < 26.1  # χ² of 8, one in a thousand
    with pytest.raises(
        ValueError, match=r"segments must be at most 9, the places in .*fix\.csv where 4 fixat"
    ):
        onsets(10, 0)
    with pytest.raises(ValueError, match="stride goes with consecutive sequences, got 2 with segments=3"):
        recorded(tmp_path, rows, segments=3, stride=2)
    for wrong in (0, True):
        with pytest.raises((TypeError, ValueError), match="segments"):
            recorded(tmp_path, rows, segments=wrong)


def test_films_that_are_broken_or_over(tmp_path: Path) -> None:
    film = films.write(tmp_path / "n.mp4", 24, size=(200, 152))
    rows = [*films.looking(3), *films.looking(3, movie="n"), "q,n,600,200,50,50"]
    got = films.table(tmp_path, rows, {"m": films.picture(tmp_path).name, "n": "n.mp4"})
    body = film.read_bytes()
    options = {"steps": 3, "patch": 20, "degrees": 2, "cache": tmp_path / "cache"}
    film.write_bytes(body[: len(body) // 2])
    with pytest.raises(VideoError, match=r"n\.mp4: not a film"):
        FixationSequences.from_fixations(got, **options)  # type: ignore[arg-type]
    data = FixationSequences.from_fixations(got, policy="skip", **options)  # type: ignore[arg-type]
    assert len(data) == 1
    assert list(data.unused.values()) == [4]
    assert "n.mp4: not a film" in next(iter(data.unused))

    films.write(tmp_path / "n.mp4", 16, size=(200, 152))  # 0.64 s, less than when the table was read
    with pytest.raises(
        FixationError, match=r"2 fixations have their middle after the end of .*n\.mp4, 0\.64 s: rows 7, 8"
    ):
        FixationSequences.from_fixations(got, **options)  # type: ignore[arg-type]
    data = FixationSequences.from_fixations(got, policy="skip", **options)  # type: ignore[arg-type]
    assert data.unused == {"after the film's end": 2, "in runs shorter than a sequence": 2}


def test_a_movie_without_a_file(tmp_path: Path) -> None:
    got = films.table(tmp_path, films.looking(3), {"m": {"frame_size": [200, 150]}})
    with pytest.raises(ValueError, match=r"fix\.csv: no file of movie 'm' is known"):
        FixationSequences.from_fixations(got)


def simulated(folder: Path, **options: object) -> FixationSequences:
    sources = [
        Source("still", films.picture(folder), 10),
        Source("film", films.write(folder / "f.mp4", 24, size=(200, 152)), 10),
    ]
    made: FixationSequences = FixationSequences.simulated(
        sources,
        cache=folder / "cache",
        **{"sequences": 4, "steps": 20, "patch": 20, "degrees": 2, **options},  # type: ignore[arg-type]
    )
    return made


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(b[key]))
        if isinstance(x, torch.Tensor)
        else x == b[key]  # type: ignore[arg-type]
        for key, x in a.items()
    )


def test_simulated_items_are_patches_of_their_source(tmp_path: Path) -> None:
    data = simulated(tmp_path)
    assert len(data) == 8
    assert data.movie.tolist() == ["still"] * 4 + ["film"] * 4
    item = data[1]
    assert item["participant"] == "simulated-1"
    x = item["positions"][:, 0] * 10 + 100
    corner = item["patches"][:, 0, 0, 0].float()
    assert (corner - (x - 10)).abs().max() <= 0.51  # rounded to whole pixels
    film = data[5]
    middle = film["onsets"] + film["durations"] / 2
    phase = middle % (2 * 0.96)
    frame = (torch.minimum(phase, 2 * 0.96 - phase) / 0.04).long().clamp(max=23)
    level = torch.tensor([films.level(int(k)) for k in frame]).float()
    torch.testing.assert_close(film["patches"].float().mean((1, 2, 3)), level, atol=4, rtol=0)


def test_simulated_items_are_the_same_in_any_order_process_and_company(tmp_path: Path) -> None:
    data, again = simulated(tmp_path), simulated(tmp_path)
    backward = [again[i] for i in reversed(range(8))][::-1]
    loaded = list(DataLoader(data, batch_size=None, num_workers=2))
    copied = pickle.loads(pickle.dumps(data))
    alone = FixationSequences.simulated(
        [Source("film", tmp_path / "f.mp4", 10)],
        sequences=2,
        steps=20,
        patch=20,
        degrees=2,
        cache=tmp_path / "cache",
    )
    for i in range(8):
        assert same(data[i], backward[i])
        assert same(data[i], loaded[i])
        assert same(data[i], copied[i])
    assert same(data[4], alone[0])
    assert not same(data[0], data[1])
    assert not same(data[0], simulated(tmp_path, seed=1)[0])


def test_batches(tmp_path: Path) -> None:
    data = simulated(tmp_path)
    batch = next(iter(DataLoader(data, batch_size=8, num_workers=1, multiprocessing_context="spawn")))
    assert batch["patches"].shape == (8, 20, 3, 20, 20)
    assert batch["onsets"].dtype == torch.float64
    assert batch["movie"] == ["still"] * 4 + ["film"] * 4


def test_arguments_of_simulated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources must be at least one, each with a name of its own, got $"):
        FixationSequences.simulated([], sequences=1)
    source = Source("a", films.picture(tmp_path), 10)
    with pytest.raises(ValueError, match="a name of its own, got a, a"):
        FixationSequences.simulated([source, source], sequences=1)
    with pytest.raises(ValueError, match=r"m\.png: its frame is 20 × 15 .* is px_per_degree 100 right\?"):
        FixationSequences.simulated([Source("a", tmp_path / "m.png", 100)], sequences=1, cache=tmp_path / "c")
    with pytest.raises(ValueError, match="px_per_degree must be a positive number, got 0"):
        FixationSequences.simulated([Source("a", tmp_path / "m.png", 0)], sequences=1, cache=tmp_path / "c")
    with pytest.raises(ValueError, match="degrees must be a positive number, got -1"):
        FixationSequences.simulated([source], sequences=1, degrees=-1)
