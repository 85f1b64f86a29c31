"""What a cell is (a per-unit update, its matrices and its partial derivatives), and the built-in cells."""

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
