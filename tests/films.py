"""Small films for the tests: each frame has one colour, so that which one a patch was cut from can be told."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def level(frame: int) -> int:
    """The grey level of a frame; the codec keeps it to within a few units."""
    return 20 + 8 * (frame % 28)


def write(
    file: Path,
    frames: int = 12,
    size: tuple[int, int] = (64, 48),
    fps: int = 25,
    ticks: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    pattern: np.ndarray | None = None,
) -> Path:
    """Write a film; `ticks`: when each frame is shown, in 1/1000 s; `pattern`: (H, W) added to every frame."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(frames):
            picture = np.full((size[1], size[0], 3), level(k), np.uint8)
            if pattern is not None:
                picture += pattern[..., None].astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file
