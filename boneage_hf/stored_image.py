"""A radiograph as a prepared data set stores it: the file itself, its pixels without loss, or a reduced JPEG."""

import hashlib
import io
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .radiograph import Radiograph

#: Quality of the JPEG files that reduced images are stored as.
JPEG_QUALITY = 95

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg"}

# PNG chunks that hold no text: https://www.w3.org/TR/png-3/#11Chunks
_PLAIN_PNG_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"pHYs", b"bKGD"}
# JPEG segments, as PIL names them, that hold no text: JFIF and Adobe's colour transform.
_PLAIN_JPEG_SEGMENTS = {"APP0", "APP14"}


@dataclass(frozen=True)
class StoredImage:
    """An image as it goes into a shard. ``changed`` is False if ``content`` is the file, byte for byte."""

    content: bytes
    suffix: str
    changed: bool


class Spool:
    """Re-encoded images between the checking and the writing pass, in an unnamed temporary file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[int, tuple[int, int, str] | str] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, row: int, stored: StoredImage) -> None:
        if stored.changed:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(stored.content)
            self._places[row] = (offset, len(stored.content), stored.suffix)
        else:
            self._places[row] = stored.suffix

    def get(self, row: int, path: Path) -> StoredImage | None:
        """The image of a row that was checked in this run; None for any other."""
        place = self._places.get(row)
        if place is None:
            return None
        if isinstance(place, str):
            return StoredImage(path.read_bytes(), place, changed=False)
        offset, length, suffix = place
        self._file.seek(offset)
        return StoredImage(self._file.read(length), suffix, changed=True)


def content_hash(image: Image.Image) -> str:
    """SHA-256 over width, height and grey levels, so that the same picture is found under another compression."""
    return hashlib.sha256(struct.pack("<II", *image.size) + image.tobytes()).hexdigest()


def store(content: bytes, radiograph: Radiograph, *, size: int | None, keep_text: bool = False) -> StoredImage:
    """The image as it is stored: reduced (JPEG), the file itself, or its pixels without loss (PNG)."""
    image = radiograph.image
    buffer = io.BytesIO()
    if size is not None and max(image.size) > size:
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image.resize((width, height), Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        return StoredImage(buffer.getvalue(), ".jpg", changed=True)
    if _is_plain_grey(content, radiograph, keep_text=keep_text):
        return StoredImage(content, _SUFFIXES[radiograph.file_format], changed=False)
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
    return StoredImage(buffer.getvalue(), ".png", changed=True)


def _is_plain_grey(content: bytes, radiograph: Radiograph, *, keep_text: bool) -> bool:
    """Whether the file may be stored as it is: 8-bit grey PNG or JPEG, upright, without text about a person."""
    if radiograph.file_format not in _SUFFIXES or radiograph.bits_stored != 8 or radiograph.has_colour:
        return False
    with Image.open(io.BytesIO(content)) as header:
        if header.mode != "L" or "transparency" in header.info:
            return False
        if radiograph.file_format == "JPEG":
            return {name for name, _ in getattr(header, "applist", [])} <= _PLAIN_JPEG_SEGMENTS
    return keep_text or _png_chunks(content) <= _PLAIN_PNG_CHUNKS


def _png_chunks(content: bytes) -> set[bytes]:
    """Names of the chunks of a PNG file (which has been read in full before)."""
    names, place = set(), 8
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        names.add(name)
        place += 12 + length
        if name == b"IEND":
            break
    return names
