"""`rjepa cells`: what it shows of built-in cells and of a user's, and how bad input ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rjepa_triton import nn
from rjepa_triton.backend.native import generated, library
from rjepa_triton.cells.builtin import GRUCell
from rjepa_triton.layers import cli

OWN = '''
import torch
from rjepa_triton import Cell, Matrix, TwoPointRNN

class Leaky(Cell):
    """h = h' + z (n - h')."""
    states, gates, inputs = ("h",), ("z", "n"), ("z", "n")
    matrices = (Matrix("hz", ("gate", 0), 0), Matrix("hn", ("gate", 1), 0))
    def update(self, c, p, x):
        return (c[0] + torch.sigmoid(p[0] + x[0]) * (torch.tanh(p[1] + x[1]) - c[0]),)

class Bessel(Leaky):
    def update(self, c, p, x):
        return (torch.special.i0(p[0] + x[0]),)

class Mixing(Leaky):
    def update(self, c, p, x):
        return (p[0].cumsum(-1),)

class Wrong(Leaky):
    def update(self, c, p, x):
        return (p[7],)

class Scaled(Leaky):
    def __init__(self, scale): self.scale = scale

half, number = Scaled(0.5), 3
layer = TwoPointRNN(Leaky(), 4, input_size=2)
'''


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cells, list(arguments))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    return name


def test_all_layers_are_listed() -> None:
    shown = run("list")
    assert shown.exit_code == 0
    listed = {line.split()[0] for line in shown.output.splitlines()}
    assert listed == set(nn.__all__) - {"TwoPointRNN"}


@pytest.mark.parametrize("name", ["lstm", "LSTM", "LSTMCell", "lstmcell"])
def test_a_built_in_cell_by_any_of_its_names(name: str) -> None:
    shown = run("show", name)
    assert shown.exit_code == 0
    assert shown.output.startswith("LSTMCell: ")
    assert "∂c/∂c' = " in shown.output
    assert "\ncompiled    " in shown.output


def test_every_name_in_the_list_is_shown() -> None:
    for layer, cell in cli.built_in().items():
        for name in (layer, type(cell).__name__):
            assert type(cli.find(name)) is type(cell)
    assert run("show", "elman").output.startswith("ElmanCell: ")


def test_the_generated_code_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("show", "gru", "--code", "cpp")
    assert shown.exit_code == 0
    built: list[str] = []
    monkeypatch.setattr(library, "generated", built.append)
    loops = generated.Loops(GRUCell(), generated.loops(GRUCell()).functions)  # type: ignore[union-attr]
    assert loops.code is None
    assert built[0].startswith(shown.output[shown.output.index('#include "products.h"') :])


def test_a_cell_of_ones_own(here: str) -> None:
    for wanted in ("Leaky", "half", "layer"):
        shown = run("show", f"{here}:{wanted}")
        assert shown.exit_code == 0, shown.output
        assert "∂h/∂p_n = ∂h/∂x_n = " in shown.output
    assert str(Path.cwd()) not in sys.path
    shown = run("show", f"{here}:Bessel")
    assert shown.exit_code == 0
    assert f"compiled    no, torch runs it: {here}.py:" in shown.output
    assert "calls i0, which has no rule" in shown.output


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compiler", lambda: None)
    assert "compiled    no, torch runs it: no C++ compiler" in run("show", "gru").output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["lstn"],
            "NAME must be a built-in layer or cell, or module:Class of your own, got 'lstn'; there are ALIF",
        ),
        ([""], "NAME must be a built-in layer or cell"),
        (["lstm", "--code", "rust"], "--code must be one of 'cpp', got 'rust'"),
        ([":Leaky"], "module '' can't be imported: ValueError"),
        (["no.such:Cell"], "module 'no.such' can't be imported: ModuleNotFoundError: No module named 'no'"),
        (["HERE_broken:Cell"], "can't be imported: SystemExit: 0"),
        (["HERE:Laeky"], "must be a Cell, got nothing; cells in own_"),
        (["HERE:number"], "must be a Cell, got int"),
        (["HERE:Scaled"], "can't be made without arguments (TypeError: "),
        (["HERE:Mixing"], "Mixing is not a two-point cell"),
        (["HERE:Wrong"], "fails: IndexError: list index out of range"),
        (["HERE:Bessel", "--code", "cpp"], "there is no generated code of a cell that can't be traced"),
    ],
)
def test_bad_input_ends_with_2_and_a_message(arguments: list[str], says: str, here: str) -> None:
    shown = run("show", *(argument.replace("HERE", here) for argument in arguments))
    assert shown.exit_code == 2
    assert says in shown.output
    assert "Traceback" not in shown.output


def test_it_is_a_command_of_rjepa() -> None:
    command = [sys.executable, "-m", "rjepa_triton", "cells", "show", "lif"]
    environment = {"PYTHONIOENCODING": "latin-1"}
    shown = subprocess.run(command, capture_output=True, env=environment, check=False, encoding="latin-1")
    assert shown.returncode == 0, shown.stderr
    assert "dz/dv' = 0.95 * [2]" in shown.stdout
