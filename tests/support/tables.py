"""Small tables of fixations and their sidecars, for the tests."""

from __future__ import annotations

from pathlib import Path

import yaml

SIDE = {"time_unit": "ms", "px_per_degree": 10, "frame_size": [400, 300]}
HEADER = "participant,movie,onset,duration,x,y"
GOOD = [
    "p1,m,0,200,100,100",
    "p1,m,250,300,200,150",
    "p1,m,600,250,300,200",
    "p2,m,10,200,50,60",
    "p2,m,300,200,60,70",
]


def write(
    folder: Path, rows: list[str], header: str = HEADER, name: str = "fix.csv", **changes: object
) -> Path:
    """A table and its sidecar; a key changed to None is left out of the sidecar."""
    table = folder / name
    table.write_text("\n".join([header, *rows]) + "\n")
    side = {key: value for key, value in {**SIDE, **changes}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(side))
    return table
