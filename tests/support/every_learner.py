"""Options of `OnlineLearner`, one for each rule and form."""

from __future__ import annotations

from typing import Any

# Of every rule and form: what is carried, and what the window holds.
LEARNERS: dict[str, dict[str, Any]] = {
    "step": {"form": "step"},
    "lazy": {"form": "lazy", "rewrite_every": 3},
    "chunk": {"form": "chunk", "update_every": 3},
    "history": {"form": "history"},
    "lag": {"form": "step", "lag": 1},
    "carry": {"credit": "carry", "update_every": 3},
    "rtrl": {"learning": "rtrl"},
    "uoro": {"learning": "uoro"},
    "tbptt": {"learning": "tbptt", "update_every": 3},
}
