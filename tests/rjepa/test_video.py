"""Films: frames and times as the file has them, and a cache in which only whole films are found."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import films
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rjepa_triton._processes import Workers
from rjepa_triton.rjepa import demo, video
from rjepa_triton.rjepa.video import VideoError, decode, there_and_back


def entries(cache: Path) -> list[str]:
    """What a cache holds beside its locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_frames_and_times(tmp_path: Path) -> None:
    film = decode(films.write(tmp_path / "a.mp4"), tmp_path / "cache")
    assert film.frames.shape == (12, 48, 64, 3)
    assert film.frames.dtype == np.uint8
    assert not film.frames.flags.writeable
    assert np.abs(film.frames.mean((1, 2, 3)) - [films.level(k) for k in range(12)]).max() < 4
    np.testing.assert_allclose(film.times, np.arange(12) / 25)
    assert film.size == (64, 48)
    assert film.end == pytest.approx(12 / 25)


def test_variable_frame_rate_and_the_frame_at_a_time(tmp_path: Path) -> None:
    ticks = [500, 540, 700, 710, 1500]  # the first frame's time is the film's zero
    film = decode(films.write(tmp_path / "a.mkv", 5, ticks=ticks), tmp_path / "cache")
    np.testing.assert_allclose(film.times, (np.array(ticks) - 500) / 1000, atol=1e-9)
    assert film.index(np.array([0.0, 0.039, 0.041, 0.205, 0.9, 1.001])).tolist() == [0, 0, 1, 2, 3, 4]
    for time in (-0.01, film.end, math.nan):
        with pytest.raises(ValueError, match=r"a\.mkv: it is shown from 0 s to .* s, got"):
            film.index(np.array([0.0, time]))
    even = film.at_rate(10)
    assert even.index(np.array([0.15])).tolist() == [1]
    assert even.end == 0.5
    with pytest.raises(ValueError, match="fps must be a positive number, got 0"):
        film.at_rate(0)


