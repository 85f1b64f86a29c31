"""The benchmarks' inputs, which are patches along a simulated scan path over a photograph, or noise; and random
weights.

The photograph is matplotlib's own sample data, so nothing is downloaded. Real fixations overlap and repeat, so such
inputs are correlated in time, unlike noise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import _checks as check

INPUTS = ("photo", "noise")
PATCH = 50  # pixels a side: about the fovea in the paper's images
# Saccade amplitudes are gamma distributed: many short ones, a few across the picture. Pixels.
AMPLITUDE_SHAPE, AMPLITUDE_SCALE = 1.3, 40.0


@functools.cache
def photograph() -> np.ndarray:
    """The grey photograph, (H, W) float64 in [0, 1]."""
    file = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(file) as image:
        return np.asarray(image.convert("L"), dtype=np.float64) / 255


def scan_path(steps: int, height: int, width: int, seed: Sequence[int]) -> np.ndarray:
    """The top left corners (T, 2) of the patches along one walk of saccades inside an image of height × width pixels.

    Amplitudes are gamma distributed, directions uniform; a saccade across a border is reflected at it.
    """
    rng = np.random.default_rng(seed)
    room = np.array([height - PATCH, width - PATCH])
    amplitude = rng.gamma(AMPLITUDE_SHAPE, AMPLITUDE_SCALE, steps)
    angle = rng.uniform(0, 2 * np.pi, steps)
    saccades = amplitude[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
    free = rng.uniform(0, room) + np.cumsum(saccades, 0)
    folded = np.mod(free, 2 * room)  # reflecting is folding a free walk back at both borders
    return np.minimum(folded, 2 * room - folded).astype(int)


def inputs(kind: str, steps: int, batch: int, units: int, seed: int, like: Tensor) -> Tensor:
    """Draw inputs x (T, B, N) in the dtype and on the device of `like`; the same for the same arguments.

    "photo": 50×50 grey patches along B independent scan paths, mean removed, projected to N numbers by a
    fixed Gaussian matrix, each component standardised over (T, B) to mean 0 and variance 1.
    "noise": independent N(0, 1).

    Raises ValueError for another kind, a size below 1, or "photo" with T·B = 1, which has no variance.
    """
    check.one_of("input", kind, INPUTS)
    for name, size in (("steps", steps), ("batch", batch), ("hidden", units)):
        check.integer(name, size, 1)
    rng = np.random.default_rng([seed, 0])
    if kind == "noise":
        x = rng.standard_normal((steps, batch, units))
    else:
        if steps * batch < 2:
            raise ValueError("input 'photo' must have steps × batch of at least 2 to be standardised, got 1")
        image = photograph()
        projection = rng.standard_normal((PATCH * PATCH, units)) / PATCH
        x = np.stack([_patches(image, steps, [seed, 1, b]) @ projection for b in range(batch)], 1)
        x = (x - x.mean((0, 1))) / x.std((0, 1))
    return torch.from_numpy(x).to(like)


def _patches(image: np.ndarray, steps: int, seed: Sequence[int]) -> np.ndarray:
    """The patches of one scan path, flattened and mean removed: (T, 2500)."""
    height, width = image.shape
    corners = scan_path(steps, height, width, seed)
    flat = np.stack([image[r : r + PATCH, c : c + PATCH].ravel() for r, c in corners])
    return flat - flat.mean(1, keepdims=True)


def weights(units: int, scale: float, seed: int, like: Tensor, *, diagonal: bool = False) -> list[Tensor]:
    """Draw an RGC's four weights: (N, N) each, scale·N(0, 1)/√N; or if `diagonal` (N,) each, scale·N(0, 1)."""
    rng = np.random.default_rng([seed, 2])
    if diagonal:
        drawn = [scale * rng.standard_normal(units) for _ in range(4)]
    else:
        drawn = [scale / units**0.5 * rng.standard_normal((units, units)) for _ in range(4)]
    return [torch.from_numpy(w).to(like) for w in drawn]


def normal(shape: Sequence[int], seed: int, stream: int, like: Tensor) -> Tensor:
    """Draw N(0, 1) of the given shape. Draws of one seed differ by `stream`; 0 to 2 are taken by this file."""
    return torch.from_numpy(np.random.default_rng([seed, stream]).standard_normal(tuple(shape))).to(like)
