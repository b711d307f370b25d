"""Several hundred hostile files, the same on every machine: `python tests/hostile.py FOLDER` writes them for a look.

Bombs that unpack to endlesss, files cut off, empty or renamed, and headers of PNG, JPEG, TIFF, DICOM and ZIP with
values that cannot be. Nothing here is a radiograph; the one name in them is `drawn.PATIENT_NAME`.
"""

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from drawn import PATIENT_NAME, deep_picture, dicom, picture, png, png_chunk, saved, tiff
from PIL import Image, PngImagePlugin
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

SEED = 2026
GREY, DEEP = picture(), deep_picture()
_PERSON = {
    "PatientSex": "F",
    "PatientBirthDate": "20100315",
    "StudyDate": "20200315",
    "PatientComments": PATIENT_NAME,
    "Laterality": "L",
}


def _sound() -> dict[str, bytes]:
    """One sound file of each kind, with a name where the format has room for one."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", PATIENT_NAME, zip=True)
    jpeg = saved(Image.fromarray(GREY), "JPEG", comment=PATIENT_NAME)
    codestream = saved(Image.fromarray(GREY), "JPEG2000", irreversible=False, no_jp2=True)
    return {
        "png": saved(Image.fromarray(GREY), "PNG", pnginfo=text),
        "png16": png(DEEP),
        "png16rgb": png(np.repeat(DEEP[..., None], 3, axis=2)),
        "png-palette": saved(Image.fromarray(GREY).convert("P"), "PNG", transparency=3),
        "jpeg": jpeg,
        "jpeg-progressive": saved(Image.fromarray(GREY).convert("RGB"), "JPEG", progressive=True),
        "tiff": saved(Image.fromarray(DEEP), "TIFF", description=PATIENT_NAME),
        "tiff-big-endian": tiff(DEEP, big_endian=True),
        "tiff-float": tiff(DEEP.astype(np.float32)),
        "tiff-lzw": saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": saved(Image.fromarray(GREY), "TIFF", compression="jpeg"),
        "bigtiff": saved(Image.fromarray(GREY), "TIFF", big_tiff=True),
        "dicom": dicom(DEEP, bits_stored=12, elements=_PERSON | {"WindowCenter": 900, "WindowWidth": 1800}),
        "dicom-implicit": dicom(GREY, elements=_PERSON, syntax=ImplicitVRLittleEndian),
        "dicom-big-endian": dicom(DEEP, elements=_PERSON, syntax=ExplicitVRBigEndian),
        "dicom-bare": dicom(GREY, elements=_PERSON, preamble=False),
        "dicom-deflated": dicom(GREY, elements=_PERSON, syntax=DeflatedExplicitVRLittleEndian),
        "dicom-rle": dicom(GREY, elements=_PERSON, syntax=RLELossless),
        "dicom-jpeg": dicom(GREY, elements=_PERSON, syntax=JPEGBaseline8Bit, codestream=jpeg),
        "dicom-jpeg2000": dicom(GREY, elements=_PERSON, syntax=JPEG2000Lossless, codestream=codestream),
        "zip": _zip({"a.png": png(GREY), f"{PATIENT_NAME}/b.dcm": dicom(GREY, elements=_PERSON)}),
    }


def _zip(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # ZipInfo: no time of today
    return stream.getvalue()


def _zeros(megabytes: int) -> bytes:
    """A zlib stream of so many megabytes of zeros; a few kilobytes of memory to make."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def _png_of(width: int, height: int, *chunks: bytes, depth: int = 8) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def _bombs() -> Iterator[tuple[str, bytes]]:
    endless = _zeros(200)
    yield "png-too-large", _png_of(30_000, 30_000, png_chunk(b"IDAT", endless))
    yield "png-largest-sides", _png_of(2**31 - 1, 2**31 - 1, png_chunk(b"IDAT", endless[:1000]))
    yield "png-more-data-than-pixels", _png_of(64, 64, png_chunk(b"IDAT", endless))
    yield "png-text-bomb", _png_of(64, 64, png_chunk(b"zTXt", b"a\0\0" + endless), png_chunk(b"IDAT", _zeros(1)))
    yield (
        "png-itxt-bomb",
        _png_of(64, 64, png_chunk(b"iTXt", b"a\0\1\0\0\0" + endless), png_chunk(b"IDAT", _zeros(1))),
    )
    yield "png-profile-bomb", _png_of(64, 64, png_chunk(b"iCCP", b"a\0\0" + endless), png_chunk(b"IDAT", _zeros(1)))
    yield "png-of-chunks", _png_of(64, 64, png_chunk(b"tEXt", b"a\0b") * 100_000)
    yield (
        "tiff-too-large",
        tiff(GREY).replace(struct.pack("<HHIHH", 256, 3, 1, 48, 0), struct.pack("<HHII", 256, 4, 1, 2**31)),
    )
    sides = {"Rows": 60_000, "Columns": 60_000}
    yield "dicom-too-large", dicom(GREY, elements=sides)
    yield "dicom-frames", dicom(GREY, elements={"NumberOfFrames": 2**31 - 1})
    raw = zlib.compressobj(1, zlib.DEFLATED, -15)
    whole = dicom(GREY, syntax=DeflatedExplicitVRLittleEndian)
    start = 132 + 12 + struct.unpack_from("<I", whole, 140)[0]
    body = b"".join(raw.compress(bytes(2**20)) for _ in range(200)) + raw.flush()
    yield "dicom-deflated-bomb", whole[:start] + body
    run = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * 2_000_000
    yield "dicom-rle-bomb", dicom(GREY, syntax=RLELossless, codestream=run)
    nested = b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x08\x00\x10\x11SQ\x00\x00\xff\xff\xff\xff" * 5000
    yield "dicom-nested", dicom(GREY)[:340] + b"\x08\x00\x10\x11SQ\x00\x00\xff\xff\xff\xff" + nested
    yield "zip-bomb", _zip({"a.png": bytes(50 * 2**20)})
    yield "zip-of-zips", _zip({f"{number}.zip": _zip({"a.png": bytes(2**20)}) for number in range(9)})
    yield "zip-of-many", _zip({str(number): b"" for number in range(20_000)})
    yield "zip-outside", _zip({"../a.png": png(GREY), "/etc/passwd": b"x", "C:\\a.png": b"x"})


