"""The command `rjepa cells`: which cells there are, and what was made of one. It imports what it needs when it runs."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._command import user_errors

if TYPE_CHECKING:
    from ..cells.two_point import Cell

cells = typer.Typer(
    no_args_is_help=True, help="Cells: those that are built in; equations, partials, generated code."
)

LANGUAGES = ("cpp",)


def built_in() -> dict[str, Cell]:
    """The built-in layers' cells, by the layer's name."""
    from . import named

    names = [name for name in named.__all__ if name != "TwoPointRNN"]
    return {name: getattr(named, name)(input_size=1, hidden_size=1).cell for name in names}


def find(name: str) -> Cell:
    """The cell of a name such as "lstm", "LSTM" or "LSTMCell", or of "module:Class" or "module:instance".

    Raises ValueError if there is none, or it can't be made, or isn't a two-point cell.
    """
    if ":" in name:
        return _of_a_user(name)
    known = built_in()
    asked = name.lower().removesuffix("cell")
    for layer, cell in known.items():
        if asked in (layer.lower(), type(cell).__name__.lower().removesuffix("cell")):
            return cell
    raise ValueError(
        f"NAME must be a built-in layer or cell, or module:Class of your own, got {name!r}; there are "
        f"{', '.join(known)}"
    )


def _of_a_user(name: str) -> Cell:
    import importlib

    from ..cells.two_point import Cell, verify
    from .layer import TwoPointRNN

    place, _, wanted = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a module beside the user, as `python -m` finds it
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ValueError(f"module {place!r} can't be imported: {type(error).__name__}: {error}") from error
    finally:
        with suppress(ValueError):  # the module may have taken it away
            sys.path.remove(here)
    found = getattr(module, wanted, None)
    if isinstance(found, type) and issubclass(found, Cell):
        try:
            found = found()
        except Exception as error:
            raise ValueError(
                f"{name} can't be made without arguments ({type(error).__name__}: {error}): name an instance of it"
            ) from error
    if isinstance(found, TwoPointRNN):
        found = found.cell
    if not isinstance(found, Cell):
        there = [
            key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Cell)
        ]
        kind = "nothing" if found is None else getattr(found, "__name__", type(found).__name__)
        raise ValueError(f"{name} must be a Cell, got {kind}; cells in {place}: {', '.join(there) or 'none'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a cell can't be traced is printed with it
            verify(found)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    return found


def compiled(cell: Cell) -> str:
    """Whether C++ serves a cell on the CPU, or why not."""
    from ..backend.native import library
    from ..cells.trace import why_not

    if reason := why_not(cell):
        return f"no, torch runs it: {reason}"
    if library.compiler() is None:
        return "no, torch runs it: no C++ compiler (g++, clang++ or c++) was found"
    return "yes, C++ for the CPU, in float32 and float64, built on first use"


@cells.command("list")
def list_command() -> None:
    """List the built-in layers and their cells."""
    with user_errors():
        for layer, cell in built_in().items():
            typer.echo(
                f"{layer:10} {type(cell).__name__:14} states {', '.join(cell.states):8}  "
                f"matrices {', '.join(matrix.name for matrix in cell.matrices) or 'none'}"
            )


@cells.command("show")
def show_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Built-in layer or cell, such as lstm; or module:Class of your own."
        ),
    ],
    code: Annotated[str, typer.Option(help=f"Also print the generated code: {', '.join(LANGUAGES)}.")] = "",
) -> None:
    """Print a cell's equations, its partials, which are zero by structure, and whether it is compiled."""
    with user_errors():
        from .. import _checks as check
        from ..backend.native import generated
        from ..cells.text import described

        if code:
            check.one_of("--code", code, LANGUAGES)
        cell = find(name)
        typer.echo(described(cell))
        typer.echo(f"\ncompiled    {compiled(cell)}")
        if code:
            text = generated.source(cell)
            if text is None:
                raise ValueError(f"--code {code}: there is no generated code of a cell that can't be traced")
            typer.echo(f"\n{text}", nl=False)
