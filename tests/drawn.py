"""Small drawn grey pictures and the files they come in, for tests of reading: no radiograph, no person, no randomness.

PIL writes neither 16-bit colour nor the rarer TIFF layouts, so `png` and `tiff` write plain ones themselves.
"""

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

#: What a header says about a person in these files. It must never turn up anywhere.
PATIENT_NAME = "Zaphod^Secretname"


def deep_picture(height: int = 60, width: int = 48) -> np.ndarray:
    """(H, W) uint16, about 300 to 3,900: a slope with five bright fingers; no two corners alike, no symmetry."""
    down, across = np.mgrid[0:height, 0:width]
    slope = 300 + 900 * down / height + 400 * across / width
    fingers = 2200 * (np.cos(across / width * 31.0) > 0.3) * (down > height / 4)
    return np.asarray(slope + fingers, dtype=np.uint16)


def picture(height: int = 60, width: int = 48) -> np.ndarray:
    """(H, W) uint8: `deep_picture` divided by 16, so that it does not use the whole range either."""
    return (deep_picture(height, width) // 16).astype(np.uint8)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The bytes of the file that PIL writes."""
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    """One PNG chunk with length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, C), uint8 or uint16, as PNG with C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA."""
    stack = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = stack.shape
    lines = [b"\x00" + line.astype(stack.dtype.newbyteorder(">")).tobytes() for line in stack]
    header = struct.pack(
        ">IIBBBBB", width, height, 8 * stack.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0
    )
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"".join(lines))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(
    pixels: np.ndarray,
    *,
    photometric: int | None = None,
    big_endian: bool = False,
    extra: dict[int, int] | None = None,
) -> bytes:
    """(H, W) or (H, W, C) of any integer or float type as an uncompressed TIFF of one strip.

    ``photometric`` defaults to BlackIsZero (1) or RGB (2); ``extra`` adds tags of type SHORT.
    """
    stack = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = stack.shape
    order: Literal["<", ">"] = ">" if big_endian else "<"
    body = stack.astype(stack.dtype.newbyteorder(order)).tobytes()
    sample_format = {"u": 1, "i": 2, "f": 3}[stack.dtype.kind]
    tags: dict[int, list[int]] = {
        256: [width],
        257: [height],
        258: [8 * stack.dtype.itemsize] * channels,
        259: [1],
        262: [photometric if photometric is not None else (1 if channels < 3 else 2)],
        277: [channels],
        278: [height],
        339: [sample_format] * channels,
    }
    if channels in (2, 4):
        tags[338] = [2]
    tags |= {tag: [value] for tag, value in (extra or {}).items()}
    long_tags = {273: 0, 279: len(body)}
    entries = len(tags) + len(long_tags)
    behind = 8 + 2 + 12 * entries + 4
    overflow = b""
    rows = {}
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", behind + len(overflow))
            overflow += packed
        else:
            place = packed.ljust(4, b"\x00")
        rows[tag] = struct.pack(f"{order}HHI", tag, 3, len(values)) + place
    long_tags[273] = behind + len(overflow)
    for tag, value in long_tags.items():
        rows[tag] = struct.pack(f"{order}HHII", tag, 4, 1, value)
    start = (b"MM\x00*" if big_endian else b"II*\x00") + struct.pack(f"{order}IH", 8, entries)
    return start + b"".join(rows[tag] for tag in sorted(rows)) + b"\x00" * 4 + overflow + body


def dicom(
    pixels: np.ndarray,
    *,
    bits_stored: int | None = None,
    elements: dict[str, Any] | None = None,
    syntax: UID = ExplicitVRLittleEndian,
    codestream: bytes | None = None,
    preamble: bool = True,
) -> bytes:
    """(H, W) or (H, W, 3), 8 or 16 bits, signed or not, as a DICOM file with a patient's name in it.

    ``elements`` sets or (None) removes elements by keyword; ``codestream`` is the compressed frame of a compressed
    ``syntax`` (RLE is compressed here); without ``preamble`` the bare data set is written.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = "CR"
    dataset.PatientName = PATIENT_NAME
    dataset.PatientID = PATIENT_NAME
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = bits_stored or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in (elements or {}).items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    if codestream is not None:
        dataset.PixelData = encapsulate([codestream])
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    dataset["PixelData"].VR = "OB" if codestream is not None or pixels.dtype.itemsize == 1 else "OW"
    stream = io.BytesIO()
    if syntax == RLELossless and codestream is None:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)
    if preamble:
        dcmwrite(stream, dataset, enforce_file_format=True)
    else:
        del dataset.file_meta
        dcmwrite(stream, dataset, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return stream.getvalue()
