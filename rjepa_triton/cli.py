"""The `rjepa` command."""

from __future__ import annotations

import sys

# What the command needs beyond the package's own dependencies: the extra `bench`.
EXTRA = ("typer", "rich", "matplotlib", "PIL")


def main() -> None:
    """Run the command; exit code 2, and what to install, where its extra packages are missing."""
    try:
        import typer

        from .bench.cli import bench
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
    add_to(app)
    app()
