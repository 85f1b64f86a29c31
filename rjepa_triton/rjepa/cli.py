"""The parts of the `rjepa` command that are about R-JEPA. Each loads what it needs when it runs."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
