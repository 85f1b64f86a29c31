"""`rjepa bench`: its commands, each of which is a module's `run` with options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .. import _checks as check
from .._command import user_errors
from ..backends import dispatch as ops
from ..planning import devices
from .harness import compare, inputs, record
from .harness.tables import place
from .harness.terminal import print_tables, show
from .kernels import cases as kernel_cases
from .kernels import roofline, targets
from .kernels import timing as kernels
from .learning import fidelity, frontier, learn, tasks
from .peers import registry as peer_registry
from .peers import run as peers
from .peers import tasks as peer_tasks
from .planner import plan
from .report import gpu_check, suite, views
from .report import page as report
from .scaling import cases, forward, memory, plot, selfcheck
from .scaling import tables as scaling_tables
from .scaling import timing as scaling
from .streams import online

bench = typer.Typer(no_args_is_help=True, help="Time, memory and fidelity of the learning rules.")
OUT = Path("bench-out")

# Options that several commands have.
Hidden = Annotated[str, typer.Option(help="N, with commas between; the defaults if left out.")]
Batch = Annotated[str, typer.Option(help="B, with commas between; 1 if only --hidden is given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:<index>, or auto: cuda where there is one")]
Threads = Annotated[int, typer.Option(help="CPU threads; torch's own choice if 0.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete earlier records first.")]
Sample = Annotated[float, typer.Option(help="Seconds that a case is sampled at a point, in all passes.")]
Passes = Annotated[int, typer.Option(help="Processes, one after the other, that each time every point.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]


def integers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of a text such as 32,64. Raises ValueError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--{name} must be integers, such as 32,64, got {text!r}") from None


def _text(numbers: Sequence[int]) -> str:
    """The text that `integers` reads as these."""
    return ",".join(map(str, numbers))


def names(text: str) -> tuple[str, ...]:
    """The names of a text such as rfp,rtrl."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def use_threads(threads: int) -> None:
    """Set torch's threads, if any are given. Raises ValueError for fewer than 0."""
    if check.integer("--threads", threads, 0):
        torch.set_num_threads(threads)


def chosen_device(text: str) -> str:
    """The device of the option: "auto" is cuda where there is one. Raises ValueError for one that can't be used."""
    device = scaling.default_device() if text == "auto" else text
    scaling.check_device(device)
    return device


