"""Pictures of smooth noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pictures(folder: Path, count: int) -> list[str]:
    """Write so many pictures of 160 × 120 pixels, the same at each call, and return their files."""
    rng = np.random.default_rng(0)
    files = []
    for k in range(count):
        small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        files.append(str(folder / f"picture{k}.png"))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(files[-1])
    return files
