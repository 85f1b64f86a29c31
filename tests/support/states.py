"""States of a learner: two of them side by side, as before and after a call that must change nothing; changed ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rjepa_triton import OnlineLearner


def fingerprint(learner: OnlineLearner) -> Any:
    """What `same` compares, as it is now."""
    return copy.deepcopy(learner.state_dict())


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same to the bit: tensors with their dtypes, and what dicts, lists and tuples hold."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def requiring_gradients(value: Any) -> Any:
    """A copy of a state's value, in which every tensor that may require a gradient does."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    if isinstance(value, dict):
        return {key: requiring_gradients(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(requiring_gradients, value))
    return value
