"""What a cell is (a per-unit update, its matrices and its partial derivatives), and the built-in cells."""

from . import builtin, two_point
from .builtin import *
from .two_point import *

__all__ = [*builtin.__all__, *two_point.__all__]
