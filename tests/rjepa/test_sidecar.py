"""Sidecars: what they say of movies, times and the screen, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import GOOD, write

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import FixationError
from rjepa_triton.rjepa.sidecar import Sidecar


def test_movie_start_by_movie_and_participant(tmp_path: Path) -> None:
    start = {"m": {"p1": 0, "p2": 10}}
    assert fixations.read(write(tmp_path, GOOD, movie_start=start)).onset.tolist()[3] == 0
    assert fixations.read(write(tmp_path, GOOD, movie_start={"p1": 0, "p2": 10})).onset.tolist()[3] == 0
    assert fixations.read(write(tmp_path, GOOD, movie_start={"m": -10})).onset.tolist()[0] == 0.01
    with pytest.raises(FixationError, match="row 5: movie_start has no time for movie 'm', participant 'p2'"):
        fixations.read(write(tmp_path, GOOD, movie_start={"m": {"p1": 0}}))


def test_names_that_yaml_reads_as_numbers(tmp_path: Path) -> None:
    rows = ["1,2,30,200,10,10", "3,2,50,200,20,20"]
    got = fixations.read(write(tmp_path, rows, movie_start={2: {1: 30, 3: 40}}, movies={2: {"fps": 25}}))
    assert got.onset.tolist() == pytest.approx([0, 0.01])


# Names that YAML 1.1 takes for numbers, truth, times and nothing.
ODD = [
    "010",
    "007",
    "1_0",
    "no",
    "12:30",
    "0x1f",
    "1e3",
    "~",
    "2026-01-02",
    "true",
    "08",
    "-1",
    ".5",
    "=",
    "8",
]


@pytest.mark.parametrize("how", ["{name}: {time}", "m: {{{name}: {time}}}", "{name}: {{p: 1}}"])
def test_names_are_text_whatever_yaml_takes_them_for(tmp_path: Path, how: str) -> None:
    rows = [f"{name},m,{1000 * (k + 1)},200,9,9" for k, name in enumerate(ODD)]
    start = ", ".join(f"{name}: {1000 * (k + 1)}" for k, name in enumerate(ODD))
    table = write(tmp_path, rows)
    side = "time_unit: ms\npx_per_degree: 10\nframe_size: [400, 300]\n"
    if "p: 1" in how:  # by movie and then participant
        table = write(tmp_path, [f"p,{name},1000,200,9,9" for name in ODD])
        side += f"movie_start: {{{', '.join(f'{name}: {{p: 1000}}' for name in ODD)}}}\n"
        side += f"movies: {{{', '.join(f'{name}: {{fps: {k + 1}}}' for k, name in enumerate(ODD))}}}\n"
    else:
        side += f"movie_start: {{{'m: {' * ('m:' in how)}{start}{'}' * ('m:' in how)}}}\n"
    (tmp_path / "fix.csv.yaml").write_text(side)
    got = fixations.read(table)
    assert (got.participant if "p: 1" not in how else got.movie).tolist() == ODD
    assert not got.onset.any()
    if "p: 1" in how:
        assert [got.movies[name].fps for name in ODD] == list(range(1, len(ODD) + 1))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("px_per_degree: 3\npx_per_degree: 4", "the key 'px_per_degree' is there twice"),
        ("movies: {a: {fps: 2}, a: {fps: 3}}", "the key 'a' is there twice"),
        ("{1: 2}: 3", "a key must be text"),
        ("px_per_degree: 1_0", "px_per_degree must be a positive number, got '1_0'"),
        ("px_per_degree: 010", "px_per_degree must be a positive number, got '010'"),
        ("px_per_degree: 1:30", "px_per_degree must be a positive number, got '1:30'"),
        ("time_unit: \0", "special characters are not allowed"),
        ("[" * 3000, "not YAML that can be read"),
        ("", "must be a mapping of names to values, got NoneType"),
    ],
)
def test_what_yaml_lets_through_is_refused(tmp_path: Path, written: str, said: str) -> None:
    table = write(tmp_path, GOOD)
    (tmp_path / "fix.csv.yaml").write_text("time_unit: ms\n" * (written[:1] not in "[{") + written)
    if not written:
        (tmp_path / "fix.csv.yaml").write_text("")
    with pytest.raises(ValueError, match=rf"fix\.csv\.yaml:? .*{said}"):
        fixations.read(table)
    (tmp_path / "fix.csv.yaml").write_bytes(b"time_unit: \xe9")
    with pytest.raises(ValueError, match=r"fix\.csv\.yaml: not text in UTF-8: byte 11 is 0xe9"):
        fixations.read(table)
    with pytest.raises(ValueError, match="movies: the name '8' is there twice"):
        Sidecar.from_dict({"movies": {8: {}, "8": {}}})


def test_anchors_and_merged_mappings(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD)
    with (tmp_path / "fix.csv.yaml").open("a") as side:
        side.write("movies:\n  m: &base {fps: 20, px_per_degree: 4}\n  n:\n    <<: *base\n    fps: 10\n")
    assert fixations.read(table).movies["m"].fps == 20


# Changes to the sidecar, and what is said of each.
SIDECARS: list[tuple[dict[str, object], str]] = [
    ({"time_unit": None}, "time_unit is missing; it must be one of s, ms, us"),
    ({"time_unit": "min"}, "time_unit must be one of s, ms, us, ns, got 'min'"),
    ({"px_per_degree": None}, "px_per_degree is missing"),
    ({"px_per_degree": -1}, "px_per_degree must be a positive number, got -1"),
    ({"fps": "fast"}, "fps must be a positive number, got 'fast'"),
    ({"frame_size": None}, "give the file of movie 'm' under movies, or frame_size"),
    ({"frame_size": [400]}, r"frame_size must be two numbers, \[x, y\], got \[400\]"),
    ({"frame_size": [400.5, 2]}, r"frame_size must be \[width, height\] in pixels"),
    ({"framesize": [400, 300]}, "unknown key 'framesize'; known keys: time_unit"),
    ({"movies": ["m"]}, "movies must be a mapping of names to values, got list"),
    ({"movies": {"m": {"start": 2}}}, r"movies\.m: unknown key 'start'"),
    ({"movies": {"m": {"fps": 0}}}, r"movies\.m\.fps must be a positive number, got 0"),
    ({"movie_start": "noon"}, "movie_start must be a time, or times by movie or participant, got 'noon'"),
    ({"movie_start": {"m": {"p1": "noon"}}}, r"movie_start\.m\.p1 must be a time, got 'noon'"),
    ({"screen": {"size": [2, 2]}}, r"screen\.size can be given only with .*screen\.frame"),
    ({"screen": {"frame": [0, 0, 400, 300], "scale": 2}}, "either frame, or offset and scale, got both"),
    ({"screen": {"frame": [0, 0, 400]}}, r"screen\.frame must be \[left, top, width, height\]"),
    ({"screen": {"frame": [0, 0, 400, 0]}}, r"screen\.frame must have a positive width and height"),
    (
        {"screen": {"frame": [9, 9, 400, 300], "size": [400, 300]}},
        "must lie on the screen of 400 × 300 pixels",
    ),
    ({"screen": {"frame": [0, 0, 400, 400]}}, "stretches the frame by 33% in one direction"),
]


@pytest.mark.parametrize(("changes", "said"), SIDECARS)
def test_what_is_wrong_with_a_sidecar(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=rf"fix\.csv\.yaml: .*{said}"):
        fixations.read(write(tmp_path, GOOD, **changes))


def test_a_sidecar_that_is_no_yaml(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD)
    (tmp_path / "fix.csv.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"fix\.csv\.yaml: not YAML that can be read"):
        fixations.read(table)
    (tmp_path / "fix.csv.yaml").rename(tmp_path / "fix.yaml")
    with pytest.raises(ValueError, match=r"fix\.yaml: not YAML that can be read"):
        fixations.read(table)


def test_a_rectangle_on_the_screen_and_a_movie_of_its_own(tmp_path: Path) -> None:
    own = {"screen": {"size": [1920, 1080], "frame": [560, 240, 800, 600]}, "px_per_degree": 40, "fps": 10}
    rows = ["p1,m,0,200,560,240", "p1,m,300,200,1359,839"]
    got = fixations.read(write(tmp_path, rows, movies={"m": own}))
    assert got.x.tolist() == [0, 399.5]
    assert got.y.tolist() == [0, 299.5]
    assert got.movies["m"].px_per_degree == 20
    assert got.movies["m"].fps == 10
