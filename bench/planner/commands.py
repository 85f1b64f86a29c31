"""The command of this wing: `rjepa bench plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ... import _files
from ...planning import devices
from ..harness import options, record
from ..harness.terminal import print_tables
from . import plan, scale
from .check import errors


def plan_command(
    hidden: Annotated[int | None, typer.Option(help="N, units of the layer.")] = None,
    batch: Annotated[int, typer.Option(help="B, rows of the batch.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="T, steps of the sequence; a stream without end if left out.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="C, steps for which the weights may stay as they are.")] = 16,
    cell: Annotated[str, typer.Option(help=", ".join(plan.CELLS))] = "rgc",
    input_size: Annotated[
        int | None, typer.Option(help="I, features of the input; if left out, N, and an RGC takes x itself.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(plan.DTYPES))] = "float32",
    gamma_dtype: Annotated[
        str | None,
        typer.Option(help=f"Dtype in which Γ is kept: {', '.join(plan.GAMMA_DTYPES)}; --dtype if left out."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help=f"{plan.HERE}, measured in some seconds; {', '.join(devices.known())}; or a .json of --save."
        ),
    ] = plan.HERE,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Run steps of rfp-step as a CUDA graph.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Advise only ways whose gradient is exact.")] = False,
    heads: Annotated[
        int | None, typer.Option(help="Blocks of the recurrent weights; dense if left out.")
    ] = None,
    population: Annotated[int, typer.Option(help="P, independent networks of one Stream.")] = 1,
    block: Annotated[
        int | None, typer.Option(help="b, units of a block: RTRL within blocks is predicted too.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the device's profile, or with --check the errors, to this JSON file."),
    ] = None,
    check_against: Annotated[
        Path | None,
        typer.Option("--check", help="Only compare the model with the records of a file or folder."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="R: predict rows on 1, 2, 4, … up to R ranks with such a device each, instead."),
    ] = None,
    link: Annotated[float, typer.Option(help="With --ranks: GB/s that a rank receives.")] = 50.0,
    latency: Annotated[float, typer.Option(help="With --ranks: µs of one message between ranks.")] = 5.0,
    plot: Annotated[
        Path | None, typer.Option(help="With --ranks: draw them too, as PNG and SVG of this name.")
    ] = None,
    markdown: options.Markdown = False,
) -> None:
    """Predict what each algorithm and form would cost on a device, which fit, and which to take."""
    if check_against is not None:
        checked = plan.against(record.load_all(check_against))
        print_tables([plan.check_table(checked)], markdown)
        if save is not None:
            _files.write_text(save, json.dumps(errors(checked), indent=1) + "\n")
        return
    if hidden is None:
        raise ValueError("--hidden must be given: N, units of the layer, at least 1, got nothing")
    question = plan.Question(
        hidden,
        batch,
        steps,
        chunk,
        cell,
        input_size,
        dtype,
        gamma_dtype,
        cuda_graph,
        exact,
        heads,
        population,
        block,
    )
    chosen = plan.device_of(device)
    if save is not None:
        plan.save(chosen, save)
    if ranks is not None:
        joined = scale.link_of(link, latency)
        print_tables(scale.tables(question, chosen, ranks, joined), markdown)
        if plot is not None:
            from . import scale_plot

            for written in scale_plot.draw(question, chosen, ranks, joined, plot):
                typer.echo(f"wrote {written}")
        return
    found = plan.predictions(question, chosen)
    print_tables([plan.table(question, chosen, found)], markdown)
    typer.echo(plan.advise(question, chosen, found).text)
