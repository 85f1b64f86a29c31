"""What takes long to make is made by one worker of `pytest -n`; the others wait for it and read it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from filelock import FileLock


def made_once(name: str, make: Callable[[], Any], folders: pytest.TempPathFactory) -> Any:
    """The JSON value that `make` gives, from the first worker of this run to ask for `name`."""
    folder = folders.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's own folder lies in the run's
    file = folder / f"{name}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(make()))
        return json.loads(file.read_text())
