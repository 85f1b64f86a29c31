"""Films and pictures as arrays of frames, which are decoded once into a cache that a crash can't spoil.

An entry of the cache is a folder with frames.npy, times.npy and film.json. The folder is filled under another name,
synced to disk, and then renamed, so an entry under its own name is complete. film.json has the digests of the other
two: an entry that was damaged since is made anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .. import _checks as check
from .. import _files
from . import pictures
from .pictures import IMAGES as IMAGES
from .pictures import VideoError as VideoError

try:
    import fcntl
except ImportError:  # on Windows, two processes may both decode a film; one entry is kept
    fcntl = None  # type: ignore[assignment]

LAYOUT = 2  # version of a cache entry's layout; entries of another version have other keys
HASHED = 2**20  # so many bytes at each end of a file distinguish it from another of the same size and time
CHECKED = 2**26  # of an array of the cache at most so many bytes at each end are checked when it is opened
FRAMES, TIMES, HEAD = "frames.npy", "times.npy", "film.json"
ENOUGH = (
    0.1,
    1.0,
)  # of a film's length, and seconds: where less is missing at the end, frames were dropped there


@dataclass(frozen=True)
class Info:
    """What a file's header says.

    width, height   of a frame as it is shown, in square pixels; a file may store pixels of another aspect
    duration        in seconds; infinite for a picture, None if the file doesn't say
    frames          their number; None if the file doesn't say
    """

    width: int
    height: int
    duration: float | None
    frames: int | None


@dataclass(frozen=True)
class Film:
    """A decoded film. A picture is a film of one frame that is shown for ever.

    file     the film or picture; folder: its entry in the cache
    frames   (n, H, W, 3) uint8, RGB, a read-only memory map
    times    (n,) float64, seconds from when the first frame is shown to when each is; times[0] = 0
    end      seconds after which the last frame is no longer shown
    size     (width, height) of a frame before it was resized, in square pixels

    A pickle holds the place in the cache, not the frames, so every worker process maps the frames for itself.
    """

    file: Path
    folder: Path
    size: tuple[int, int]
    end: float
    times: np.ndarray = field(repr=False)

    @functools.cached_property
    def frames(self) -> np.ndarray:
        return np.load(self.folder / FRAMES, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "frames"}

    def index(self, seconds: np.ndarray) -> np.ndarray:
        """The index of the frame shown at each of `seconds`, as int64 of the same shape.

        Raises ValueError for a time before the first frame, or at `end` or later.
        """
        seconds = np.asarray(seconds, dtype=np.float64)
        outside = ~((seconds >= 0) & (seconds < self.end))
        if outside.any():
            raise ValueError(
                f"{self.file}: it is shown from 0 s to {self.end:g} s, got {seconds[outside].ravel()[0]:g} s"
            )
        return np.searchsorted(self.times, seconds, side="right") - 1

    def at_rate(self, fps: float) -> Film:
        """The same frames at a constant rate, in frames per second, whatever the file's time stamps say."""
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, got {fps}")
        if not math.isfinite(self.end):
            return self
        times = np.arange(len(self.times)) / fps
        return Film(self.file, self.folder, self.size, len(times) / fps, times)


def there_and_back(seconds: np.ndarray, end: float) -> np.ndarray:
    """Which times in a film of length `end` are reached after `seconds` of playing it forward, backward, forward, ….

    A short film that is played like this has no cuts, so a scan path of any length can run over it. In a picture, whose
    end is infinite, the time is always 0.
    """
    if not math.isfinite(end):
        return np.zeros_like(seconds)
    phase = np.mod(seconds, 2 * end)
    return np.minimum(np.minimum(phase, 2 * end - phase), np.nextafter(end, 0))


def default_cache() -> Path:
    """The folder $RJEPA_CACHE, or else rjepa-triton in the user's cache folder. Raises ValueError if there is none."""
    named = os.environ.get("RJEPA_CACHE")
    if named:
        return Path(named)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not caches.is_absolute():  # which the specification says to ignore
        try:
            caches = Path.home() / ".cache"
        except RuntimeError:
            raise ValueError(
                "no home folder is known: name a folder for decoded films in RJEPA_CACHE"
            ) from None
    return caches / "rjepa-triton"


def probe(file: str | Path) -> Info:
    """Size and duration, from the file's header. Raises VideoError if the file is missing or broken."""
    file = _existing(file)
    if pictures.is_picture(file):
        with pictures.opened(file) as image:
            return Info(image.width, image.height, math.inf, 1)
    with _video(file) as (container, stream):
        duration = _length(container, stream)
        if duration is None and container.duration is not None:
            duration = container.duration / av.time_base - _late(container, stream)
        return Info(*_shown_size(stream), duration, stream.frames or None)