def _renamed() -> Iterator[tuple[str, bytes]]:
    yield from (
        ("empty", b""),
        ("one-byte", b"\x00"),
        ("zeros", bytes(100_000)),
        ("text", f"{PATIENT_NAME}\n".encode() * 50),
        ("html", f"<!DOCTYPE html><script>{PATIENT_NAME}</script>".encode()),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("xml-bomb", b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "' + b"b" * 9999 + b'">]><a>&b;&b;&b;</a>'),
        ("pdf", b"%PDF-1.7\n" + bytes(99)),
        ("elf", b"\x7fELF" + bytes(99)),
        ("pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"),
        ("preamble-only", bytes(128) + b"DICM"),
        ("preamble-and-text", bytes(128) + b"DICM" + PATIENT_NAME.encode() * 20),
    )


def _damaged(draw: np.random.Generator, each: int) -> Iterator[tuple[str, bytes]]:
    """Of each sound file ``each`` cut off, and twice as many with changed bytes, most of them in the front."""
    for name, whole in _sound().items():
        for number in range(each):
            yield f"{name}-cut-{number}", whole[: draw.integers(1, len(whole))]
        for number in range(2 * each):
            data = bytearray(whole)
            reach = min(len(data), 900 if name.startswith("dicom") else 120) if number % 3 else len(data)
            for place in draw.integers(0, reach, draw.integers(1, 9)):
                # extremes find more than any value: lengths, counts and sides that cannot be
                data[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, int(draw.integers(256))])
            if name.startswith("png") and number % 2:
                data = _with_right_checksums(data)
            yield f"{name}-changed-{number}", bytes(data)


def _with_right_checksums(data: bytearray) -> bytearray:
    """So that the changed chunks of a PNG get past the first check."""
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return data


def hostile_files(each: int = 10) -> Iterator[tuple[str, bytes]]:
    """(name, content) one after another; 30 bombs and renamed files, and ``3 * each`` damaged ones of each kind."""
    yield from _bombs()
    yield from _renamed()
    yield from _damaged(np.random.default_rng(SEED), each)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in hostile_files():
        (folder / name).write_bytes(content)
    print(f"{len(list(folder.iterdir()))} files in {folder}")
