"""The report: one page that loads nothing, read by a real browser; and the same in Markdown."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import webbrowser
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checkout import ROOT
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.record import Record, Timing
from rjepa_triton.bench.harness.tables import seconds_text
from rjepa_triton.bench.report import page as report
from rjepa_triton.bench.report import views
from rjepa_triton.bench.report.answers import answers
from rjepa_triton.bench.report.chart import Chart, Series

RESULTS = ROOT / "bench" / "results"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A script by which the page reports its own measures once it has been laid out.
PROBE = """<script>addEventListener("load", () => {
  const made = document.createElement("pre"); made.id = "probe";
  const figure = document.querySelector("figure"), button = figure.querySelector("button");
  const curve = figure.querySelector("g[data-curve]"), seen = () => getComputedStyle(curve).display !== "none";
  const switched = [seen()];
  for (const _ of [1, 2]) { button.click(); switched.push(seen()); }
  const point = figure.querySelector(".hit"); point.dispatchEvent(new Event("pointerenter"));
  made.textContent = JSON.stringify({
    switched, told: figure.querySelector(".told").textContent, words: point.dataset.words,
    text: Math.min(...[...document.querySelectorAll("svg.chart text")].map(t => t.getBoundingClientRect().height)),
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    pictures: [...document.images].map(image => image.naturalWidth),
    loaded: performance.getEntriesByType("resource").map(r => r.name).filter(name => !name.startsWith("data:")),
    sections: document.querySelectorAll("section").length, tables: document.querySelectorAll("table").length,
    targets: [...document.querySelectorAll("nav a")].map(a => !!document.querySelector(a.getAttribute("href"))),
  });
  document.body.append(made);
});</script>"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report.write([RESULTS], out)
    return out


