"""torch.nn's LSTM, GRU and RNN with a learning rule (`layers.compat`): `from rjepa_triton.compat import LSTM`."""

from .layers.compat import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
