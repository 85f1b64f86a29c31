"""No eager pass reads a tensor's number: on a GPU each such read would wait for all that was launched before it.

Counted by a mode that sees every operation that torch dispatches. The exceptions are named here:

- the forward pass parallel in time and refine="exact" read after each round whether it was the last, and refine=r reads
  once, at the end, whether its terms fall;
- on the CPU alone, where nothing waits, the dual form over a sequence with resets reads once whether any step is without
  a loss, and compiled code reads lr.
- on the CPU alone, a learner reads once a call whether what it got and made is finite; elsewhere it reads flags that have
  come by then (`test_nonfinite.py`, which counts reads on a stand-in for a far device). Here it looks at nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rjepa_triton import OnlineLearner, Stack, StackLearner
from rjepa_triton.layers import named
from rjepa_triton.layers.conv import ConvRGC

# What `.item()`, `bool(tensor)`, `.tolist()`, `nonzero` and an index by a mask come to.
READS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "item",
    "equal",
    "masked_select",
    "unique",
    "allclose",
)


class Reads(TorchDispatchMode):
    """The operations that read a tensor's numbers, of those that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1] or ()
        )
        if name.startswith(READS) or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Reads:
        self._methods = Methods(self.found)
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._methods.__exit__(*raised)


class Methods(TorchFunctionMode):
    """The methods that read numbers where no operation is dispatched, on the CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "__array__"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


LAYERS: dict[str, Any] = {
    "rgc": lambda **o: named.RGC(4, init="uniform", **o),
    "rgc-heads": lambda **o: named.RGC(4, input_size=3, heads=2, **o),
    "rnn": lambda **o: named.RNN(3, 4, "relu", **o),
    "indrnn": lambda **o: named.IndRNN(3, 4, **o),
    "ctrnn": lambda **o: named.CTRNN(3, 4, **o),
    "lstm": lambda **o: named.LSTM(3, 4, **o),
    "lstm-diagonal": lambda **o: named.LSTM(3, 4, recurrence="diagonal", **o),
    "gru": lambda **o: named.GRU(3, 4, **o),
    "elstm": lambda **o: named.ELSTM(3, 4, **o),
    "time-decay": lambda **o: named.TimeDecay(3, 4, **o),
    "lru": lambda **o: named.LRU(3, 4, **o),
    "lif": lambda **o: named.LIF(3, 4, **o),
    "alif": lambda **o: named.ALIF(3, 4, **o),
    "mgu": lambda **o: named.MGU(3, 4, **o),
    "minlstm": lambda **o: named.MinLSTM(3, 4, **o),
    "mingru": lambda **o: named.MinGRU(3, 4, **o),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


def test_reads_are_seen() -> None:
    x = torch.randn(3)
    with Reads() as reads:
        x.sum().item()
        bool(x.sum() > 0)
        x.nonzero()
        x[x > 0]
        x.tolist()
    assert {"_local_scalar_dense", "nonzero", "index", "tolist"} <= set(reads.found)


@by_layer
@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl", "eprop", "rflo", "snap0"])
@pytest.mark.parametrize("reset", [False, True])
def test_layers_over_sequences(name: str, learning: str, reset: bool) -> None:
    layer = LAYERS[name](learning=learning, forward="sequential")
    x = torch.randn(5, 2, layer.fan_in, requires_grad=True)
    resets = torch.rand(5, 2) < 0.3 if reset else None
    with Reads() as reads:
        layer(x, None, resets)[0].square().sum().backward()
    if reset:
        assert reads.found in ([], ONE)  # on the CPU
    else:
        assert reads.found == []


ONE = ["_local_scalar_dense"]


@pytest.mark.parametrize("refine", [1, 3, "exact"])
def test_refinement(refine: Any) -> None:
    layer = named.LSTM(3, 4, refine=refine, forward="sequential")
    with Reads() as reads:
        layer(torch.randn(5, 2, 3))[0].sum().backward()
    if refine == "exact":
        assert len(reads.found) <= 3 * 5 + 1  # as many rounds as there are steps, at most
    else:
        assert len(reads.found) <= 2
    assert set(reads.found) <= set(ONE)


def test_a_map() -> None:
    layer = ConvRGC(2)
    with Reads() as reads:
        layer(torch.randn(4, 2, 2, 3, 3))[0].sum().backward()
    assert reads.found == []


def test_the_forward_pass_parallel_in_time_reads_after_each_round() -> None:
    layer = named.RGC(4, init="uniform", forward="parallel")
    with Reads() as reads:
        layer(torch.randn(40, 2, 4) / 4)
    assert set(reads.found) == {"tolist"}  # of two numbers, the correction and what is left
    assert len(reads.found) <= 41  # there are as many rounds as steps, at most


FORMS: list[dict[str, Any]] = [
    {"form": "step"},
    {"form": "step", "lr": 0.1},
    {"form": "step", "lag": 1},
    {"form": "lazy", "rewrite_every": 2},
    {"form": "chunk", "update_every": 2},
    {"form": "history"},
    {"credit": "carry", "update_every": 2},
    {"refine": 2, "update_every": 2},
    {"learning": "tbptt", "update_every": 2},
    {"learning": "rtrl"},
    {"learning": "uoro"},
    {"learning": "eprop"},
]


@by_layer
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_learners(name: str, options: dict[str, Any], backend: str) -> None:
    """Steps, chunks, resets and their backward passes. In the mode, torch runs in the place of compiled code."""
    layer = LAYERS[name]()
    learner = OnlineLearner(layer, 2, backend=backend, nonfinite="ignore", **options)
    x, resets, mask = torch.randn(4, 2, layer.fan_in), torch.rand(4, 2) < 0.3, torch.tensor([True, False])
    learner.step(x[0]).sum().backward()  # the first makes memory that the others reuse
    learner.reset()
    with Reads() as reads:
        for _ in range(2):
            for row in x:
                learner.step(row).sum().backward()
            learner.reset(mask)
            learner.chunk(x, resets).sum().backward()
            learner.reset()
    backward_passes = 2 * (len(x) + 1)
    if "refine" in options:
        assert set(reads.found) <= set(ONE)
        assert (
            len(reads.found) <= 4 * backward_passes
        )  # of the call, and of what passes to the steps before it
    elif "lr" in options and backend == "auto":  # on the CPU, for each group of weights
        assert set(reads.found) <= set(ONE)
        assert len(reads.found) <= 3 * backward_passes * len(layer.weights())
    else:
        assert reads.found == []


def test_a_stack() -> None:
    learner = StackLearner(Stack(named.LSTM(3, 4), named.RGC(4)), 2, nonfinite="ignore")
    with Reads() as reads:
        for _ in range(3):
            learner.step(torch.randn(2, 3)).sum().backward()
        learner.reset(torch.tensor([True, False]))
        learner.chunk(torch.randn(3, 2, 3)).sum().backward()
    assert reads.found == []