def probe(page: Path, width: int, folder: Path) -> dict[str, object]:
    """The measures of the page as a browser lays it out at that width."""
    assert BROWSER is not None
    # the page goes into a frame of that width, since no browser's window is as narrow as a phone
    (folder / "page.html").write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    shell = f'<iframe id="f" width="{width}" height="800" src="page.html"></iframe>'
    tell = """<script>f.onload = () => setTimeout(() => { document.body.append(
        f.contentDocument.getElementById("probe").cloneNode(true)); }, 300);</script>"""
    (folder / "shell.html").write_text(f"<!doctype html><body>{shell}{tell}</body>")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
        (folder / "shell.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
    assert found, shown[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole_and_loads_nothing(written: Path, width: int, tmp_path: Path) -> None:
    told = probe(written / report.PAGE, width, tmp_path)
    assert told["width"] == width
    # wide pictures and tables scroll by themselves; the page doesn't
    assert told["scroll"] <= width  # type: ignore[operator]
    assert told["pictures"]
    assert all(told["pictures"])  # type: ignore[arg-type]
    assert told["loaded"] == []
    assert told["sections"] > 3  # type: ignore[operator]
    assert all(told["targets"])  # type: ignore[arg-type]
    # a button of the legend takes its curve away and brings it back; a point that is pointed at says its value
    assert told["switched"] == [True, False, True]
    assert told["told"] == told["words"]
    assert " at N = " in str(told["told"])
    assert told["text"] > 9  # type: ignore[operator] # pixels


class Balance(HTMLParser):
    """Checks that tags close in the order in which they opened."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_and_well_formed(written: Path) -> None:
    parser = Balance()
    parser.feed((written / report.PAGE).read_text())
    assert parser.open == []
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in parser.sources)
    assert "prefers-color-scheme: dark" in (written / report.PAGE).read_text()


def test_answers_are_computed_from_the_records() -> None:
    """Each number of an answer follows the records: with times of another machine it is another."""
    records = record.load_all(RESULTS)
    found = {answer.name: answer for answer in answers(records)}
    assert list(found) == ["n2", "exactness", "stream", "whom", "gpu"]
    assert all(answer.records for name, answer in found.items() if name != "gpu")
    slower = [
        replace(r, timing=replace(r.timing, median=3 * r.timing.median), payload={**r.payload, "step_seconds": 3 * r.payload["step_seconds"]})
        if r.benchmark == "peers" and r.algorithm == "stream" and r.timing else r
        for r in records
    ]  # fmt: skip
    changed = {answer.name: answer for answer in answers(slower)}
    # of two machines of one name the last record counts
    *_, step = (
        r.payload["step_seconds"] for r in records if r.algorithm == "stream" and r.params["N"] == 128
    )
    assert f"{seconds_text(step)} a step" in found["stream"].text
    assert f"{seconds_text(3 * step)} a step" in changed["stream"].text
    assert changed["whom"].text != found["whom"].text
    assert (changed["n2"].text, changed["exactness"].text) == (found["n2"].text, found["exactness"].text)
    assert [answer.name for answer in answers([])] == ["gpu"]
    on_gpu = [
        replace(r, device="NVIDIA X", params={**r.params, "device": "cuda"})
        for r in records
        if r.benchmark == "scaling"
    ]
    assert "are of NVIDIA X" in answers(on_gpu)[-1].text


def test_a_chart_puts_curves_and_guides_where_they_belong() -> None:
    chart = Chart(
        "N", "s", [Series("a", [(10.0, 1.0), (100.0, 100.0)], 0)], str, {"N²": (2, (100.0, 100.0))}, 1.0
    )
    (curve,) = chart.curves
    (_, x1, y1, x2, y2) = chart.lines[0]
    assert (x2, y2) == curve.points[-1][:2]
    assert y1 - y2 == pytest.approx(
        (curve.points[0][1] - y2) / (curve.points[0][0] - x2) * (x1 - x2), rel=0.02
    )
    assert chart.across == curve.points[0][1]
    assert curve.points[0][2] == "a: 1.0 at N = 10"
    assert all(14 <= y <= 334 and 62 <= x <= 506 for x, y, _ in curve.points)


def test_the_page_opens_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open_new_tab", lambda url: bool(opened.append(url)))
    arguments = ["report", str(RESULTS / "heads-cpu.jsonl"), "--out", str(tmp_path), "--open"]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    assert opened == [(tmp_path / report.PAGE).as_uri()]
    assert "no browser could be started" in result.output


def test_the_markdown_has_every_table_and_its_pictures(written: Path) -> None:
    text = (written / report.NOTES).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (written / target).exists(), target
    for file in record.files_of(RESULTS):
        for name, mine in views.of(record.load(file)).items():
            assert views.VIEWS[name].command in text
            for table in views.VIEWS[name].tables(mine):
                assert str(table.title) in text


def scaling(n: int, device: str = "a <machine>") -> Record:
    params = {
        "N": n,
        "B": 1,
        "T": 4,
        "C": 4,
        "backend": "auto",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return Record(
        "scaling", "rfp-dual", params, "ok", device, {"torch": "2"}, "a" * 40 + "-dirty", "2026-01-02T03", "",
        timing=Timing(1e-3 * n, 1e-3 * n, 1e-3 * n, 9), state_bytes=n, command="rjepa bench scaling --hidden '<8>'",
    )  # fmt: skip


def test_what_records_say_is_escaped_and_devices_are_apart(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    for n in (8, 16, 32):
        for device in ("a <machine>", "another"):
            record.append(file, scaling(n, device))
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')  # another program's
    arguments = ["report", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / report.PAGE).read_text()
    assert "a &lt;machine&gt;" in text
    assert "rjepa bench scaling --hidden &#39;&lt;8&gt;&#39;" in text
    assert "<machine>" not in text
    assert 'id="model"' in text
    assert "revision aaaaaaaaaa-dirty, 2026-01-02" in text
    assert [(s.device, s.stem) for s in report.sections([file])] == [
        ("a <machine>", "scaling-mine"),
        ("another", "scaling-mine-2"),
    ]
    assert len(list((tmp_path / "out").glob("*.svg"))) == 2


@pytest.mark.parametrize("fault", ["nothing", "missing", "newer"])
def test_what_cannot_be_shown_is_an_error_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "mine.jsonl"
    if fault == "newer":
        record.append(file, replace(scaling(8), schema=record.SCHEMA + 1))
    elif fault == "nothing":
        record.append(file, replace(scaling(8), benchmark="theory"))
    result = CliRunner().invoke(bench, ["report", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    wanted = {
        "nothing": "have no records of",
        "missing": "No such file",
        "newer": "a newer rjepa-triton wrote it",
    }
    assert wanted[fault] in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_page_before(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / report.PAGE
    page.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.write([RESULTS / "heads-cpu.jsonl"], tmp_path)
    monkeypatch.undo()
    assert page.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == [report.PAGE]