def _length(container: Any, stream: VideoStream) -> float | None:
    """Seconds from when the first frame is shown to when the last no longer is, as the header says; None if not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    try:  # Matroska counts it from time 0
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds) - _late(container, stream)
    except ValueError:
        return None


def _late(container: Any, stream: VideoStream) -> float:
    """Seconds after the container's time 0 at which the first frame is shown, where its length is counted from 0."""
    if "matroska" not in container.format.name or stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)


def decode(file: str | Path, cache: str | Path | None = None, *, width: int | None = None) -> Film:
    """The film or picture `file`, decoded into the folder `cache` unless it is there already.

    cache: None: `default_cache()`. width: frames are resized to this width in pixels, and to a height in proportion;
    None: they keep their size. The frames take n·H·W·3 bytes of disk. An entry of the cache is identified by the file's
    size, time of change and content at both ends, and by `width`. If several processes ask for one film, one of them
    decodes it and the others wait. An entry that was damaged is decoded anew.

    Raises VideoError if the file is missing, empty, truncated or broken, or if frames have no time stamps; OSError if
    the disk has no room.
    """
    file = _existing(file)
    if width is not None:
        check.integer("width", width, 1)
    cache = default_cache() if cache is None else Path(cache)
    folder = cache / _key(file, width)
    film = _entry(folder, file)
    if film is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock"):
            film = _entry(folder, file)
            if film is None:
                _fill(folder, file, width)
                film = _entry(folder, file)
    if film is None:
        raise OSError(f"{folder}: what was just written can't be read back; is the disk of the cache sound?")
    return film


