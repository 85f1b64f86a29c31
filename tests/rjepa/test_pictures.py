"""Pictures: every mode looks as it does elsewhere or is refused, and a picture is told by its content."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import films
import numpy as np
import PIL
import pytest
from PIL import Image, features

from rjepa_triton.rjepa import video
from rjepa_triton.rjepa.video import VideoError, decode

GREYS = np.array([[0, 65, 130, 195, 255]], dtype=np.uint8)
DEEP = GREYS.astype(np.uint16) * 257


def decoded(file: Path) -> list[int]:
    """The greys of a picture's first row."""
    frames = decode(file, file.parent / "cache").frames
    assert (frames == frames[..., :1]).all()
    return frames[0, 0, :, 0].tolist()


def png16(file: Path) -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 5, 1, 16, 0, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def tiff(file: Path, values: np.ndarray, bits: int, photometric: int) -> None:
    body = values.astype("<u2").tobytes() if bits == 16 else twelve(values)
    tags = {256: 5, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(body)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    file.write_bytes(head + body + struct.pack("<H", len(tags)) + entries + bytes(4))


def twelve(values: np.ndarray) -> bytes:
    digits = "".join(f"{value:03x}" for value in values.ravel().tolist())
    return bytes.fromhex(digits + "0" * (len(digits) % 2))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    png16(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + DEEP.astype(">u2").tobytes())
    Image.fromarray(DEEP).save(tmp_path / "a.tif")
    tiff(tmp_path / "b.tif", DEEP, 16, 1)
    tiff(tmp_path / "c.tif", 65535 - DEEP, 16, 0)  # white is 0
    for name in ("a.png", "a.pgm", "a.tif", "b.tif", "c.tif"):
        assert decoded(tmp_path / name) == GREYS[0].tolist(), name
    tiff(tmp_path / "d.tif", np.rint(GREYS / 255 * 4095).astype(np.uint16), 12, 1)
    assert decoded(tmp_path / "d.tif") == GREYS[0].tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_8_bits_look_alike(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    Image.fromarray(GREYS).convert("RGB").convert("L" if mode in ("LA", "1") else "RGB").convert(
        mode, palette=Image.Palette.ADAPTIVE
    ).save(tmp_path / name)
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 can't read the YCbCr that it writes as TIFF")
    if mode != "1":
        np.testing.assert_allclose(decoded(tmp_path / name), GREYS[0], atol=2)
    else:
        assert set(decoded(tmp_path / name)) <= {0, 255}


def test_what_has_no_known_scale_is_refused(tmp_path: Path) -> None:
    Image.fromarray((GREYS / 255).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(GREYS.astype(np.int32)).save(tmp_path / "long.tif")
    Image.new("LAB", (5, 5)).save(tmp_path / "lab.tif")
    for name, kind in (("float", "F"), ("long", "I"), ("lab", "LAB")):
        with pytest.raises(
            VideoError, match=rf"{name}\.tif: it has values of the kind '{kind}', whose scale"
        ):
            decode(tmp_path / f"{name}.tif", tmp_path / "cache")
    pages = [Image.fromarray(GREYS)] * 2
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(VideoError, match=r"pages\.tif: it has 2 pages"):
        decode(tmp_path / "pages.tif", tmp_path / "cache")
    Image.new("RGBA", (5, 5), (1, 2, 3, 200)).save(tmp_path / "glass.png")
    with pytest.raises(VideoError, match=r"glass\.png: it has transparent pixels"):
        decode(tmp_path / "glass.png", tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPG", "a.mp4", "a", "a.gif", "a.webp", "a.avif", "a.jp2", "x:1.bmp"]
)
def test_a_picture_is_told_by_its_content(tmp_path: Path, name: str) -> None:
    kinds = {".gif": "GIF", ".webp": "WEBP", ".avif": "AVIF", ".jp2": "JPEG2000", ".bmp": "BMP"}
    kind = kinds.get(Path(name).suffix, "JPEG")
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(kind, "pil")):
        pytest.skip(f"this Pillow has no {kind}")
    Image.new("RGB", (32, 32), (130, 130, 130)).save(tmp_path / name, format=kind)
    assert video.probe(tmp_path / name) == video.Info(32, 32, np.inf, 1)
    np.testing.assert_allclose(decoded(tmp_path / name), 130, atol=3)


def test_a_film_is_told_by_its_content(tmp_path: Path) -> None:
    films.write(tmp_path / "a.mp4").rename(tmp_path / "a.png.film")
    assert len(decode(tmp_path / "a.png.film", tmp_path / "cache").times) == 12
    still = [Image.new("L", (32, 32), k) for k in (0, 100, 200)]
    still[0].save(tmp_path / "a.gif", save_all=True, append_images=still[1:], duration=100)
    film = decode(tmp_path / "a.gif", tmp_path / "cache")
    assert film.times.tolist() == pytest.approx([0, 0.1, 0.2])
    for name in ("a.tga", "a.pcx"):
        still[0].convert("RGB").save(tmp_path / name)
        with pytest.raises(
            VideoError, match=rf"{name}: (it is a picture in a format that isn't read|not a film)"
        ):
            decode(tmp_path / name, tmp_path / "cache")


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_named_or_read(tmp_path: Path) -> None:
    """600 damaged files: an error of another type, or without the file's name, would be a fault."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        noise.save(tmp_path / "whole", format=kind)
        whole = (tmp_path / "whole").read_bytes()
        file = tmp_path / f"a.{kind.lower()}"
        for k in range(100):
            body = bytearray(whole)
            if k % 3:
                for at in rng.integers(0, min(len(body), 200 if k % 2 else len(body)), 3):
                    body[at] ^= 1 << int(rng.integers(8))
            else:
                del body[int(rng.integers(len(body))) :]
            file.write_bytes(body)
            said = f"{file}: "
            try:
                if video.probe(file).width < 1000:
                    list(video._frames(file, (8, 8)))
            except VideoError as error:
                said = str(error)
            assert said.startswith(f"{file}: ")
