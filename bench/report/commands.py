"""The commands of this wing: `rjepa bench table`, `plot`, `compare`, `compare-revisions`, `all`, `report` and more."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ... import _checks as check
from ..harness import compare, history, options, record, revisions
from ..harness.tables import place
from ..harness.terminal import print_tables, show
from ..scaling import timing as scaling
from . import gpu_check, page, suite, views


def _records(file: Path) -> list[record.Record]:
    """The records of a file. Raises ValueError if it has none."""
    found = record.load(file)
    if not found:
        raise ValueError(f"{file} has no records")
    return found


def table_command(
    file: Annotated[Path, typer.Argument(help="Records of any benchmark.")] = options.OUT / scaling.FILE,
    markdown: options.Markdown = False,
) -> None:
    """Print the tables of a file of records."""
    print_tables(views.tables(_records(file)), markdown)


def plot_command(
    file: Annotated[Path, typer.Argument(help="Records of any benchmark that has a picture.")] = options.OUT
    / scaling.FILE,
    batch: Annotated[
        int, typer.Option(help="With records of `scaling`, the B to draw; if 0, each that has 3 N.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Path of the picture; beside the records if left out.")
    ] = None,
) -> None:
    """Draw what a file of records shows, as PNG and SVG."""
    records = _records(file)
    if batch:
        check.one_of("--batch", batch, sorted({r.params["B"] for r in records if r.benchmark == "scaling"}))
        records = [r for r in records if r.benchmark == "scaling" and r.params["B"] == batch]
    target = file.with_suffix("") if out is None else out
    target.parent.mkdir(parents=True, exist_ok=True)
    for written in views.draw(records, target):
        typer.echo(written)


def compare_command(
    a: Annotated[Path, typer.Argument(help="File of the records before.")],
    b: Annotated[Path, typer.Argument(help="File of the records after.")],
    floor: Annotated[
        float,
        typer.Option(help="Changes up to this fraction count as noise, beside what the machine explains."),
    ] = compare.FLOOR,
) -> None:
    """Show what became faster or slower from A to B by more than noise explains; versions may differ."""
    found = compare.compare(_records(a), _records(b), floor)
    show([compare.table(found)])
    for file, only in ((a, found.only_a), (b, found.only_b)):
        for r in only:
            typer.echo(f"only in {file}: {place(r)}")
    beyond = [change for change in found.changes if change.beyond_noise]
    slower = sum(change.ratio > 1 for change in beyond)
    typer.echo(
        f"{len(found.changes)} matched: {slower} slower, {len(beyond) - slower} faster, "
        f"{len(found.changes) - len(beyond)} the same within noise"
    )


def history_command(
    paths: Annotated[list[Path], typer.Argument(help="Files of records, or folders of them, of many runs.")],
    floor: Annotated[float, typer.Option(help="Smaller changes are not told.")] = history.FLOOR,
    markdown: options.Markdown = False,
) -> None:
    """Show at which run a case became faster or slower and stayed so, of ten runs or more."""
    records = [r for path in paths for file in record.files_of(path) for r in record.load(file)]
    found = history.histories(records, floor)
    if not found:
        raise ValueError(
            f"{', '.join(map(str, paths))} must have at least {history.FEWEST} runs of a case, got fewer of each"
        )
    print_tables([history.table(found)], markdown)


def compare_revisions_command(
    a: Annotated[str, typer.Argument(help="Revision before, such as main or HEAD~1.")],
    b: Annotated[str, typer.Argument(help="Revision after.")] = "HEAD",
    repository: Annotated[Path, typer.Option(help="Folder in the git repository.")] = Path(),
    cases: Annotated[
        Path, typer.Option(help="Python file with CASES: name -> function that makes what is called.")
    ] = revisions.CASES,
    only: Annotated[str, typer.Option(help="Names of cases, with commas between; all if left out.")] = "",
    count: Annotated[str, typer.Option(help="Count `instructions` in place of time.")] = "",
    processes: Annotated[int, typer.Option(help="Pairs of processes.")] = 5,
    rounds: Annotated[int, typer.Option(help="Samples of each case in each pair of processes.")] = 11,
    floor: Annotated[
        float | None,
        typer.Option(help="Changes up to this fraction count as noise: 0.03 of time, 0.002 of instructions."),
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for traces of torch's profiler.")] = None,
    markdown: options.Markdown = False,
) -> None:
    """Build two revisions in worktrees, run the same cases of both in turn, and say what changed."""
    settings = revisions.Settings(
        a, b, repository, cases, options.names(only), count, processes, rounds, floor=floor
    )
    found = revisions.run(settings, profile=profile, tell=lambda line: typer.echo(line, err=True))
    print_tables([revisions.table(settings, found)], markdown)


def all_command(
    budget: Annotated[str, typer.Option(help="Total time, such as 8min, 90s or 1h.")] = "8min",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of records, logs, summary.json and report/.")
    ] = options.OUT,
) -> None:
    """Run every benchmark within a total time, the most telling points first, and write the report.

    The command continues where an earlier run in the same folder stopped. Exit code 1 if a stage failed.
    """
    code, written = suite.run(
        suite.seconds_of(budget),
        out,
        device=options.chosen_device(device),
        threads=check.integer("--threads", threads, 0),
        tell=lambda line: typer.echo(line, err=True),
    )
    for path in written:
        typer.echo(path)
    raise typer.Exit(code)


def report_command(
    records: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of records, or folders of them.", show_default=str(options.OUT)),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of index.html, report.md and pictures; bench-out/report if left out."),
    ] = None,
    show_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Write all records as one self-contained HTML page, and as Markdown: pictures, tables, and their sources."""
    files = page.write(records or [options.OUT], options.OUT / "report" if out is None else out)
    for written in files:
        typer.echo(written)
    if show_page and not webbrowser.open_new_tab(files[0].resolve().as_uri()):
        typer.echo(f"no browser could be started: open {files[0]} in one", err=True)


def gpu_check_command(
    out: Annotated[
        Path, typer.Option(help="Folder of results.md, summary.json, results.tar.gz.")
    ] = options.OUT,
) -> None:
    """Run tests and benchmarks on a GPU, from a checkout, in at most 7 minutes. Exit code 2 without a GPU.

    A rerun into the same folder goes on where the last one stopped. REHEARSE=1 runs all of it on the CPU.
    """
    raise typer.Exit(gpu_check.check(out))
