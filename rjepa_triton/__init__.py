"""Recurrent layers that learn while they run: Recurrent Forward Propagation in PyTorch and Triton."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    # In a checkout, kernels/ and bench/ lie beside this package, not in it as they do once installed.
    __path__.append(str(_HERE.parent))

from . import _interrupt  # noqa: E402

_interrupt.heed()  # before torch is imported

from . import _moved, cells, compat  # noqa: E402
from .cells.two_point import Cell, Matrix, Partials  # noqa: E402
from .layers import functional  # noqa: E402
from .layers import named as nn  # noqa: E402
from .layers.conv import ConvRGC  # noqa: E402
from .layers.named import (  # noqa: E402
    ALIF,
    CTRNN,
    ELSTM,
    GRU,
    LIF,
    LRU,
    LSTM,
    MGU,
    RGC,
    RNN,
    IndRNN,
    MinGRU,
    MinLSTM,
    TimeDecay,
    TwoPointRNN,
)
from .online import OnlineLearner  # noqa: E402
from .online import operators as _operators  # noqa: E402, F401  registers them with torch
from .online.actor_critic import StreamActorCritic  # noqa: E402
from .online.fidelity import fidelity  # noqa: E402
from .online.stack import Stack, StackLearner  # noqa: E402
from .online.stream_readout import Residual  # noqa: E402
from .online.streams import Stream  # noqa: E402

_moved.install()

if not TYPE_CHECKING:  # else a type checker would take every name for one of the package's

    def __getattr__(name: str) -> ModuleType:
        """A module by its name of version 0.1, such as `rjepa_triton.two_point`."""
        if name not in _moved.MOVED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")


__all__ = [
    "ALIF",
    "CTRNN",
    "ELSTM",
    "GRU",
    "LIF",
    "LRU",
    "LSTM",
    "MGU",
    "RGC",
    "RNN",
    "Cell",
    "ConvRGC",
    "IndRNN",
    "Matrix",
    "MinGRU",
    "MinLSTM",
    "OnlineLearner",
    "Partials",
    "Residual",
    "Stack",
    "StackLearner",
    "Stream",
    "StreamActorCritic",
    "TimeDecay",
    "TwoPointRNN",
    "cells",
    "compat",
    "fidelity",
    "functional",
    "nn",
]