def file_in(out: Path, name: str, fresh: bool) -> Path:
    """The file of records `name` in a folder, which is made; without what it had if `fresh`."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / name
    if fresh:
        file.unlink(missing_ok=True)
    return file


def tell_files(records: Sequence[record.Record], file: Path, markdown: bool = False) -> None:
    """Draw what the records show, and say where records and pictures are: on stderr where stdout has Markdown."""
    says = any(views.VIEWS[name].says_something(mine) for name, mine in views.of(records).items())
    drawn = views.draw(records, file) if says else []
    for kind, path in (("records", file), *(("plot", path) for path in drawn)):
        typer.echo(f"{kind + ':':8} {path}", err=markdown)


@bench.command("scaling")
def scaling_command(
    hidden: Hidden = "",
    batch: Batch = "",
    steps: Annotated[int, typer.Option(help="T.")] = 50,
    chunk: Annotated[int, typer.Option(help="C, steps a chunk of rfp-chunk.")] = 16,
    dtype: Annotated[str, typer.Option(help=", ".join(cases.DTYPES))] = "float32",
    device: Device = "auto",
    algorithms: Annotated[str, typer.Option(help=", ".join(cases.CASES))] = ",".join(cases.DEFAULT),
    input: Annotated[str, typer.Option(help=", ".join(inputs.INPUTS))] = "photo",
    scale: Annotated[float, typer.Option(help="c in W ~ c·N(0, 1)/√N.")] = 0.1,
    backend: Annotated[str, typer.Option(help=f"What runs Γ: {', '.join(ops.BACKENDS)}")] = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    budget: Annotated[float, typer.Option(help="Seconds a case may take at a point, as predicted.")] = 30,
    sample: Sample = 0.5,
    passes: Passes = 3,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of scaling.jsonl.")] = OUT,
) -> None:
    """Time per step and memory of every algorithm against N.

    Goes on where an earlier run with the same options stopped; what it measured is kept.
    """
    with user_errors():
        use_threads(threads)
        settings = scaling.Settings(
            points=scaling.points(integers("hidden", hidden), integers("batch", batch)),
            algorithms=names(algorithms),
            steps=steps,
            chunk=chunk,
            dtype=dtype,
            device=chosen_device(device),
            input=input,
            scale=scale,
            backend=backend,
            seed=check.integer("--seed", seed, 0),
            budget=budget,
            case_seconds=sample,
            passes=passes,
        )
        file = file_in(out, scaling.FILE, fresh)
        records = scaling.run(settings, file, Console(stderr=True))
        show(scaling_tables.tables(records))
        typer.echo(f"records: {file}")
        for batch in sorted({r.params["B"] for r in records}):
            here = [r for r in records if r.params["B"] == batch]
            for written in plot.draw(here, file.with_name(f"{file.stem}-B{batch}")):
                typer.echo(f"plot:    {written}")


@bench.command("table")
def table_command(
    file: Annotated[Path, typer.Argument(help="Records of any benchmark.")] = OUT / scaling.FILE,
    markdown: Markdown = False,
) -> None:
    """Print the tables of a file of records."""
    with user_errors():
        print_tables(views.tables(record.load(file)), markdown)


@bench.command("plot")
def plot_command(
    file: Annotated[Path, typer.Argument(help="Records of any benchmark that has a picture.")] = OUT
    / scaling.FILE,
    batch: Annotated[int, typer.Option(help="Of `scaling` the one B to draw; each with 3 N if 0.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to; beside the records if left out.")] = None,
) -> None:
    """Draw what a file of records shows, as PNG and SVG."""
    with user_errors():
        records = record.load(file)
        if batch:
            check.one_of(
                "--batch", batch, sorted({r.params["B"] for r in records if r.benchmark == "scaling"})
            )
            records = [r for r in records if r.benchmark == "scaling" and r.params["B"] == batch]
        target = file.with_suffix("") if out is None else out
        target.parent.mkdir(parents=True, exist_ok=True)
        for written in views.draw(records, target):
            typer.echo(written)


@bench.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(help="Records of before.")],
    b: Annotated[Path, typer.Argument(help="Records of after.")],
    floor: Annotated[
        float, typer.Option(help="Changes up to this fraction count as noise, beside what the machine did.")
    ] = compare.FLOOR,
) -> None:
    """What became faster or slower from A to B, beyond noise; versions may differ."""
    with user_errors():
        found = compare.compare(record.load(a), record.load(b), floor)
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


@bench.command("selfcheck")
def selfcheck_command(
    runs: Annotated[int, typer.Option(help="How often the sweep runs.")] = 21,
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = "128,256,384,512,768,1024,1536",
    batch: Annotated[int, typer.Option(help="B.")] = 1,
    algorithms: Annotated[
        str, typer.Option(help=", ".join(cases.CASES))
    ] = "rfp-step,rfp-step-gamma,rfp-chunk,rfp-dual,bptt,bptt-autograd",
    device: Device = "auto",
    threads: Threads = 0,
    sample: Sample = 0.5,
    passes: Passes = 3,
    markdown: Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of selfcheck.jsonl, and of the runs' own files.")] = OUT,
) -> None:
    """The scaling sweep again and again: changes that `compare` sees where there are none, and slopes that repeat.

    Goes on where an earlier one with the same options stopped.
    """
    with user_errors():
        use_threads(threads)
        settings = scaling.Settings(
            points=scaling.points(integers("hidden", hidden), (batch,)),
            algorithms=names(algorithms),
            device=chosen_device(device),
            case_seconds=sample,
            passes=passes,
        )
        progress = Console(stderr=True)
        made = selfcheck.run(settings, runs, out, lambda line: progress.print(line, highlight=False))
        print_tables([selfcheck.table(made)], markdown)
        for change in (change for r in made for change in r.payload["changes"]):
            typer.echo(f"seen as a change: {change}", err=markdown)


@bench.command("plan")
def plan_command(
    hidden: Annotated[int | None, typer.Option(help="N, units of the layer.")] = None,
    batch: Annotated[int, typer.Option(help="B, rows.")] = 1,
    steps: Annotated[int | None, typer.Option(help="T; a stream without end if left out.")] = None,
    chunk: Annotated[int, typer.Option(help="C, steps for which the weights may stay as they are.")] = 16,
    cell: Annotated[str, typer.Option(help=", ".join(plan.CELLS))] = "rgc",
    input_size: Annotated[
        int | None, typer.Option(help="I, features of the input; if left out N, and an RGC takes x itself.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(plan.DTYPES))] = "float32",
    gamma_dtype: Annotated[
        str | None,
        typer.Option(help=f"What Γ is kept in: {', '.join(plan.GAMMA_DTYPES)}; --dtype if left out."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help=f"{plan.HERE}, measured in some seconds; {', '.join(devices.known())}; or a .json of --save."
        ),
    ] = plan.HERE,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Steps of rfp-step as a CUDA graph.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Advise ways whose gradient is exact alone.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the device's profile to this JSON file.")] = None,
    check_against: Annotated[
        Path | None,
        typer.Option("--check", help="Hold the model against records, of a file or folder, and stop."),
    ] = None,
    markdown: Markdown = False,
) -> None:
    """What each algorithm and form would cost on a device, which fit, and which to take: all predicted."""
    with user_errors():
        if check_against is not None:
            print_tables([plan.check_table(plan.against(record.load_all(check_against)))], markdown)
            return
        if hidden is None:
            raise ValueError("--hidden must be given: N, units of the layer, at least 1, got nothing")
        question = plan.Question(
            hidden, batch, steps, chunk, cell, input_size, dtype, gamma_dtype, cuda_graph, exact
        )
        chosen = plan.device_of(device)
        if save is not None:
            plan.save(chosen, save)
        found = plan.predictions(question, chosen)
        shown = plan.table(question, chosen, found)
        print_tables([shown], markdown)
        if markdown:  # which has no captions
            typer.echo(f"\n{shown.caption}\n")
        typer.echo(plan.advise(question, chosen, found).text)


@bench.command("fidelity")
def fidelity_command(
    sweeps: Annotated[
        str, typer.Option(help="Which, with commas between: " + ", ".join(fidelity.SWEEPS))
    ] = ",".join(fidelity.SWEEPS),
    seeds: Annotated[int, typer.Option(help="Seeds a mean is of; each sweep's own if 0.")] = 0,
    markdown: Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of fidelity.jsonl and the plot.")] = OUT,
) -> None:
    """Each learning rule's gradient against the exact one, and what it costs: tables and the frontier's plot."""
    with user_errors():
        out.mkdir(parents=True, exist_ok=True)
        chosen = names(sweeps)
        settings = fidelity.Settings(chosen, seeds or None)
        progress = Console(stderr=True)
        records = fidelity.run(settings, out / fidelity.FILE, progress.print)
        if markdown:
            for table in fidelity.all_rows(records):
                typer.echo(f"{table[0]}\n\n{fidelity.markdown(table)}\n")
        else:
            show(fidelity.tables(records))
        if "frontier" in chosen:
            frontier.draw(records, out / "fidelity.png")


@bench.command("learn")
def learn_command(
    which: Annotated[str, typer.Option("--tasks", help=", ".join(tasks.TASKS))] = ",".join(tasks.TASKS),
    rules: Annotated[str, typer.Option(help=", ".join(learn.RULES))] = ",".join(learn.RULES),
    seeds: Annotated[int, typer.Option(help="How many seeds the means are of, at least 2.")] = 5,
    steps: Annotated[int, typer.Option(help=f"T, a multiple of {learn.WINDOWS} · C.")] = 1600,
    hidden: Annotated[int, typer.Option(help=f"N, a multiple of {learn.HEADS}, the heads.")] = 16,
    batch: Annotated[int, typer.Option(help="B, rows of the stream.")] = 8,
    chunk: Annotated[int, typer.Option(help="C, steps between updates of the rules that take chunks.")] = 4,
    jobs: Annotated[int, typer.Option(help="Processes, of one thread each; one a core if 0.")] = 0,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of learn.jsonl and the plot.")] = OUT,
) -> None:
    """What each rule learns online, on the CPU: loss curves, final losses with intervals over seeds.

    Goes on where an earlier run with the same options stopped; what it made is kept.
    """
    with user_errors():
        settings = learn.Settings(
            tasks=names(which),
            rules=names(rules),
            seeds=seeds,
            steps=steps,
            hidden=hidden,
            batch=batch,
            chunk=chunk,
            jobs=check.integer("--jobs", jobs, 0) or learn.default_jobs(),
        )
        file = file_in(out, learn.FILE, fresh)
        records = learn.run(settings, file, Console(stderr=True))
        print_tables(learn.tables(records), markdown)
        tell_files(records, file, markdown)


@bench.command("forward")
def forward_command(
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = "64,256",
    batch: Annotated[str, typer.Option(help="B, with commas between.")] = "1,8",
    steps: Annotated[str, typer.Option(help="T, with commas between.")] = "1024,4096",
    cells: Annotated[str, typer.Option(help="Which, with commas between.")] = ",".join(forward.CELLS),
    scale: Annotated[float, typer.Option(help="c in W ~ c·N(0, 1)/√N.")] = 0.1,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    budget: Annotated[
        float, typer.Option(help="Seconds a call may take; one that takes longer isn't timed.")
    ] = 3,
    sample: Annotated[float, typer.Option(help="Seconds that each is sampled at a point.")] = 0.2,
    markdown: Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of forward.jsonl.")] = OUT,
) -> None:
    """The forward pass in parallel in time against the loop, timed here; and a training step predicted for a GPU."""
    with user_errors():
        use_threads(threads)
        settings = forward.Settings(
            hidden=integers("hidden", hidden),
            batches=integers("batch", batch),
            steps=integers("steps", steps),
            cells=names(cells),
            scale=scale,
            device=chosen_device(device),
            seed=check.integer("--seed", seed, 0),
            budget=budget,
            case_seconds=sample,
        )
        out.mkdir(parents=True, exist_ok=True)
        file = out / forward.FILE
        records = forward.run(file, settings)
        predicted = forward.record_prediction(file, scale, seed)
        if markdown:
            typer.echo(f"{forward.markdown(records)}\n\n{forward.predicted_markdown(predicted)}")
        else:
            show([forward.table(records), forward.predicted_table(predicted)])
        typer.echo(f"records: {file}", err=markdown)


@bench.command("online")
def online_command(
    hidden: Hidden = "",
    batch: Batch = "",
    forms: Annotated[
        str, typer.Option(help=f"{', '.join(online.FORMS)}; the device's defaults if left out.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Steps that each is timed for.")] = online.LEAST_STEPS,
    chunk: Annotated[int, typer.Option(help="C, steps between updates of the forms that take chunks.")] = 16,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    budget: Annotated[float, typer.Option(help="Seconds a form may take at a point.")] = 120,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of online.jsonl and the plot.")] = OUT,
) -> None:
    """Latency of one whole online step, each timed by itself: percentiles, throughput, energy.

    Goes on where an earlier run with the same options stopped; what it measured is kept.
    """
    with user_errors():
        use_threads(threads)
        where = chosen_device(device)
        kind = torch.device(where).type
        given = integers("hidden", hidden), integers("batch", batch)
        settings = online.Settings(
            points=scaling.points(*given, default=online.POINTS[kind]),
            forms=names(forms) or online.DEFAULT_FORMS[kind],
            steps=steps,
            chunk=chunk,
            device=where,
            seed=check.integer("--seed", seed, 0),
            budget=budget,
        )
        file = file_in(out, online.FILE, fresh)
        records = online.run(settings, file, Console(stderr=True))
        print_tables([online.table(records)], markdown)
        tell_files(records, file, markdown)


@bench.command("memory")
def memory_command(
    steps: Annotated[str, typer.Option(help="T, with commas between.")] = _text(memory.SWEEPS["T"]),
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = _text(memory.SWEEPS["N"]),
    batch: Annotated[str, typer.Option(help="B, with commas between.")] = _text(memory.SWEEPS["B"]),
    base: Annotated[str, typer.Option(help="N,B,T: what stays as it is while another is swept.")] = _text(
        tuple(memory.BASE.values())
    ),
    chunk: Annotated[int, typer.Option(help="C of the cases that take chunks.")] = 16,
    algorithms: Annotated[str, typer.Option(help=", ".join(cases.CASES))] = ",".join(memory.ALGORITHMS),
    device: Device = "auto",
    backend: Annotated[str, typer.Option(help=f"What runs Γ: {', '.join(ops.BACKENDS)}")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds a case may take at a point.")] = 10,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of memory.jsonl and the plot.")] = OUT,
) -> None:
    """Peak memory against T, N and B, measured and predicted, and where BPTT's passes the others'.

    Goes on where an earlier run with the same options stopped; what it measured is kept.
    """
    with user_errors():
        fixed = integers("base", base)
        if len(fixed) != len(memory.BASE):
            raise ValueError(f"--base must be N,B,T, such as 128,8,128, got {base!r}")
        settings = memory.Settings(
            sweeps={
                "T": integers("steps", steps),
                "N": integers("hidden", hidden),
                "B": integers("batch", batch),
            },
            base=dict(zip(memory.BASE, fixed, strict=True)),
            algorithms=names(algorithms),
            chunk=chunk,
            device=chosen_device(device),
            backend=backend,
            budget=budget,
        )
        file = file_in(out, memory.FILE, fresh)
        records = memory.run(settings, file, Console(stderr=True))
        print_tables(memory.tables(records), markdown)
        tell_files(records, file, markdown)


@bench.command("peers")
def peers_command(
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = "64,256",
    batch: Annotated[str, typer.Option(help="B, with commas between.")] = "1",
    steps: Annotated[int, typer.Option(help="T.")] = 50,
    which: Annotated[str, typer.Option("--tasks", help=", ".join(peer_tasks.TASKS))] = ",".join(
        peer_tasks.TASKS
    ),
    chosen: Annotated[str, typer.Option("--peers", help=", ".join(peer_registry.PEERS))] = ",".join(
        peer_registry.PEERS
    ),
    threads: Annotated[int, typer.Option(help="CPU threads of each peer; torch's own choice if 0.")] = 0,
    device: Device = "auto",
    input: Annotated[str, typer.Option(help=", ".join(inputs.INPUTS))] = "photo",
    scale: Annotated[float, typer.Option(help="c in RGC's W ~ c·N(0, 1)/√N.")] = 0.1,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(help="Samples of each peer, taken in turn.")] = 25,
    sample: Annotated[float, typer.Option(help="Seconds that a sample takes at least.")] = 0.02,
    limit: Annotated[
        float, typer.Option(help="Seconds a peer may take for its first gradient, compilation included.")
    ] = 300,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of peers.jsonl.")] = OUT,
) -> None:
    """The same gradient from what else one could pick, each checked, each in a process of its own, timed in turn.

    Goes on where an earlier run with the same options stopped; what it measured is kept.
    """
    with user_errors():
        settings = peers.Settings(
            tasks=names(which),
            peers=names(chosen),
            hidden=integers("hidden", hidden),
            batches=integers("batch", batch),
            steps=steps,
            threads=check.integer("--threads", threads, 0) or torch.get_num_threads(),
            device=chosen_device(device),
            input=input,
            scale=scale,
            seed=check.integer("--seed", seed, 0),
            rounds=rounds,
            sample_seconds=sample,
            limit=limit,
        )
        file = file_in(out, peers.FILE, fresh)
        records = peers.report(settings, file, Console(stderr=True))
        print_tables(peers.tables(records), markdown)
        tell_files(records, file, markdown)


@bench.command("kernels")
def kernels_command(
    hidden: Hidden = "",
    batch: Batch = "",
    steps: Annotated[int, typer.Option(help="T of the scans.")] = 64,
    which: Annotated[str, typer.Option("--kernels", help="Which, with commas between.")] = ",".join(
        kernel_cases.KERNELS
    ),
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    sample: Annotated[float, typer.Option(help="Seconds that each is sampled at a point.")] = 0.3,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of kernels.jsonl.")] = OUT,
) -> None:
    """Time of each kernel against the least that its bytes and FLOP allow on this device.

    Goes on where an earlier run with the same options stopped; what it measured is kept.
    """
    with user_errors():
        use_threads(threads)
        where = chosen_device(device)
        settings = kernels.Settings(
            points=scaling.points(
                integers("hidden", hidden),
                integers("batch", batch),
                default=kernels.POINTS[torch.device(where).type],
            ),
            kernels=names(which),
            steps=steps,
            device=where,
            seed=check.integer("--seed", seed, 0),
            case_seconds=sample,
        )
        file = file_in(out, kernels.FILE, fresh)
        records = kernels.run(settings, file, Console(stderr=True))
        show([kernels.table(records)])
        tell_files(records, file)


@bench.command("roofline")
def roofline_command(
    predict: Annotated[
        bool, typer.Option("--predict", help="Compile for --gpu and predict; no GPU is needed.")
    ] = False,
    gpu: Annotated[str, typer.Option(help=f"With --predict: {', '.join(roofline.GPUS)}")] = "h100",
    hidden: Annotated[str, typer.Option(help="With --predict: N, with commas between.")] = "",
    batch: Annotated[str, typer.Option(help="With --predict: B, with commas between.")] = "",
    steps: Annotated[int, typer.Option(help="With --predict: T of the scans.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of kernels.jsonl, or of roofline.jsonl.")] = OUT,
) -> None:
    """Kernels against the roofline: what `rjepa bench kernels` measured, or with --predict a prediction."""
    with user_errors():
        if not predict:
            if not (out / kernels.FILE).exists():
                raise ValueError(
                    f"{out / kernels.FILE} isn't there: run `rjepa bench kernels` first, or give --predict"
                )
            measured = record.latest(r for r in record.load(out / kernels.FILE) if r.benchmark == "kernels")
            show([kernels.table([r for r in measured if r.device == name]) for name in
                  sorted({r.device for r in measured})])  # fmt: skip
            return
        out.mkdir(parents=True, exist_ok=True)
        sizes = (integers("hidden", hidden), integers("batch", batch))
        file = out / roofline.FILE
        show(roofline.tables(roofline.run(file, gpu, roofline.points(*sizes), steps)))
        typer.echo(f"records: {file}")


@bench.command("targets")
def targets_command(
    results: Annotated[
        Path | None, typer.Argument(help="Folder of a GPU's records, to be shown beside predictions.")
    ] = None,
    gpu: Annotated[str, typer.Option(help=", ".join(roofline.GPUS))] = "h100",
    markdown: Markdown = False,
) -> None:
    """What the kernels are meant to reach on a GPU: predicted, and beside it what was measured on one."""
    with user_errors():
        measured = [] if results is None else record.load_all(results)
        print_tables(
            [targets.table(gpu, [r for r in measured if r.params.get("device") == "cuda"])], markdown
        )


@bench.command("all")
def all_command(
    budget: Annotated[str, typer.Option(help="Time for all, such as 8min, 90s or 1h.")] = "8min",
    device: Device = "auto",
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="Folder of records, logs, summary.json and report/.")] = OUT,
) -> None:
    """Every benchmark within a time, what says the most first, and the report of it.

    Goes on where an earlier run in the same folder stopped. Exit code 1 if a stage failed.
    """
    with user_errors():
        code, written = suite.run(
            suite.seconds_of(budget),
            out,
            device=chosen_device(device),
            threads=check.integer("--threads", threads, 0),
            tell=lambda line: typer.echo(line, err=True),
        )
        for path in written:
            typer.echo(path)
        raise typer.Exit(code)


@bench.command("report")
def report_command(
    records: Annotated[
        list[Path] | None, typer.Argument(help="Files of records, or folders of them.", show_default=str(OUT))
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of index.html, report.md and pictures; bench-out/report if left out."),
    ] = None,
) -> None:
    """One self-contained HTML page, and Markdown, of all records: pictures, tables, and what is behind each."""
    with user_errors():
        for written in report.write(records or [OUT], OUT / "report" if out is None else out):
            typer.echo(written)


@bench.command("gpu-check")
def gpu_check_command(
    out: Annotated[Path, typer.Option(help="Folder of logs, records, plots and summary.json.")] = OUT,
) -> None:
    """On a machine with a GPU, from a checkout: tests and benchmarks in under 9 minutes; 2 without a GPU."""
    with user_errors():
        raise typer.Exit(gpu_check.check(out))