def test_resized_and_with_square_pixels(tmp_path: Path) -> None:
    file = films.write(tmp_path / "a.mp4", 2, aspect=Fraction(3, 2))
    assert video.probe(file) == video.Info(96, 48, pytest.approx(0.08), 2)
    assert decode(file, tmp_path / "cache").frames.shape == (2, 48, 96, 3)
    small = decode(file, tmp_path / "cache", width=24)
    assert small.frames.shape == (2, 12, 24, 3)
    assert small.size == (96, 48)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_still_is_the_frame_at_the_files_own_size(tmp_path: Path, name: str) -> None:
    film = decode(films.write(tmp_path / name, 30), tmp_path / "cache", width=16).at_rate(10)
    for index in (0, 7, 29):
        frame = video.still(film, index, 1000)
        assert frame.shape == (48, 64, 3)
        assert abs(frame.mean() - film.frames[index].mean()) < 3
    film = decode(films.picture(tmp_path), tmp_path / "cache", width=10)
    assert video.still(film, 0, 100).shape == (75, 100, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_picture_is_a_film_of_one_frame_without_end(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (30, 20), (204, 204, 204)).convert(mode).save(tmp_path / "a.png")
    film = decode(tmp_path / "a.png", tmp_path / "cache", width=15)
    assert film.frames.shape == (1, 10, 15, 3)
    assert np.all(film.frames == 204)
    assert film.index(np.array([0.0, 1e6])).tolist() == [0, 0]
    assert film.at_rate(5) is film


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90°
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert video.probe(tmp_path / "a.jpg").width == 20
    assert decode(tmp_path / "a.jpg", tmp_path / "cache").frames.shape == (1, 30, 20, 3)


def test_decoded_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = films.write(tmp_path / "a.mp4", 3), tmp_path / "cache"
    first = decode(file, cache)
    with monkeypatch.context() as patch:
        patch.setattr(video, "_frames", None)
        assert np.array_equal(decode(file, cache).frames, first.frames)
        shutil.copy2(file, tmp_path / "b.mp4")
    os.utime(file, ns=(0, 0))
    decode(file, cache)
    assert len(entries(cache)) == 2


def test_it_pickles_as_a_place(tmp_path: Path) -> None:
    film = decode(films.write(tmp_path / "a.mp4", size=(640, 480)), tmp_path / "cache")
    film.frames.sum()
    body = pickle.dumps(film)
    assert len(body) < 2000
    assert np.array_equal(pickle.loads(body).frames, film.frames)


def test_an_interrupted_decoding_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = films.write(tmp_path / "a.mp4"), tmp_path / "cache"
    frames = video._frames

    def interrupted(*args: object) -> object:
        yield next(frames(*args))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video, "_frames", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(file, cache)
    assert entries(cache) == []
    assert len(decode(file, cache).frames) == 12


CRASH = """
import os, sys
from rjepa_triton.rjepa import video
frames = video._frames
def crash(*args):
    for k, frame in enumerate(frames(*args)):
        if k == 5:
            os._exit(9)
        yield frame
video._frames = crash
video.decode(sys.argv[1], sys.argv[2])
"""


def test_what_a_crash_left_is_not_read_and_is_cleared_away(tmp_path: Path) -> None:
    file, cache = films.write(tmp_path / "a.mp4"), tmp_path / "cache"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", CRASH, str(file), str(cache)], env=env, check=False)
    assert ended.returncode == 9
    (left,) = entries(cache)
    assert left.endswith(".part")
    assert len(decode(file, cache).frames) == 12
    (kept,) = entries(cache)
    assert not kept.endswith(".part")


def _count(file: Path, cache: Path) -> int:
    return len(decode(file, cache).frames)


def test_processes_share_one_decoding(tmp_path: Path) -> None:
    file, cache = films.write(tmp_path / "a.mp4", 30), tmp_path / "cache"
    with Workers(3) as pool:  # not by fork, which may deadlock in a process with threads
        counts = list(pool.map(_count, [file] * 6, [cache] * 6))
    assert counts == [30] * 6
    assert len(entries(cache)) == 1


def broken(tmp_path: Path) -> dict[str, Path]:
    """Files that can't be decoded, by what is wrong with them."""
    whole = films.write(tmp_path / "whole.mp4", 40, size=(320, 240)).read_bytes()
    made = {
        "no such file": tmp_path / "missing.mp4",
        "the file is empty": tmp_path / "empty.mp4",
        "not a film that can be decoded": tmp_path / "noise.mp4",
        "not a film that": tmp_path / "truncated.mp4",
        "not a picture that can be read": tmp_path / "noise.png",
        "it has no video": tmp_path / "sound.wav",
    }
    made["the file is empty"].touch()
    made["not a film that can be decoded"].write_bytes(b"no film" * 1000)
    made["not a film that"].write_bytes(whole[: len(whole) // 2])
    made["not a picture that can be read"].write_bytes(b"no picture")
    head = b"RIFF" + (36 + 200).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    form = (1).to_bytes(2, "little") * 2 + (8000).to_bytes(4, "little") * 2 + b"\x01\0\x08\0"
    made["it has no video"].write_bytes(head + form + b"data" + (200).to_bytes(4, "little") + bytes(200))
    return made


def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    for fault, file in broken(tmp_path).items():
        with pytest.raises(VideoError, match=f"{file.name}: {fault}"):
            decode(file, tmp_path / "cache")
    cache = tmp_path / "cache"
    assert not cache.exists() or entries(cache) == []


def test_a_corrupt_frame_is_noticed(tmp_path: Path) -> None:
    body = demo.source("bigbuckbunny").file.read_bytes()
    (tmp_path / "a.mp4").write_bytes(body[:400_000] + bytes(200) + body[400_200:])
    with pytest.raises(VideoError, match=r"a\.mp4: frame \d+ is corrupt"):
        decode(tmp_path / "a.mp4", tmp_path / "cache", width=40)
    assert entries(tmp_path / "cache") == []


def test_frames_that_are_missing_are_noticed(tmp_path: Path) -> None:
    file = films.write(tmp_path / "a.avi", 60)
    body = file.read_bytes()
    file.write_bytes(body[: body.index(b"movi") + (len(body) - body.index(b"movi")) // 3])
    with pytest.raises(VideoError, match=r"a\.avi: (\d+ of its 60 frames are there|not a film|frame)"):
        decode(file, tmp_path / "cache")


def test_a_disk_without_room_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = films.write(tmp_path / "a.mp4")
    monkeypatch.setattr(video.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"a\.mp4: 12 frames of 64 × 48 pixels need .* smaller width"):
        decode(file, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv"])
def test_dropped_frames_are_no_damage(tmp_path: Path, name: str) -> None:
    shown = [0, 1, 2, 10, 11, 12, 13, 50, 51, 52, 53, 54, 99]
    film = decode(films.write(tmp_path / name, len(shown), at=shown), tmp_path / "cache")
    np.testing.assert_allclose(film.times, np.array(shown) / 25, atol=1e-3)
    assert np.abs(film.frames.mean((1, 2, 3)) - [films.level(k) for k in range(len(shown))]).max() < 5
    assert film.end == pytest.approx(4, abs=0.05)
    assert video.probe(tmp_path / name).duration == pytest.approx(film.end, abs=1e-6)


def test_an_edit_list_is_no_damage(tmp_path: Path) -> None:
    file = films.write(tmp_path / "a.mp4", 60)
    body = file.read_bytes()
    at = body.index(b"elst") + 12  # of one entry: its length in 1/1000 s, and where in the media it begins
    length, begin = (int.from_bytes(body[at + k : at + k + 4], "big") for k in (0, 4))
    scale = int.from_bytes(body[body.index(b"mdhd") + 16 :][:4], "big")
    assert (length, begin) == (2400, 0)
    edited = (1600).to_bytes(4, "big") + (scale * 4 // 5).to_bytes(4, "big")
    file.write_bytes(body[:at] + edited + body[at + 8 :])  # 0.8 s to 2.4 s
    film = decode(file, tmp_path / "cache")
    assert len(film.times) == 40
    assert film.end == pytest.approx(1.6)
    assert video.probe(file).duration == pytest.approx(film.end)
    np.testing.assert_allclose(film.frames[0].mean(), films.level(20), atol=4)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_header_and_frames_agree_on_the_end_also_where_the_first_is_late(tmp_path: Path, name: str) -> None:
    ticks = None if name == "a.avi" else [500, 540, 700, 710, 1500]
    file = films.write(tmp_path / name, 5, ticks=ticks, at=[20, 21, 22, 30, 40] if ticks is None else None)
    film = decode(file, tmp_path / "cache")
    assert video.probe(file).duration == pytest.approx(film.end, abs=2e-3)
    assert film.end > film.times[-1]


def test_a_name_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films.write(tmp_path / "a.mp4").rename(tmp_path / "x:1.mp4")
    films.picture(tmp_path, (32, 32), "http:1.png")
    monkeypatch.chdir(tmp_path)
    assert video.probe("x:1.mp4").frames == 12
    assert len(decode("x:1.mp4", "cache").times) == 12
    assert decode("http:1.png", "c:1").size == (32, 32)


# How an entry of the cache may be damaged.
DAMAGE: dict[str, tuple[str, int | None]] = {
    "frame": ("frames.npy", -1),
    "header": ("frames.npy", 20),
    "cut": ("frames.npy", None),
    "time": ("times.npy", -1),
    "cut times": ("times.npy", None),
    "head": ("film.json", 2),
    "length": ("film.json", 30),
    "cut head": ("film.json", None),
}


@pytest.mark.parametrize("how", [*DAMAGE, "empty", "missing"])
def test_a_damaged_entry_is_decoded_anew(tmp_path: Path, how: str) -> None:
    file, cache = films.write(tmp_path / "a.mp4"), tmp_path / "cache"
    film = decode(file, cache)
    whole = {path.name: path.read_bytes() for path in film.folder.iterdir()}
    if how in DAMAGE:
        name, at = DAMAGE[how]
        body = bytearray(whole[name])
        if at is None:
            del body[len(body) // 2 :]
        else:
            body[at] ^= 4
        (film.folder / name).write_bytes(body)
    for name in whole if how in ("empty", "missing") else ():
        (film.folder / name).write_bytes(b"") if how == "empty" else (film.folder / name).unlink()
    again = decode(file, cache)
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == whole
    assert len(entries(cache)) == 1


def test_a_full_disk_leaves_no_entry_and_names_the_film(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file, cache = films.write(tmp_path / "a.mp4"), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.mp4: its frames can't be written to .*cache: File too large"):
            decode(file, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(cache) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        decode(file, tmp_path / "file" / "cache")


@given(st.floats(0, 1e4), st.floats(0.04, 100))
def test_there_and_back_stays_in_the_film_and_has_no_jump(time: float, end: float) -> None:
    here, soon = there_and_back(np.array([time, time + 1e-3]), end)
    assert 0 <= here < end
    assert abs(here - soon) <= 1e-3 + 1e-9
    assert there_and_back(np.array([2 * end + 0.01, 0.01]), end) == pytest.approx(0.01)


def test_a_picture_stands_still() -> None:
    assert there_and_back(np.array([0.0, 7.0]), math.inf).tolist() == [0.0, 0.0]


def test_the_folder_of_caches_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "here"))
    assert video.default_cache() == tmp_path / "here"
    film = decode(films.write(tmp_path / "a.mp4", 2))
    assert film.folder.parent == tmp_path / "here"
    monkeypatch.delenv("RJEPA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert video.default_cache() == tmp_path / "rjepa-triton"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert video.default_cache() == tmp_path / ".cache" / "rjepa-triton"

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match=r"no home folder is known: name a folder .* RJEPA_CACHE"):
        video.default_cache()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_film_that_is_cut_anywhere_is_named(tmp_path: Path, suffix: str) -> None:
    """Of some, a stream is left of which nothing is known, neither codec nor size."""
    whole = films.write(tmp_path / f"whole.{suffix}", 5, (32, 16)).read_bytes()
    file = tmp_path / f"film.{suffix}"
    said = set()
    for length in (*range(0, min(900, len(whole)), 3), *range(900, len(whole), 200)):
        file.write_bytes(whole[:length])
        try:
            decode(file, tmp_path / "cache")
        except VideoError as error:
            said.add(str(error))
    assert all(file.name in each for each in said)
    if suffix == "mp4":
        assert any("its header doesn't say how its frames are coded" in each for each in said)
