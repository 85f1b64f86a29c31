"""What a cell is, and those built in: a per-unit update, its matrices, its partial derivatives."""

from .builtin import (
    NONLINEARITIES,
    ElmanCell,
    ELSTMCell,
    GRUCell,
    LeakyCell,
    LRUCell,
    LSTMCell,
    Nonlinearity,
    RGCCell,
    TimeDecayCell,
)
from .two_point import (
    ByState,
    Cell,
    Linearization,
    Matrix,
    Partials,
    Reads,
    Trajectory,
    reset_steps_of,
    state_read,
    verify,
)

__all__ = [
    "NONLINEARITIES",
    "ByState",
    "Cell",
    "ELSTMCell",
    "ElmanCell",
    "GRUCell",
    "LRUCell",
    "LSTMCell",
    "LeakyCell",
    "Linearization",
    "Matrix",
    "Nonlinearity",
    "Partials",
    "RGCCell",
    "Reads",
    "TimeDecayCell",
    "Trajectory",
    "reset_steps_of",
    "state_read",
    "verify",
]
