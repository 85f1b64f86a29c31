"""The `rjepa` command."""

from __future__ import annotations

import atexit
import gc
import sys

# Packages of the extra `bench`, which the command needs beyond the package's own dependencies.
EXTRA = ("typer", "rich", "matplotlib", "PIL", "scipy", "jinja2")


def main() -> None:
    """Run the command. Without the packages of the extra `bench` it says what to install, and exits with code 2."""
    try:
        import typer

        from ._command import quiet_end_of_pipe
        from .bench.cli import bench
        from .layers.cli import cells
        from .rjepa.cli import add_to
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        print(
            f"rjepa needs {package}, which is not installed: pip install 'rjepa-triton[bench]'",
            file=sys.stderr,
        )
        sys.exit(2)

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Recurrent layers that learn while they run.",
    )
    app.add_typer(bench, name="bench")
    app.add_typer(cells, name="cells")
    add_to(app)
    # Else Python's end looks for cycles among all objects of all modules, which takes longer than the rest of it.
    atexit.register(gc.freeze)
    with quiet_end_of_pipe():
        app()
