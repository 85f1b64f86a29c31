"""Pictures as 8-bit RGB. A file is a picture by its content, whatever its name is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Names that pictures have: a file with such a name that isn't one is a broken picture, not a broken film.
IMAGES = frozenset(
    (".avif", ".bmp", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MOVING = ("AVIF", "GIF", "PNG", "WEBP")  # may hold a film, which is decoded as one
# Modes of 8 bits or fewer a channel, which Pillow converts to RGB as they look.
PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
# What a picture begins with that this Pillow may have been built without; the first 4 bytes may be any.
UNREADABLE = {b"ftyp" + brand: "AVIF or HEIC" for brand in (b"avif", b"heic", b"heix", b"mif1", b"msf1")}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF


class VideoError(ValueError):
    """A film or picture is missing, empty or broken. The message begins with its file's name."""


def is_picture(file: Path) -> bool:
    """Whether a file holds a picture. Raises VideoError for one that can't be read; False for all else."""
    try:
        with _open(file) as image:
            return not (getattr(image, "is_animated", False) and image.format in MOVING)
    except UnidentifiedImageError:
        with file.open("rb") as body:
            begin = body.read(12)[4:]
        if begin in UNREADABLE:
            raise VideoError(
                f"{file}: not a picture that can be read: this Pillow doesn't read {UNREADABLE[begin]}; "
                "save it as PNG"
            ) from None
        if file.suffix.lower() in IMAGES:
            raise VideoError(f"{file}: not a picture that can be read: its format isn't known") from None
        return False
    except Exception as error:  # Pillow's readers of broken files raise what they meet
        raise VideoError(f"{file}: not a picture that can be read: {error}") from error


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """The picture, upright. Raises VideoError if it, or what is done with it in the block, fails."""
    try:
        with _open(file) as image:
            yield ImageOps.exif_transpose(image)  # cameras say which way is up
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"{file}: not a picture that can be read: {error}") from error


def rgb(file: Path, size: tuple[int, int]) -> np.ndarray:
    """The picture as (H, W, 3) uint8, resized to (width, height).

    16-bit pictures are scaled by their bit depth. Raises VideoError for a picture of floating-point or 32-bit values,
    whose scale isn't known, for one with transparent pixels or several pages, and for what can't be read.
    """
    with opened(file) as image:
        return np.asarray(_plain(file, image).resize(size, Image.Resampling.LANCZOS))


def _open(file: Path) -> Image.Image:
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tags that are not used
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _plain(file: Path, image: Image.Image) -> Image.Image:
    """The picture as RGB with 8 bits a channel."""
    with _open(file) as raw:  # what was turned upright has lost its format and tags
        kind, tags = raw.format, getattr(raw, "tag_v2", {})
        pages = getattr(raw, "n_frames", 1) if kind == "TIFF" else 1
    if pages > 1:
        raise VideoError(f"{file}: it has {pages} pages; save the one that was shown as a picture of its own")
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM"))
    if sixteen:
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        values = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
        if tags.get(PHOTOMETRIC) == 0:  # white is 0
            values = 255 - values
        return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode not in PLAIN:
        raise VideoError(
            f"{file}: it has values of the kind {image.mode!r}, whose scale isn't known; save it with 8 or 16 bits a "
            "channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise VideoError(f"{file}: it has transparent pixels; save it as it was shown, without them")
    return image.convert("RGB")
