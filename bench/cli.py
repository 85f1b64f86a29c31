"""`rjepa bench`: joins the commands of all wings. Each is a function with options in its wing's `commands` file."""

from __future__ import annotations

from collections.abc import Callable

import typer

from .._command import user_errors
from .harness import options
from .harness.options import *  # noqa: F403  # this file's own names in version 0.1
from .harness.terminal import print_tables, show
from .harness.view import tell_files
from .kernels.commands import kernels_command, roofline_command, targets_command
from .learning.commands import fidelity_command, learn_command, pays_command
from .peers.commands import peers_command
from .planner.commands import plan_command
from .report.commands import (
    all_command,
    compare_command,
    compare_revisions_command,
    gpu_check_command,
    history_command,
    plot_command,
    report_command,
    table_command,
)
from .scaling.commands import forward_command, memory_command, scaling_command, selfcheck_command
from .streams.commands import online_command, ranks_command

# The commands by name, in the order of `rjepa bench --help`.
COMMANDS: dict[str, Callable[..., None]] = {
    "scaling": scaling_command,
    "table": table_command,
    "plot": plot_command,
    "compare": compare_command,
    "compare-revisions": compare_revisions_command,
    "history": history_command,
    "selfcheck": selfcheck_command,
    "plan": plan_command,
    "fidelity": fidelity_command,
    "learn": learn_command,
    "pays": pays_command,
    "forward": forward_command,
    "online": online_command,
    "ranks": ranks_command,
    "memory": memory_command,
    "peers": peers_command,
    "kernels": kernels_command,
    "roofline": roofline_command,
    "targets": targets_command,
    "all": all_command,
    "report": report_command,
    "gpu-check": gpu_check_command,
}

bench = typer.Typer(no_args_is_help=True, help="Time, memory and fidelity of the learning rules.")
for _name, _command in COMMANDS.items():
    bench.command(_name)(user_errors()(_command))

__all__ = [
    "COMMANDS",
    "all_command",
    "bench",
    "compare_command",
    "compare_revisions_command",
    "fidelity_command",
    "forward_command",
    "gpu_check_command",
    "history_command",
    "kernels_command",
    "learn_command",
    "memory_command",
    "online_command",
    "pays_command",
    "peers_command",
    "plan_command",
    "plot_command",
    "print_tables",
    "ranks_command",
    "report_command",
    "roofline_command",
    "scaling_command",
    "selfcheck_command",
    "show",
    "table_command",
    "targets_command",
    "tell_files",
]
__all__ += options.__all__
