"""Small films, pictures and tables for the tests.

Each frame of a film has a grey level of its own, and each pixel of a picture a colour of its own, so that a test can tell
where a patch was cut from.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import yaml
from PIL import Image

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import Fixations


def level(frame: int) -> int:
    """The grey level of a frame; the codec preserves it to within a few units."""
    return 20 + 8 * (frame % 28)


def write(
    file: Path,
    frames: int = 12,
    size: tuple[int, int] = (64, 48),
    fps: int = 25,
    ticks: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    pattern: np.ndarray | None = None,
    at: Sequence[int] | None = None,
) -> Path:
    """Write a film.

    ticks: when each frame is shown, in 1/1000 s; at: the same in 1/fps s; pattern: (H, W), added to every frame.
    """
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
            elif at is not None:
                frame.pts, frame.time_base = at[k], Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def picture(folder: Path, size: tuple[int, int] = (200, 150), name: str = "m.png") -> Path:
    """Write a picture whose pixels encode where they are: red is x, green is y."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    Image.fromarray(np.stack([x, y, 7 + 0 * x], 2).astype(np.uint8)).save(folder / name)
    return folder / name


def table(folder: Path, rows: list[str], movies: dict[str, object], **side: object) -> Fixations:
    """Write a table of fixations, in ms and at 10 pixels per degree, and read it. side: entries of its sidecar file."""
    (folder / "fix.csv").write_text("\n".join(["participant,movie,onset,duration,x,y", *rows]) + "\n")
    content = {"time_unit": "ms", "px_per_degree": 10, "movies": movies, **side}
    (folder / "fix.csv.yaml").write_text(yaml.safe_dump(content))
    return fixations.read(folder / "fix.csv")


def looking(count: int, who: str = "p", movie: str = "m", gap: int = 300) -> list[str]:
    """Rows for `table`: fixations of 200 ms, one every `gap` ms."""
    return [f"{who},{movie},{k * gap},200,{30 + 9 * k % 100},{40 + 5 * k % 50}" for k in range(count)]
