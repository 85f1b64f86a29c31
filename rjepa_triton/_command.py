"""What the parts of the `rjepa` command share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user can cause ends with its message on stderr and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def needs(extra: str, packages: tuple[str, ...]) -> Iterator[None]:
    """A missing package of the extra `extra` ends with what to install and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        typer.echo(
            f"error: this needs {package}, which is not installed: pip install 'rjepa-triton[{extra}]'",
            err=True,
        )
        raise typer.Exit(2) from None
