"""Recurrent layers that learn while they run: Recurrent Forward Propagation in PyTorch and Triton."""

from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    # In a checkout, kernels/ and bench/ lie beside this package, not in it as they do once installed.
    __path__.append(str(_HERE.parent))

from . import cells, functional, nn  # noqa: E402
from . import library as _library  # noqa: E402, F401  registers the operators
from .comparison import fidelity  # noqa: E402
from .conv import ConvRGC  # noqa: E402
from .nn import CTRNN, ELSTM, GRU, LRU, LSTM, RGC, RNN, IndRNN, TimeDecay, TwoPointRNN  # noqa: E402
from .online import OnlineLearner  # noqa: E402
from .stack import Stack, StackLearner  # noqa: E402
from .two_point import Cell, Matrix, Partials  # noqa: E402

__all__ = [
    "CTRNN",
    "ELSTM",
    "GRU",
    "LRU",
    "LSTM",
    "RGC",
    "RNN",
    "Cell",
    "ConvRGC",
    "IndRNN",
    "Matrix",
    "OnlineLearner",
    "Partials",
    "Stack",
    "StackLearner",
    "TimeDecay",
    "TwoPointRNN",
    "cells",
    "fidelity",
    "functional",
    "nn",
]
