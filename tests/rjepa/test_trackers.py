"""Files of eye trackers' own programs: what is read of each is what the file says, in seconds and pixels of the frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import films
import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from rjepa_triton.rjepa import cli, config, data, trackers
from rjepa_triton.rjepa.fixations import FixationError, Fixations
from rjepa_triton.rjepa.formats import FORMATS
from rjepa_triton.rjepa.sidecar import Sidecar

SIDE = {"px_per_degree": 10, "frame_size": [400, 300]}
# onset and duration in ms, and position in pixels of the frame
WANTED = [(100, 200, 40.0, 30.0), (350, 250, 80.0, 45.0), (650, 300, 200.0, 150.0), (1000, 220, 390.0, 285.0)]


def sidecar(**changes: Any) -> Sidecar:
    return Sidecar.from_dict({**SIDE, **changes})


def written(folder: Path, lines: list[str], name: str = "export.tsv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes("\n".join([*lines, ""]).encode(encoding))
    return folder / name


def holds(got: Fixations, rows: list[int], who: str = "p1", movie: str = "m") -> None:
    assert set(got.participant.tolist()) == {who}
    assert set(got.movie.tolist()) == {movie}
    onset, duration, x, y = np.array(WANTED).T
    for name, want in (("onset", onset / 1000), ("duration", duration / 1000), ("x", x), ("y", y)):
        np.testing.assert_allclose(getattr(got, name), want, rtol=0, atol=1e-6, err_msg=name)
    assert got.row.tolist() == rows


def samples(factor: float, extra: str = "") -> list[tuple[float, str, str, int, float, float, str]]:
    """Rows of a recording at 50 Hz: time, event, its duration, number, position, and what was shown."""
    rows = [(20 * factor, "Unclassified", "60", 1, 1.0, 2.0, "")]
    for number, (onset, duration, x, y) in enumerate(WANTED, 1):
        for at in range(onset, onset + duration, 20):
            rows.append((at * factor, "Fixation", str(duration), number, x, y, "m"))
        rows.append(((onset + duration + 5) * factor, "Saccade", "30", number, 0.0, 0.0, "m"))
    return rows


STARTS = [3, 14, 28, 44]  # the file's row at which each fixation begins


def test_tobii_studio(tmp_path: Path) -> None:
    header = "ParticipantName\tMediaName\tRecordingTimestamp\tFixationIndex\tGazeEventType\tGazeEventDuration\tFixationPointX (MCSpx)\tFixationPointY (MCSpx)"
    rows = [f"p1\t{m}\t{t:g}\t{n}\t{e}\t{d}\t{x:g}\t{y:g}" for t, e, d, n, x, y, m in samples(1)]
    path = written(tmp_path, [header, *rows], encoding="utf-16")
    got = trackers.read("tobii", path, sidecar())
    holds(got, STARTS)
    assert got.report.left_out == {"another row of a fixation": 45, "name isn't Fixation": 5}
    with pytest.raises(
        ValueError, match=r"screen must be left out, since 'FixationPointX \(MCSpx\)' .* the movie's"
    ):
        trackers.read("tobii", path, sidecar(screen={"offset": [0, 0]}))


@pytest.mark.parametrize("version", ["µs, no unit", "ms, no unit", "[ms]", "[μs] and parts", "display"])
def test_tobii_pro_lab(tmp_path: Path, version: str) -> None:
    factor = 1000 if ("s, no unit" in version and version[0] != "m") or "μs" in version else 1
    time, lasts, x, y = ("Recording timestamp", "Gaze event duration", "Fixation point X", "Fixation point Y")
    side = sidecar()
    if version == "[ms]":
        time, lasts, x, y = f"{time} [ms]", "Gaze event duration [ms]", f"{x} [MCS px]", f"{y} [MCS px]"
    elif "parts" in version:
        time, lasts = "Recording timestamp [\N{MICRO SIGN}s]", "Eye movement event duration"
        x, y = f"{x} (MCSnorm)", f"{y} (MCSnorm)"
    elif version == "display":
        side = sidecar(screen={"size": [1000, 800], "frame": [100, 50, 800, 600]})
    header = [
        "Sensor",
        "Participant name",
        "Recording name",
        "Presented Stimulus name",
        time,
        "Eye movement type",
        lasts,
    ]
    lines = ["\t".join([*header, "Eye movement type index", x, y])]
    for t, event, duration, number, px, py, movie in samples(factor):
        place = (px, py)
        if "parts" in version:
            place = (px / 400, py / 300)
        elif version == "display":
            place = (100 + 2 * px, 50 + 2 * py)
        cells = [
            "Eye Tracker",
            "p1",
            "Recording1",
            movie,
            f"{t:g}",
            event,
            duration,
            str(number),
            *map(repr, place),
        ]
        lines.append("\t".join(cells))
    holds(trackers.read("tobii", written(tmp_path, lines), side), STARTS)


def test_a_fixation_before_the_movie_is_not_of_it(tmp_path: Path) -> None:
    header = "Participant name\tPresented Media name\tRecording timestamp [ms]\tEye movement type index\tEye movement type\tGaze event duration\tFixation point X\tFixation point Y"
    rows = [(0, "", 1, 200), (100, "m", 1, 200), (300, "m", 2, 100), (500, "m", 3, 150)]
    lines = [f"p1\t{m}\t{t}\t{n}\tFixation\t{d}\t40\t{30 + n}" for t, m, n, d in rows]
    got = trackers.read("tobii", written(tmp_path, [header, *lines]), sidecar())
    assert got.row.tolist() == [4, 5]
    assert got.report.left_out == {"another row of a fixation": 1, "no movie was shown": 1}


def test_a_unit_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    header = "Participant name\tPresented Media name\tRecording timestamp\tEye movement type\tGaze event duration\tFixation point X\tFixation point Y"
    path = written(
        tmp_path, [header, "p1\tm\t100\tFixation\t200\t40\t30", "p1\tm\t400\tFixation\t200\t41\t30"]
    )
    with pytest.raises(
        FixationError, match=r"the unit of 'Recording timestamp' can't be told from 2 fixations; say col"
    ):
        trackers.read("tobii", path, sidecar())
    said = sidecar(columns={"onset": {"name": "Recording timestamp", "unit": "ms"}})
    assert trackers.read("tobii", path, said).onset.tolist() == pytest.approx([0.1, 0.4])


def test_decimal_commas(tmp_path: Path) -> None:
    header = "Participant name\tPresented Media name\tRecording timestamp [ms]\tEye movement type\tGaze event duration\tFixation point X\tFixation point Y"
    path = written(
        tmp_path, [header, "p1\tm\t100\tFixation\t200\t40,5\t30,25", "p1\tm\t400\tFixation\t200\t41\t30"]
    )
    got = trackers.read("tobii", path, sidecar(decimal=","))
    assert (got.x.tolist(), got.y.tolist()) == ([40.5, 41], [30.25, 30])
    with pytest.raises(FixationError, match="row 2: x is '40,5'"):
        trackers.read("tobii", path, sidecar())
    path = written(
        tmp_path, [header, "p1\tm\t100\tFixation\t200\t40.5\t30", "p1\tm\t400\tFixation\t200\t41\t30"]
    )
    with pytest.raises(FixationError, match=r"row 2: x is '40\.5'"):
        trackers.read("tobii", path, sidecar(decimal=","))
    with pytest.raises(ValueError, match=r"decimal must be '\.' or ',', got ';'"):
        sidecar(decimal=";")


@pytest.mark.parametrize("event", ["Fixation", "Visual Intake"])
@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_smi_begaze(tmp_path: Path, event: str, delimiter: str) -> None:
    where = "Fixation Position" if event == "Fixation" else event + " Position"
    header = f"Trial|Stimulus|Participant|Category|Eye L/R|Index|Event Start Trial Time [ms]|Event End Trial Time [ms]|Event Duration [ms]|{where} X [px]|{where} Y [px]|AOI Name"
    lines = [header]
    for number, (onset, duration, x, y) in enumerate(WANTED, 1):
        for area in ("White Space", "Face"):  # areas of interest overlap: a row each
            lines.append(
                f"T1|m|p1|{event}|Left|{number}|{onset}|{onset + duration}|{duration}|{x}|{y}|{area}"
            )
        lines.append(f"T1|m|p1|Saccade|Left|{number}|{onset + duration}|{onset + duration + 20}|20|-|-|-")
    got = trackers.read("smi", written(tmp_path, [line.replace("|", delimiter) for line in lines]), sidecar())
    holds(got, [2, 5, 8, 11])
    assert got.report.left_out == {"another row of a fixation": 4, f"name isn't {event}": 4}


@pytest.mark.parametrize("messages", [False, True])
def test_smi_event_detector(tmp_path: Path, messages: bool) -> None:
    lines = ["IDF Event Detector", "Sample Rate:\t250", "Subject:\tp1", ""]
    lines += ["Table Header for Fixations:"]
    lines += [
        "Event Type\tTrial\tNumber\tStart\tEnd\tDuration\tLocation X\tLocation Y\tDispersion X\tDispersion Y",
        "",
    ]
    if messages:
        lines.append("UserEvent\t7\t1\t50000\t# Message: m")
    first = len(lines)
    for number, (onset, duration, x, y) in enumerate(WANTED, 1):
        times = f"{onset * 1000}\t{(onset + duration) * 1000}\t{duration * 1000}"
        lines.append(f"Fixation L\t7\t{number}\t{times}\t{x}\t{y}\t3\t4")
        lines.append(f"Saccade L\t7\t{number}\t1\t2\t1\t0\t0\t0\t0")
    path = written(tmp_path, lines, "p1_events.txt")
    got = trackers.read("smi", path, sidecar())
    holds(got, [first + 1 + 2 * k for k in range(4)], movie="m" if messages else "7")
    bad = written(tmp_path, [*lines, "Fixation L\t7\t9\t1"], "p1_events.txt")
    with pytest.raises(FixationError, match=f"row {len(lines) + 1}: has 4 fields, a fixation has 10"):
        trackers.read("smi", bad, sidecar())


@pytest.mark.parametrize("kind", ["player", "surface", "cloud", "reference image"])
def test_pupil_labs(tmp_path: Path, kind: str) -> None:
    """Player's positions grow upwards and are parts of the frame; Cloud's are pixels and times in ns of an epoch."""
    lines, start = [], 0
    columns: dict[str, Any] = {"movie": {"value": "m"}}
    if kind in ("player", "surface"):
        columns["participant"] = {"value": "p1"}
        header = (
            "id,start_timestamp,duration,start_frame_index,end_frame_index,norm_pos_x,norm_pos_y,dispersion"
        )
        if kind == "surface":
            header = "world_timestamp,world_index,fixation_id,start_timestamp,duration,dispersion,norm_pos_x,norm_pos_y,x_scaled,y_scaled,on_surf"
        lines.append(header)
        for number, (onset, duration, x, y) in enumerate(WANTED):
            place = f"{x / 400},{1 - y / 300}"
            if kind == "player":
                lines.append(f"{number},{7 + onset / 1000},{duration},3,9,{place},1.0")
            for frame in range(2 * (kind == "surface")):
                lines.append(f"9,{frame},{number},{7 + onset / 1000},{duration},1.0,{place},0,0,True")
            if kind == "surface":
                lines.append(f"9,5,{number + 50},{7 + onset / 1000},{duration},1.0,-3.5,2,0,0,False")
        start = 7
    else:
        on = ",fixation detected in reference image" if kind == "reference image" else ""
        lines.append(
            f"section id,recording id,fixation id,start timestamp [ns],end timestamp [ns],duration [ms]{on},fixation x [px],fixation y [px]"
        )
        start = 1_650_000_000_000_000_000
        for number, (onset, duration, x, y) in enumerate(WANTED, 1):
            begins = start + onset * 10**6
            seen = ",True" if on else ""
            lines.append(f"s,p1,{number},{begins},{begins + duration * 10**6},{duration}{seen},{x},{y}")
            if on:
                lines.append(f"s,p1,{number + 50},{begins},{begins + duration * 10**6},{duration},False,,")
    got = trackers.read(
        "pupil", written(tmp_path, lines, "fixations.csv"), sidecar(columns=columns, movie_start=start)
    )
    holds(
        got, {"player": [2, 3, 4, 5], "surface": [2, 5, 8, 11], "cloud": [2, 3, 4, 5]}.get(kind, [2, 4, 6, 8])
    )
    if kind in ("surface", "reference image"):
        assert got.report.left_out["not on the picture"] == 4
        assert got.report.left_out.get("another row of a fixation", 0) == 4 * (kind == "surface")
    del columns["movie"]
    with pytest.raises(
        FixationError, match=r"no movie: it has no such column; say columns: \{movie: …\} in sidecar"
    ):
        trackers.read("pupil", tmp_path / "fixations.csv", sidecar(columns=columns))


def test_what_pupil_labs_must_say_true_or_false(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        [
            "recording id,start timestamp [ns],duration [ms],fixation x [px],fixation y [px],on_surf",
            "p,0,200,1,1,maybe",
        ],
    )
    with pytest.raises(FixationError, match="'on_surf' must say true or false, got 'maybe'"):
        trackers.read("pupil", path, sidecar(columns={"movie": {"value": "m"}}))


@pytest.mark.parametrize("kind", ["csv", "feather", "feather with lists"])
def test_pymovements(tmp_path: Path, kind: str) -> None:
    onset, duration, x, y = zip(*WANTED, strict=True)
    called = {"subject": ["p1"] * 4, "movie": ["m"] * 4, "name": ["fixation_ivt"] * 4}
    times = {
        "onset": list(onset),
        "offset": [a + b for a, b in zip(onset, duration, strict=True)],
        "duration": list(duration),
    }
    place: dict[str, Any] = {"location_x": list(x), "location_y": list(y)}
    if "lists" in kind:
        place = {"location": [list(pair) for pair in zip(x, y, strict=True)]}
    frame = pl.DataFrame({**called, **times, **place})
    saccade = frame.head(1).with_columns(pl.lit("saccade").alias("name"))
    frame = pl.concat([frame, saccade])
    path = tmp_path / f"events.{kind[:3]}"
    frame.write_csv(path) if kind == "csv" else frame.write_ipc(path)
    got = trackers.read("pymovements", path, sidecar())
    holds(got, [2, 3, 4, 5] if kind == "csv" else [1, 2, 3, 4])
    assert got.report.left_out == {"name isn't fixation_ivt": 1}
    if kind == "csv":
        two = pl.concat([frame, frame.with_columns(pl.lit("fixation_idt").alias("name"))])
        two.write_csv(path)
        with pytest.raises(FixationError, match="fixations by several detectors, fixation_idt, fixation_ivt"):
            trackers.read("pymovements", path, sidecar())


def test_commands_and_runs_take_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    header = "Participant|Stimulus|Category|Index|Event Start Trial Time [ms]|Event Duration [ms]|Fixation Position X [px]|Fixation Position Y [px]"
    lines = [f"p1|{m}|Fixation|{k}|{300 * k}|200|{90 + k}|75" for m in "mn" for k in range(6)]
    path = written(tmp_path, [line.replace("|", ",") for line in (header, *lines)])
    for name in "mn":
        films.picture(tmp_path, name=f"{name}.png")
    (tmp_path / "export.yaml").write_text("px_per_degree: 10\nmovies: {m: m.png, n: n.png}\n")
    app = typer.Typer()
    cli.add_to(app)
    shown = CliRunner().invoke(app, ["fixations", "check", str(path), "--format", "smi"])
    assert shown.exit_code == 0, shown.output
    assert "12 rows, 12 kept" in shown.output
    asked = ["data.source=table", f"data.table={path}", "data.format=smi", "data.steps=3"]
    sides = data.datasets(config.read(None, asked).data)
    assert (len(sides.train), len(sides.test)) == (2, 2)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, ["Participant\tStimulus", "p\tm"])
    with pytest.raises(
        FixationError, match=r"no onset: it has none of 'Event Start Trial Time \[ms\]'; there are Part"
    ):
        trackers.read("smi", path, sidecar())
    with pytest.raises(ValueError, match="format must be one of 'table', 'eyelink', 'asc', 'tobii', 'smi'"):
        trackers.read("excel", path, sidecar())
    (tmp_path / "x.feather").write_bytes(b"ARROW1" + bytes(30))
    with pytest.raises(FixationError, match=r"x\.feather: not an Arrow file that can be read"):
        trackers.read("pymovements", tmp_path / "x.feather", sidecar())
    for format in FORMATS:
        with pytest.raises(FileNotFoundError, match="none: no such file"):
            trackers.read(format, tmp_path / "none", sidecar())


def test_a_report_of_data_viewer_has_no_map_of_columns(tmp_path: Path) -> None:
    path = written(tmp_path, ["RECORDING_SESSION_LABEL\tmovie"])
    with pytest.raises(ValueError, match="columns doesn't go with this format, whose columns are known"):
        trackers.read("eyelink", path, sidecar(columns={"x": "CURRENT_FIX_X"}))
