"""Layers of a few units, of each kind of weights and outputs, for tests that draw them."""

from __future__ import annotations

from collections.abc import Callable

from rjepa_triton import ELSTM, GRU, LRU, LSTM, RGC, RNN, TwoPointRNN

LAYERS: dict[str, Callable[..., TwoPointRNN]] = {
    "rgc": lambda **o: RGC(3, input_size=2, init="uniform", **o),
    "heads": lambda **o: RGC(4, input_size=3, init="uniform", heads=2, **o),
    "diagonal": lambda **o: RGC(3, input_size=2, init="uniform", recurrence="diagonal", **o),
    "rnn": lambda **o: RNN(3, 4, **o),
    "lstm": lambda **o: LSTM(3, 2, **o),
    "gru": lambda **o: GRU(2, 3, **o),
    "elstm": lambda **o: ELSTM(2, 3, **o),
    "lru": lambda **o: LRU(2, 3, **o),
}