def _entry(folder: Path, file: Path) -> Film | None:
    """The film that an entry of the cache holds; None if there is no entry, or a damaged one."""
    try:
        written = json.loads(_files.read_text(folder / HEAD))
        head = written["film"]
        if written["sha256"] != _of_head(head) or head["digests"] != _digests(folder):
            return None
        size, end = (int(head["size"][0]), int(head["size"][1])), float(head["end"])
        film = Film(file, folder, size, end, np.load(folder / TIMES))
        return film if film.frames.shape[0] == len(film.times) > 0 else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _of_head(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    return {name: _files.digest(folder / name, CHECKED) for name in (FRAMES, TIMES)}


def still(film: Film, index: int, width: int) -> np.ndarray:
    """One frame of the film's file, (H, W, 3) uint8, at `width` pixels or, if that is less, at its own width.

    The film's own frames are as small as the patches that are cut from them. Raises VideoError.
    """
    width = min(width, film.size[0])
    size = (width, max(1, round(width * film.size[1] / film.size[0])))
    if pictures.is_picture(film.file):
        return pictures.rgb(film.file, size)
    time = float(np.load(film.folder / TIMES)[index])
    with _video(film.file) as (container, stream):
        if stream.time_base is not None:
            start = float((stream.start_time or 0) * stream.time_base)
            container.seek(int((start + time) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time - start >= time - 1e-4:
                    return _rgb(frame, size)
    return film.frames[index]


def _existing(file: str | Path) -> Path:
    file = Path(file)
    if not file.is_file():
        raise VideoError(f"{file}: no such file")
    if not file.stat().st_size:
        raise VideoError(f"{file}: the file is empty")
    return file


def _key(file: Path, width: int | None) -> str:
    status = file.stat()
    digest = hashlib.sha256(f"{LAYOUT} {status.st_size} {status.st_mtime_ns} {width}".encode())
    with file.open("rb") as body:
        digest.update(body.read(HASHED))
        body.seek(max(0, status.st_size - HASHED))
        digest.update(body.read(HASHED))
    return f"{file.stem[:40]}-{digest.hexdigest()[:24]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file `path`, which the system releases when this process ends, however it ends."""
    with path.open("wb") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, file: Path, width: int | None) -> None:
    """Decode into `folder`, which then exists complete or not at all. The caller holds its lock."""
    if fcntl is not None:
        for left in folder.parent.glob(
            f"{folder.name}.*.part"
        ):  # left by a process that ended while it decoded
            shutil.rmtree(left, ignore_errors=True)
    part, damaged = (folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part") for _ in range(2))
    try:
        part.mkdir()
        _write(part, file, width)
        _files.sync(part)
        try:
            if folder.exists():
                folder.rename(damaged)
            part.rename(folder)
        except OSError:
            if _entry(folder, file) is None:  # or else another process was faster
                raise
        _files.sync(folder.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno, f"{file}: its frames can't be written to {folder.parent}: {error.strerror}"
        ) from error
    finally:
        for left in (part, damaged):
            shutil.rmtree(left, ignore_errors=True)


def _write(folder: Path, file: Path, width: int | None) -> None:
    info = probe(file)
    size = (info.width, info.height)
    to = size if width is None else (width, max(1, round(width * info.height / info.width)))
    _check_room(folder.parent, file, to, info.frames)
    times: list[float] = []
    end = math.inf
    with (folder / FRAMES).open("wb") as out:
        header = _write_header(out, 0, to)
        for frame, time, until in _frames(file, to):
            out.write(np.ascontiguousarray(frame).data)
            times.append(time)
            end = until
        if not times:
            raise VideoError(f"{file}: it has no frames")
        out.seek(0)
        if _write_header(out, len(times), to) != header:  # numpy's header has room for the count to grow
            raise RuntimeError(
                f"{file}: the header for {len(times)} frames isn't as long as the one for none"
            )
        _flush(out)
    with (folder / TIMES).open("wb") as out:
        np.save(out, np.asarray(times))
        _flush(out)
    head = {"file": str(file), "size": size, "end": str(end), "digests": _digests(folder)}
    _files.write_text(folder / HEAD, json.dumps({"film": head, "sha256": _of_head(head)}))


def _write_header(out: BinaryIO, count: int, size: tuple[int, int]) -> int:
    """Write the header of an array of `count` frames, and return its length in bytes."""
    shape = (count, size[1], size[0], 3)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.tell()


def _flush(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _check_room(cache: Path, file: Path, size: tuple[int, int], frames: int | None) -> None:
    need = (frames or 0) * size[0] * size[1] * 3
    free = shutil.disk_usage(cache).free
    if need > free:
        raise OSError(
            f"{file}: {frames} frames of {size[0]} × {size[1]} pixels need {need / 1e9:.1f} GB, and {cache} has "
            f"{free / 1e9:.1f} GB free; decode to a smaller width, or name another cache folder in RJEPA_CACHE"
        )


def _frames(file: Path, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, float, float]]:
    """Each frame (H, W, 3), with the seconds from which and until which it is shown."""
    if pictures.is_picture(file):
        yield pictures.rgb(file, size), 0.0, math.inf
        return
    with _video(file) as (container, stream):
        first: float | None = None
        last = -math.inf
        count = 0
        step = 1 / float(stream.average_rate) if stream.average_rate else 0.04
        length = _length(container, stream)
        before: tuple[VideoFrame, float, float] | None = (
            None  # one frame back: the last is shown to the film's end
        )
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise VideoError(f"{file}: frame {count} is corrupt")
            if frame.rotation:
                raise VideoError(f"{file}: it is stored rotated by {frame.rotation}°; encode it upright")
            if frame.time is None:
                raise VideoError(
                    f"{file}: frame {count} has no time stamp; use a container that has time stamps, such as mp4"
                )
            first = frame.time if first is None else first
            time = frame.time - first
            if time <= last:
                raise VideoError(
                    f"{file}: frame {count} is shown at {time:g} s, not after the one at {last:g} s"
                )
            if count:
                step = time - last
            if before is not None:
                yield _rgb(before[0], size), before[1], time
            shown = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
            before = (frame, time, time + shown)
            last = time
            count += 1
        if before is None:
            return
        frame, time, end = before
        if length is not None:
            # Frames may be dropped, or left out by an edit list, and the header still counts them: only time tells.
            missing = length - end
            if count < stream.frames and missing > max(2 * step, min(ENOUGH[0] * length, ENOUGH[1])):
                raise VideoError(
                    f"{file}: {count} of its {stream.frames} frames are there, {end:.3g} of its {length:.3g} s; it is "
                    "truncated or corrupt"
                )
            end = max(length, math.nextafter(time, math.inf))
        yield _rgb(frame, size), time, end


def _rgb(frame: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    shrinks = size[0] < frame.width
    scaled = frame.reformat(
        width=size[0], height=size[1], format="rgb24", interpolation="AREA" if shrinks else "BICUBIC"
    )
    return scaled.to_ndarray()


def _shown_size(stream: VideoStream) -> tuple[int, int]:
    aspect = float(stream.sample_aspect_ratio or 1)
    return round(stream.width * aspect), stream.height


@contextmanager
def _video(file: Path) -> Iterator[tuple[Any, VideoStream]]:
    try:
        # a name such as x:1.mp4 would be taken for a protocol
        with av.open(f"file:{os.path.abspath(file)}") as container:
            if not container.streams.video:
                raise VideoError(f"{file}: it has no video")
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise VideoError(
                    f"{file}: it is a picture in a format that isn't read; save it as PNG, JPEG or TIFF"
                )
            stream = container.streams.video[0]
            if stream.codec_context is None:  # a stream without one has no size or rate either
                raise VideoError(f"{file}: its header doesn't say how its frames are coded")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{file}: not a film that can be decoded: {error.strerror or error}") from error
    except (ValueError, ArithmeticError, MemoryError, LookupError) as error:  # of what a broken header says
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{file}: not a film that can be decoded: {error}") from error
