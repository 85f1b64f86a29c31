"""Time and memory of every algorithm against hidden size, batch and length."""

from . import timing
from .timing import *

__all__ = list(timing.__all__)
