"""One file with a radiograph in, one grey 8-bit image out: PNG, JPEG, TIFF or DICOM, recognised by content.

What arrives at the model must not depend on the container. The same picture stored as PNG, TIFF or DICOM gives the
same pixels: 8-bit grey is handed on untouched, deeper data is windowed by one rule (`window_by_own_range`), and what a
DICOM header says about display (modality LUT, VOI window, MONOCHROME1) is carried out. A file that cannot be read
without guessing is refused with one sentence. Nothing that a header or a file name says about a person is kept, logged
or put into a message.

Colour profiles and gamma tags are not applied: exports of radiographs carry those of the exporting screen, if any.
"""

import calendar
import datetime
import io
import json
import logging
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageChops

from .errors import InputError
from .sex import Sex

FileFormat = Literal["PNG", "JPEG", "TIFF", "DICOM"]

#: Most pixels in one image: a 35 x 43 cm film digitised at 50 micrometres has 60 million; a hand is far below.
#: Checked against the header, before any pixel is decoded.
MAX_PIXELS = 64_000_000

#: Most bytes in one file (128 MiB): an uncompressed 16-bit grey image of MAX_PIXELS just fits.
MAX_FILE_BYTES = 128 * 1024 * 1024

#: Longest that gdcm may take for one image; one of MAX_PIXELS takes it a few seconds.
GDCM_SECONDS = 60.0

#: Most address space of the process in which gdcm decodes (4 GiB): libraries, and ten copies of the largest image.
GDCM_MEMORY_BYTES = 4 * 1024**3

#: Shortest side in pixels: the backbones reduce by 32, so a smaller image has not one cell of detail.
MIN_SIDE = 32

#: One pixel in this many may lie outside the own-range window at either end: a dead detector line (1 / width of the
#: image) and hot pixels then do not set the window, while markers and bone, being far larger, stay inside it.
OUTLIERS_ONE_IN = 1000

#: Channels of a grey picture that went through colour JPEG or a scanner differ by a few grey levels (of 255); from
#: here on, in more than one pixel in OUTLIERS_ONE_IN, the picture counts as coloured.
COLOUR_TOLERANCE = 12

#: Text chunk ``Description`` and ``Software`` of the PNG files that `phantom.py` draws.
PHANTOM_MARK = "boneage-hf drawn phantom, not a radiograph"

#: Oldest chronological age that is prefilled (20 years): hands are grown by then, and birth dates such as 1900-01-01
#: are placeholders of anonymised files.
MAX_AGE_MONTHS = 240.0

# Longest side of the thumbnail on which `colour_share` looks; a coloured note of a few letters is a hundredth of it.
_COLOUR_SIDE = 128

#: ITU-R BT.601 luma in 1/65536, as PIL's ``convert("L")`` uses it; the sum is 65536, so equal channels stay exact.
_LUMA = (19595, 38470, 7471)

_ACCEPTED = "give a PNG, JPEG, TIFF or DICOM file"
_EXPORT = "export it from the viewer as 8- or 16-bit greyscale PNG"

# Only what the pixels need: names, dates and identifiers of a person are skipped over and never parsed.
_DICOM_TAGS = {
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "PlanarConfiguration": 0x00280006,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "PixelPaddingValue": 0x00280120,
    "PixelPaddingRangeLimit": 0x00280121,
    "WindowCenter": 0x00281050,
    "WindowWidth": 0x00281051,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "VOILUTFunction": 0x00281056,
    "ModalityLUTSequence": 0x00283000,
    "VOILUTSequence": 0x00283010,
    "PixelData": 0x7FE00010,
}
# What `read_prefill` takes from a header, and the whole of it.
_PREFILL_TAGS = {
    "StudyDate": 0x00080020,
    "PatientBirthDate": 0x00100030,
    "PatientSex": 0x00100040,
    "Laterality": 0x00200060,
    "ImageLaterality": 0x00200062,
}
_DEFLATED = "1.2.840.10008.1.2.1.99"

# One line of JSON and the encapsulated pixel data in, an array in numpy's format out.
_GDCM_SCRIPT = """
import io, json, sys
about = json.loads(sys.stdin.buffer.readline())
sys.path[:] = about["path"]
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (about["memory"], about["memory"]))
except (ImportError, OSError, ValueError):
    pass  # Windows has no such limits
import numpy, pydicom.pixels
decoder = pydicom.pixels.get_decoder(about["syntax"])
pixels, _ = decoder.as_array(sys.stdin.buffer.read(), index=0, decoding_plugin="gdcm", **about["options"])
whole = io.BytesIO()
numpy.save(whole, pixels, allow_pickle=False)
sys.stdout.buffer.write(whole.getbuffer())
"""

# What PIL and pydicom raise on damaged files, seen by flipping bits; both libraries document none of it.
_DECODER_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_FOREIGN = (
    (rb"%PDF", "a PDF"),
    (rb"GIF8[79]a", "a GIF"),
    (rb"RIFF....WEBP", "a WebP"),
    (rb"PK(\x03\x04|\x05\x06)", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"\x93NUMPY", "a numpy array"),
    (rb"BM.{4}\x00{4}", "a BMP"),
    (rb"....ftyp", "a HEIC, AVIF or video"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a bare JPEG 2000"),
    (rb"\x89HDF", "an HDF5"),
    (rb"version https://git-lfs", "a Git LFS pointer (fetch the real one with `git lfs pull`), not an image"),
)

# A scheme has two letters or more, so that a Windows drive is none; pathlib folds "//" to "/".
_URL = re.compile(r"\s*(data:|[a-z][a-z0-9+.-]+:/)", re.IGNORECASE)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Radiograph:
    """One radiograph as it is to be looked at.

    Attributes:
        image: mode ``"L"``, 0..255, upright by its EXIF orientation, MONOCHROME1 already inverted; without metadata.
        file_format: ``"PNG"``, ``"JPEG"``, ``"TIFF"`` or ``"DICOM"``.
        bits_stored: bits per sample in the file (1 to 32; DICOM Bits Stored; 8 for palettes).
        has_colour: the source has channels that differ by more than COLOUR_TOLERANCE grey levels in more than one
            pixel in OUTLIERS_ONE_IN. Grey pictures saved as RGB, also through JPEG, are not coloured.
        colour_share: of a coloured source see `colour_share`, else 0.
        drawn_phantom: the file says that it was drawn by `phantom.py`.
    """

    image: Image.Image
    file_format: FileFormat
    bits_stored: int
    has_colour: bool
    colour_share: float = 0.0
    drawn_phantom: bool = False


def read(source: str | os.PathLike[str] | bytes | BinaryIO) -> Radiograph:
    """Read one radiograph from a path, the bytes of a file, or a file opened in binary mode.

    Transparent pixels become black. 16-bit and float data without a stated window are windowed by
    `window_by_own_range`; DICOM data with a window (or VOI LUT, which goes first) are shown through it.

    Raises:
        InputError: if the source is a URL, is missing, empty, too large, truncated or damaged, is no PNG, JPEG, TIFF
            or DICOM, holds several frames, holds NaN or infinity, or is smaller than MIN_SIDE.
    """
    data = content_of(source)
    with _quiet:
        if data[128:132] == b"DICM":
            return _read_dicom(data, has_prefix=True)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _read_with_pil(data, "PNG")
        if data.startswith(b"\xff\xd8\xff"):
            return _read_with_pil(data, "JPEG")
        if data.startswith(_TIFF_STARTS):
            return _read_with_pil(data, "TIFF")
        for pattern, name in _FOREIGN:
            if re.match(pattern, data, re.DOTALL):
                raise InputError(f"This is {name} file: {_ACCEPTED}.")
        if _may_be_bare_dicom(data):
            return _read_dicom(data, has_prefix=False)
        if _is_text(data):
            raise InputError(f"This is a text file: {_ACCEPTED}.")
        raise InputError(f"The content is of no known image format: {_ACCEPTED}.")


@dataclass(frozen=True)
class Prefill:
    """What a DICOM header says about the child that the reader may otherwise type; None where it says nothing usable.

    Attributes:
        sex: from Patient's Sex ``F`` or ``M``.
        chronological_age_months: 0 to MAX_AGE_MONTHS, from Patient's Birth Date and Study Date by `months_between`.
        laterality: of the hand, from Image Laterality or, without it, Laterality (``L`` or ``R``).
        unusable: names of those of the three about which the header says something, but nothing usable.
    """

    sex: Sex | None = None
    chronological_age_months: float | None = None
    laterality: Literal["left", "right"] | None = None
    unusable: tuple[Literal["sex", "chronological age", "laterality"], ...] = ()


def read_prefill(content: bytes) -> Prefill:
    """Sex, chronological age and laterality from the bytes of a DICOM file, for a person to check.

    Five elements are looked at (as PS3.6 names them: Study Date, Patient's Birth Date,
    Patient's Sex, Laterality, Image Laterality) and nothing else of the header. The dates themselves are not kept.
    Anything unclear is None: another sex than F and M, a date that is not eight digits of a real day, a study before
    birth, an age over MAX_AGE_MONTHS, two lateralities that contradict each other; `unusable` names it then. A file
    that is not DICOM, or whose header cannot be read, gives None throughout; whether its picture can be used is for
    `read` to say.
    """
    has_prefix = content[128:132] == b"DICM"
    if len(content) > MAX_FILE_BYTES or not (has_prefix or _may_be_bare_dicom(content)):
        return Prefill()
    with _quiet:
        try:
            pydicom = _import_pydicom()
        except InputError:
            return Prefill()
        try:
            tags = tuple(_PREFILL_TAGS.values())
            dataset = _dicom_dataset(pydicom, content, has_prefix=has_prefix, tags=tags)
            stored = {keyword: _plain_text(dataset.get_item(tag)) for keyword, tag in _PREFILL_TAGS.items()}
        except (*_DECODER_ERRORS, *_errors_of(pydicom)):  # InputError, a ValueError, is among them
            return Prefill()
    sexes: dict[str, Sex] = {"F": "female", "M": "male"}
    sides: dict[str, Literal["left", "right"]] = {"L": "left", "R": "right"}
    stated = {stored[keyword] for keyword in ("ImageLaterality", "Laterality")} & set(sides)
    sex = sexes.get(stored["PatientSex"])
    age = _age_at(stored["PatientBirthDate"], stored["StudyDate"])
    unusable: list[Literal["sex", "chronological age", "laterality"]] = []
    if stored["PatientSex"] and sex is None:
        unusable.append("sex")
    if stored["PatientBirthDate"] and stored["StudyDate"] and age is None:
        unusable.append("chronological age")
    if len(stated) > 1:
        unusable.append("laterality")
    return Prefill(
        sex=sex,
        chronological_age_months=age,
        laterality=sides[stated.pop()] if len(stated) == 1 else None,
        unusable=tuple(unusable),
    )


def months_between(birth: datetime.date, study: datetime.date) -> float:
    """Chronological age in months: completed calendar months, and of the month begun the part that has passed.

    A month is completed on the day of the month of birth, or on the last day of a month that is too short for it
    (born on the 31st: on 30 April). So every birthday is a whole multiple of 12. Negative if ``study`` is earlier.
    """
    months = (study.year - birth.year) * 12 + study.month - birth.month
    if study < _months_later(birth, months):
        months -= 1
    start, end = _months_later(birth, months), _months_later(birth, months + 1)
    return months + (study - start).days / (end - start).days


def _months_later(day: datetime.date, months: int) -> datetime.date:
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return datetime.date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))


def _age_at(birth: str, study: str) -> float | None:
    if not (re.fullmatch(r"[0-9]{8}", birth) and re.fullmatch(r"[0-9]{8}", study)):
        return None
    try:
        born, taken = (datetime.date(int(day[:4]), int(day[4:6]), int(day[6:])) for day in (birth, study))
        months = months_between(born, taken)
    except ValueError:  # no such day, or the calendar of Python ends
        return None
    return months if 0 <= months <= MAX_AGE_MONTHS else None


def _plain_text(element: Any) -> str:
    """The text of one raw element without its padding; empty where it is absent, nested or not ASCII."""
    value = getattr(element, "value", None)
    return value.decode("ascii", "replace").strip("\x00 ") if isinstance(value, bytes) else ""


def window_by_own_range(
    pixels: np.ndarray, *, inverted: bool = False, background: np.ndarray | None = None
) -> np.ndarray:
    """Map grey values of any depth linearly to 0..255 by the range that the picture itself uses.

    The window goes from the (k+1)-th smallest to the (k+1)-th largest value, k = number of pixels // OUTLIERS_ONE_IN;
    values outside saturate. Where these two are equal it goes from minimum to maximum; a constant picture becomes 0.
    The result does not change when all values are shifted, multiplied or, with ``inverted``, mirrored, so it is the
    same for signed and unsigned, PNG, TIFF and DICOM storage.

    Args:
        pixels: (H, W), integer or float, finite.
        inverted: high values are dark.
        background: (H, W) bool, pixels that hold no picture: left out of the range, 0 in the result.

    Returns:
        (H, W) uint8.
    """
    low, high = _own_range(pixels if background is None else pixels[~background])

    def shade(values: np.ndarray) -> np.ndarray:
        if low == high:
            return np.zeros(values.shape)
        return (high - values if inverted else values - low) / (high - low)

    grey = _map_values(pixels, shade)
    if background is not None:
        grey[background] = 0
    return grey


def _own_range(values: np.ndarray) -> tuple[float, float]:
    values = values.ravel()
    if values.size == 0:
        return 0.0, 0.0
    last = values.size - 1
    outliers = values.size // OUTLIERS_ONE_IN
    ordered = np.partition(values, (outliers, last - outliers))
    low, high = float(ordered[outliers]), float(ordered[last - outliers])
    if low == high:
        return float(values.min()), float(values.max())
    return low, high


def _map_values(pixels: np.ndarray, shade: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply ``shade`` (float64 -> float64, where 0 is black and 1 white) to every pixel; (H, W) uint8, rounded."""

    def to_bytes(values: np.ndarray) -> np.ndarray:
        return np.rint(np.clip(shade(values.astype(np.float64)) * 255.0, 0.0, 255.0)).astype(np.uint8)

    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        # A table over all 65,536 values is quicker than arithmetic on millions of pixels.
        pattern = np.dtype(f"u{pixels.dtype.itemsize}")
        every_value = np.arange(2 ** (8 * pattern.itemsize)).astype(pattern).view(pixels.dtype)
        return np.take(to_bytes(every_value), pixels.view(pattern))
    grey = np.empty(pixels.shape, dtype=np.uint8)
    for row in range(0, len(pixels), 256):  # blocks, or a float64 copy of the largest image would take half a gigabyte
        grey[row : row + 256] = to_bytes(pixels[row : row + 256])
    return grey


# --- the bytes ------------------------------------------------------------------------------------------------------


def content_of(source: object) -> bytes:
    """The bytes of a path, of bytes, or of a file opened in binary mode: at least one and at most MAX_FILE_BYTES.

    Raises:
        InputError: as `read` does for the source itself; the content is not looked at.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        data = _bytes_of_path(os.fspath(source))
    elif hasattr(source, "read"):
        data = _bytes_of_stream(source)
    else:
        raise InputError(
            f"A radiograph is read from a path, bytes or a file opened in binary mode, not {type(source).__name__}."
        )
    if not data:
        raise InputError("The file is empty (or was already read to its end): copy it again from its source.")
    if len(data) > MAX_FILE_BYTES:
        raise _too_many_bytes()
    return data


def _bytes_of_path(path: str | bytes) -> bytes:
    if _URL.match(os.fsdecode(path)):
        raise InputError("A URL is not read: download the file first and give its path.")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError("The path is a directory: give the path of one image file.")
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise InputError("The path is not a regular file: give the path of one image file.")
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise InputError("There is no file at the path: check its spelling and the current directory.") from None
    except PermissionError:
        raise InputError("The file may not be read by this user: change its permissions.") from None
    except InputError:
        raise
    except (OSError, ValueError):  # ValueError: a null character in the path
        raise InputError("The file cannot be opened: check the path and that its disk is reachable.") from None


def _bytes_of_stream(stream: Any) -> bytes:
    parts = []
    missing = MAX_FILE_BYTES + 1
    try:
        while missing > 0:
            part = stream.read(missing)  # a raw stream may return less than asked for
            if not isinstance(part, bytes | bytearray | memoryview):
                raise InputError("The file object gives no bytes: open the file in binary mode ('rb').")
            if not part:
                break
            parts.append(bytes(part))
            missing -= len(part)
    except UnicodeDecodeError:
        raise InputError("The file object gives no bytes: open the file in binary mode ('rb').") from None
    except InputError:
        raise
    except (OSError, ValueError):  # ValueError: the file is closed
        raise InputError("The file object cannot be read: open the file again in binary mode ('rb').") from None
    return b"".join(parts)


def _is_text(data: bytes) -> bool:
    start = data[:1024]
    return not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", start) and start[:256].isascii()


# --- refusals used more than once -----------------------------------------------------------------------------------


def _too_many_bytes() -> InputError:
    limit = MAX_FILE_BYTES // 1024**2
    return InputError(f"The file is larger than {limit} MiB, more than any single radiograph needs: {_EXPORT}.")


def _damaged(file_format: str) -> InputError:
    return InputError(
        f"The {file_format} file is damaged or truncated: copy it again from its source, or export it again as PNG."
    )


def _several_frames(file_format: str) -> InputError:
    return InputError(f"The {file_format} file holds several images: save the one hand radiograph alone.")


def _too_many_pixels() -> InputError:
    return InputError(
        f"The image has more than {MAX_PIXELS // 1_000_000} million pixels, more than any hand radiograph: "
        "reduce its size, or check that it is the right file."
    )


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_many_pixels()
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"The image is {width} x {height} pixels, and a side under {MIN_SIDE} pixels shows no bone: "
            "give the original radiograph, not a thumbnail."
        )


# --- PNG, JPEG, TIFF ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoded:
    """What PIL found: an 8-bit image of any mode, (H, W) numbers, or (H, W, 1 or 3) uint16 channels."""

    content: Image.Image | np.ndarray
    bits_stored: int
    turn: Image.Transpose | None
    inverted: bool = False
    background: np.ndarray | None = None
    alpha: np.ndarray | None = None


def _read_with_pil(data: bytes, file_format: FileFormat) -> Radiograph:
    # Only what the libraries do stands in the try block: an error of our own must not pass for a damaged file.
    try:
        image = Image.open(io.BytesIO(data), formats=(file_format,))
        _check_size(*image.size)
        # Of a JPEG with further pictures (MPO, from telephones) the first is, by its standard, the primary one.
        if file_format != "JPEG" and getattr(image, "is_animated", False):
            raise _several_frames(file_format)
        decoded = _decode_with_pil(image, data, file_format)
    except InputError:
        raise
    except Image.DecompressionBombError:  # PIL's own limit lies above MAX_PIXELS and comes first
        raise _too_many_pixels() from None
    except Image.UnidentifiedImageError:
        if file_format == "TIFF":
            raise InputError(
                "The TIFF file is damaged, or its pixel layout is not supported: save it as 8- or 16-bit greyscale "
                "TIFF or PNG."
            ) from None
        raise _damaged(file_format) from None
    except _DECODER_ERRORS:
        raise _damaged(file_format) from None

    content, share = decoded.content, None
    if isinstance(content, Image.Image):
        grey, share = _grey_of_pil(content)
    elif content.ndim == 3:
        pixels, share = _grey_of_wide_colour(content, decoded.alpha)
        grey = Image.fromarray(pixels)
    else:
        if content.dtype.kind == "f" and not np.isfinite(content).all():
            raise InputError("The TIFF file holds values that are not numbers (NaN or infinity): export it again.")
        pixels = window_by_own_range(content, inverted=decoded.inverted, background=decoded.background)
        grey = Image.fromarray(pixels)
    if decoded.turn is not None:
        grey = grey.transpose(decoded.turn)
    return Radiograph(
        _without_metadata(grey),
        file_format,
        decoded.bits_stored,
        has_colour=share is not None,
        colour_share=share or 0.0,
        drawn_phantom=file_format == "PNG" and has_phantom_mark(image),
    )


def has_phantom_mark(image: Image.Image) -> bool:
    """Whether an image says that it was drawn by `phantom.py`."""
    return PHANTOM_MARK in (image.info.get("Description"), image.info.get("Software"))


def _decode_with_pil(image: Image.Image, data: bytes, file_format: FileFormat) -> _Decoded:
    tiff_tags = getattr(image, "tag_v2", {})
    if file_format == "TIFF":
        bits_stored = int(_first(tiff_tags.get(258, 1)))
    elif file_format == "PNG" and image.mode != "P":
        bits_stored = data[24]  # IHDR: signature 8, length 4, "IHDR" 4, width 4, height 4, bit depth
    else:
        bits_stored = 8
    sample_format = int(_first(tiff_tags.get(339, 1)))  # 1 unsigned, 2 signed, 3 float
    mode, wide_raw_mode = image.mode, _wide_colour_raw_mode(image)
    if mode in ("CMYK", "LAB", "HSV"):
        raise InputError("The picture is stored in printing colours: save it as 8- or 16-bit greyscale.")
    # PIL reads 16-bit channels in separate planes wrongly, and undoes premultiplication at 8 bits.
    is_rare = tiff_tags.get(284, 1) != 1 or wide_raw_mode is None or wide_raw_mode.startswith("RGBa")
    if mode in ("RGB", "RGBA") and bits_stored == 16 and is_rare:
        raise InputError("The TIFF file stores 16-bit colour in a rare layout: save it as 16-bit greyscale.")

    image.load()
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))  # PIL has already turned TIFF, and says so here
    if wide_raw_mode is not None:
        channels, alpha = _decode_wide_colour(data, file_format, wide_raw_mode)
        return _Decoded(channels, bits_stored, turn, alpha=alpha)
    if mode in ("I;16", "I;16B", "I;16L", "I", "F") or (mode == "L" and sample_format == 2):
        numbers = _native(np.asarray(image))
        if mode == "I" and sample_format == 1:
            numbers = numbers.view(np.uint32)  # PIL reads unsigned 32 bit as signed
        if mode == "L":
            numbers = numbers.view(np.int8)
        clear_value = image.info.get("transparency")
        background = numbers == clear_value if isinstance(clear_value, int) else None
        # WhiteIsZero, which PIL inverts itself for 8 bits and fewer.
        inverted = file_format == "TIFF" and tiff_tags.get(262, 0) == 0 and mode != "L"
        return _Decoded(numbers, bits_stored, turn, inverted=inverted, background=background)
    return _Decoded(image, bits_stored, turn)


def _native(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("="))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


def _without_metadata(image: Image.Image) -> Image.Image:
    plain = image.copy()
    plain.info = {}  # EXIF, comments and text chunks may name a person
    return plain


def colour_share(image: Image.Image) -> float | None:
    """Share of the pixels whose colour is not the one that their grey level has elsewhere; None of a grey picture.

    In a tinted film the colour follows from the grey level: a share of about 0. In a photograph it does not. Measured
    on a thumbnail of _COLOUR_SIDE, for each of 16 ranges of grey against the median of the range, by COLOUR_TOLERANCE.

    Args:
        image: 8 bit, of any mode, opaque.
    """
    if image.mode in ("1", "L"):
        return None
    colour = image.convert("RGB")
    red, green, blue = colour.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    spread = ImageChops.subtract(highest, lowest).histogram()
    if sum(spread[COLOUR_TOLERANCE + 1 :]) <= red.width * red.height // OUTLIERS_ONE_IN:
        return None
    colour.thumbnail((_COLOUR_SIDE, _COLOUR_SIDE))
    pixels = np.asarray(colour, np.int16).reshape(-1, 3)
    grey = np.asarray(colour.convert("L"), np.int16).reshape(-1)
    tint = pixels - grey[:, None]  # (pixels, 3)
    for level in range(0, 256, 16):
        inside = (grey >= level) & (grey < level + 16)
        if inside.any():
            tint[inside] -= np.median(tint[inside], axis=0).astype(np.int16)
    return float((np.abs(tint).max(axis=1) > COLOUR_TOLERANCE).mean())


def _grey_of_pil(image: Image.Image) -> tuple[Image.Image, float | None]:
    """An 8-bit PIL image of any mode as ("L" image, colour share); transparent over black."""
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return image.convert("L"), None
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        if clear.getchannel("A").getextrema() != (255, 255):
            clear = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
        image = clear
    colour = image.convert("RGB")
    return colour.convert("L"), colour_share(colour)


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _wide_colour_raw_mode(image: Image.Image) -> str | None:
    """PIL's name of the stored layout, if it is 16 bits per channel with several channels (PIL keeps 8 of them)."""
    for tile in getattr(image, "tile", ()):
        mode = _raw_mode(tile)
        if mode.startswith(("RGB", "LA")) and ";16" in mode:
            return mode
    return None


def _decode_wide_colour(data: bytes, file_format: FileFormat, raw_mode: str) -> tuple[np.ndarray, np.ndarray | None]:
    """All 16 bits of a colour or grey + alpha image: ((H, W, C) uint16, (H, W) uint16 alpha or None).

    PIL decodes 16-bit channels to their high byte. Told that the bytes are in the other order, it gives the low byte.
    """
    if raw_mode == "LA;16B":  # four bytes per pixel, so they can be had as they are: grey high, low, alpha high, low
        stored = _decode_as(data, file_format, "RGBA").astype(np.uint16)
        return stored[..., 0:1] << 8 | stored[..., 1:2], stored[..., 2] << 8 | stored[..., 3]
    order = raw_mode[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    swapped = raw_mode[:-1] + ("B" if order == "L" else "L")
    high = _decode_as(data, file_format, raw_mode)
    low = _decode_as(data, file_format, swapped)
    wide = high.astype(np.uint16) << 8 | low
    return wide[..., :3], (wide[..., 3] if wide.shape[2] == 4 else None)


def _decode_as(data: bytes, file_format: FileFormat, raw_mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=(file_format,)) as image:
        tiles: Any = image
        tiles.tile = [
            tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
            for tile in tiles.tile
        ]
        return np.asarray(image)


def _grey_of_wide_colour(pixels: np.ndarray, alpha: np.ndarray | None = None) -> tuple[np.ndarray, float | None]:
    """(H, W, 1 or 3) uint16 and its alpha -> ((H, W) uint8 grey by its own range, colour share)."""
    if pixels.shape[2] == 1:
        grey = pixels[..., 0].astype(np.uint32)
    else:
        weighted = sum(pixels[..., channel] * np.uint32(weight) for channel, weight in enumerate(_LUMA))
        grey = (np.asarray(weighted) + np.uint32(0x8000)) >> np.uint32(16)
    transparent = None
    if alpha is not None:
        transparent = alpha == 0
        grey = (grey * alpha + np.uint32(32767)) // np.uint32(65535)
    shade = grey.astype(np.uint16)
    low, high = _own_range(shade if transparent is None else shade[~transparent])
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    coloured = np.count_nonzero(spread.astype(np.uint32) * 255 > COLOUR_TOLERANCE * (high - low))
    share = None
    if coloured > spread.size // OUTLIERS_ONE_IN:
        eight_bits = _map_values(pixels, lambda values: (values - low) / max(high - low, 1.0))
        share = colour_share(Image.fromarray(eight_bits)) or 0.0
    return window_by_own_range(shade, background=transparent), share


# --- DICOM ----------------------------------------------------------------------------------------------------------


def _may_be_bare_dicom(data: bytes) -> bool:
    """Whether a data set may start right here, without the preamble: group 2 or 8, and a sane VR or length."""
    if len(data) < 8:
        return False
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    short = struct.unpack_from("<I", data, 4)[0] < 2**16
    little = data[:2] in (b"\x02\x00", b"\x08\x00") and (explicit or short)
    return little or (data[:2] == b"\x00\x08" and explicit)


def _import_pydicom() -> Any:
    try:
        import pydicom
        import pydicom.encaps
        import pydicom.filereader
        import pydicom.pixels
    except ImportError:
        raise InputError("Reading a DICOM file needs pydicom: pip install pydicom.") from None
    return pydicom


def _errors_of(pydicom: Any) -> tuple[Any, ...]:
    """What pydicom raises on damaged files beside _DECODER_ERRORS."""
    return pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException


@dataclass(frozen=True)
class _LookupTable:
    """First value mapped, and the outputs from there on; values outside take the first or last output."""

    first: int
    table: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        index = np.clip(np.rint(values) - self.first, 0, len(self.table) - 1).astype(np.intp)
        return self.table[index]


@dataclass(frozen=True)
class _Window:
    """A VOI window as a function onto 0..1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""

    center: float
    width: float
    kind: str

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "SIGMOID":
            with np.errstate(over="ignore"):
                return 1.0 / (1.0 + np.exp(-4.0 * (values - self.center) / self.width))
        is_exact = self.kind == "LINEAR_EXACT"
        middle, span = (self.center, self.width) if is_exact else (self.center - 0.5, self.width - 1.0)
        if span == 0:
            return (values > middle).astype(np.float64)
        return np.clip((values - middle) / span + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class _DicomHeader:
    """What the header says about the pixels, as plain values."""

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    padding: tuple[int, int] | None
    slope: float
    intercept: float
    modality_lut: _LookupTable | None
    voi_lut: _LookupTable | None
    window: _Window | None

    @property
    def is_grey(self) -> bool:
        return self.samples == 1 and self.photometric in ("MONOCHROME1", "MONOCHROME2")

    @property
    def is_colour(self) -> bool:
        plain = self.photometric == "RGB" or self.photometric.startswith("YBR_")
        return self.samples == 3 and plain and self.bits_stored == self.bits_allocated


def _read_dicom(data: bytes, *, has_prefix: bool) -> Radiograph:
    pydicom = _import_pydicom()
    # Only what the libraries do stands in the try block: an error of our own must not pass for a damaged file.
    try:
        dataset = _dicom_dataset(pydicom, data, has_prefix=has_prefix)
        has_picture = all(dataset.get(name) is not None for name in ("Rows", "Columns", "BitsAllocated", "PixelData"))
        if not has_prefix and not has_picture:
            raise InputError(f"The content is of no known image format: {_ACCEPTED}.")
        if not dataset.get("PixelData"):
            raise InputError("The DICOM file holds no image: give the one that holds the radiograph itself.")
        header = _dicom_header(dataset)
        _check_dicom_header(header)
        pixels = _decode_dicom(pydicom, dataset, header)
    except InputError:
        raise
    except (*_DECODER_ERRORS, *_errors_of(pydicom), Image.DecompressionBombError):
        raise _damaged("DICOM") from None

    shape = (header.rows, header.columns) if header.is_grey else (header.rows, header.columns, 3)
    if pixels.shape != shape or pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        raise _damaged("DICOM")
    pixels = _native(pixels)
    share = None
    if header.is_grey:
        image = Image.fromarray(_grey_of_dicom(header, pixels))
    elif pixels.dtype == np.uint8:
        image, share = _grey_of_pil(Image.fromarray(pixels))
    elif pixels.dtype == np.uint16:
        grey, share = _grey_of_wide_colour(pixels)
        image = Image.fromarray(grey)
    else:
        raise _not_grey()
    return Radiograph(
        _without_metadata(image), "DICOM", header.bits_stored, has_colour=share is not None, colour_share=share or 0.0
    )


def _not_grey() -> InputError:
    return InputError(f"The DICOM file is neither greyscale nor plain RGB: {_EXPORT}.")


def _dicom_dataset(
    pydicom: Any, data: bytes, *, has_prefix: bool, tags: Sequence[int] = tuple(_DICOM_TAGS.values())
) -> Any:
    """The few elements of ``tags``, with a transfer syntax in ``file_meta`` in any case."""
    reader = pydicom.filereader
    tags = list(tags)
    last = max(tags)

    def is_behind(tag: int, vr: str | None, length: int) -> bool:
        return tag > last

    stream = io.BytesIO(data)
    stream.seek(132 if has_prefix else 0)
    syntax = ""
    for element in reader.data_element_generator(
        stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2
    ):
        if element.tag == 0x00020010:
            syntax = bytes(element.value).rstrip(b"\x00 ").decode("ascii")
    if syntax == _DEFLATED:
        # pydicom inflates without a limit.
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        body = inflater.decompress(data[stream.tell() :], MAX_FILE_BYTES + 1)
        if len(body) > MAX_FILE_BYTES:
            raise _too_many_bytes()
        if not inflater.eof:
            raise _damaged("DICOM")
        dataset = reader.read_dataset(io.BytesIO(body), False, True, stop_when=is_behind, specific_tags=tags)
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        return dataset
    dataset = reader.read_partial(io.BytesIO(data), stop_when=is_behind, force=not has_prefix, specific_tags=tags)
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little_endian = dataset.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if little_endian else pydicom.uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _dicom_header(dataset: Any) -> _DicomHeader:
    stored = int(dataset.BitsStored)
    voi_lut = _lookup_table(dataset, "VOILUTSequence")
    high_bit = dataset.get("HighBit")
    return _DicomHeader(
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        frames=int(dataset.get("NumberOfFrames") or 1),
        samples=int(dataset.get("SamplesPerPixel") or 1),
        photometric=str(dataset.PhotometricInterpretation).strip().upper(),
        bits_allocated=int(dataset.BitsAllocated),
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else int(high_bit),
        padding=_padding(dataset),
        slope=_number(dataset, "RescaleSlope", 1.0),
        intercept=_number(dataset, "RescaleIntercept", 0.0),
        modality_lut=_lookup_table(dataset, "ModalityLUTSequence"),
        voi_lut=voi_lut,
        window=_window(dataset) if voi_lut is None else None,
    )


def _check_dicom_header(header: _DicomHeader) -> None:
    if header.frames > 1:
        raise _several_frames("DICOM")
    _check_size(header.columns, header.rows)
    if header.bits_allocated not in (8, 16):
        raise InputError(
            f"The DICOM file stores {header.bits_allocated} bits per pixel, and only 8 and 16 are read: {_EXPORT}."
        )
    if not 1 <= header.bits_stored <= header.bits_allocated or header.slope == 0:
        raise _damaged("DICOM")
    if header.high_bit != header.bits_stored - 1:
        raise InputError(f"The DICOM file stores its bits in a retired order (high bit): {_EXPORT}.")
    if not header.is_grey and not header.is_colour:
        raise _not_grey()


def _decode_dicom(pydicom: Any, dataset: Any, header: _DicomHeader) -> np.ndarray:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        raise InputError(f"The DICOM file is compressed in a way that is not read: {_EXPORT}.") from None
    if not decoder.is_encapsulated:
        return pydicom.pixels.pixel_array(dataset, index=0)
    # Compression does not double the size; without this, a small picture could unpack to gigabytes.
    raw_bytes = header.rows * header.columns * header.samples * (header.bits_allocated // 8)
    if len(dataset.PixelData) > 2 * raw_bytes + 2**16:
        raise _damaged("DICOM")
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    size = _size_of_codestream(frame)
    if size is not None and size != (header.columns, header.rows):
        raise _damaged("DICOM")
    plugins = decoder.available_plugins
    for plugin in plugins:
        if plugin == "gdcm":
            continue
        try:
            return pydicom.pixels.pixel_array(dataset, index=0, decoding_plugin=plugin)
        except (NotImplementedError, RuntimeError):  # damaged, or of a kind that this decoder does not know
            pass
    if plugins == ("gdcm",):
        return _decode_with_gdcm(dataset, header)
    if plugins:  # Pillow, for one, reads no 12-bit JPEG, and neither does gdcm
        raise InputError(f"The compressed image in the DICOM file is damaged or of a rare kind: {_EXPORT}.")
    if syntax not in pydicom.pixels.decoders.gdcm.DECODER_DEPENDENCIES:  # such as HTJ2K
        raise InputError(f"The DICOM file is compressed in a way that is not read: {_EXPORT}.")
    raise InputError(
        "The DICOM file is compressed in a way that needs another decoder: "
        'pip install "boneage-hf[dicom]" and read it again, or save it uncompressed.'
    )


def _decode_with_gdcm(dataset: Any, header: _DicomHeader) -> np.ndarray:
    """JPEG lossless and JPEG-LS in a process of its own: on damaged data gdcm ends its whole process (`abort`)."""
    about = {
        "path": [folder for folder in sys.path if folder],
        "memory": GDCM_MEMORY_BYTES,
        "syntax": str(dataset.file_meta.TransferSyntaxUID),
        "options": {
            "rows": header.rows,
            "columns": header.columns,
            "number_of_frames": 1,
            "samples_per_pixel": header.samples,
            "photometric_interpretation": header.photometric,
            "planar_configuration": int(dataset.get("PlanarConfiguration") or 0),
            "bits_allocated": header.bits_allocated,
            "bits_stored": header.bits_stored,
            "pixel_representation": int(dataset.get("PixelRepresentation") or 0),
            "pixel_keyword": "PixelData",
        },
    }
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _GDCM_SCRIPT],
            input=json.dumps(about).encode() + b"\n" + dataset.PixelData,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # gdcm writes there what it reads
            timeout=GDCM_SECONDS,
            check=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # each of its threads reserves memory
        )
    except subprocess.SubprocessError:
        raise _damaged("DICOM") from None
    return np.asarray(np.load(io.BytesIO(child.stdout), allow_pickle=False))


def _size_of_codestream(frame: bytes) -> tuple[int, int] | None:
    """(width, height) that the JPEG or JPEG 2000 stream itself claims; None for streams that PIL does not know."""
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
            return image.size
    except _DECODER_ERRORS:
        return None


def _grey_of_dicom(header: _DicomHeader, pixels: np.ndarray) -> np.ndarray:
    """Stored values (H, W) -> (H, W) uint8 through modality LUT, VOI and MONOCHROME1, in the order of PS3.4 N.2."""
    inverted = header.photometric == "MONOCHROME1"
    modality_lut, voi_lut, window = header.modality_lut, header.voi_lut, header.window
    background = None
    if header.padding is not None:  # what holds no picture becomes black, whatever its value
        low, high = sorted(_as_stored(value, pixels, header.bits_stored) for value in header.padding)
        background = (pixels >= low) & (pixels <= high)

    def modality(values: np.ndarray) -> np.ndarray:
        return values * header.slope + header.intercept if modality_lut is None else modality_lut(values)

    def shade(values: np.ndarray) -> np.ndarray:
        shown = modality(values)
        if voi_lut is not None:
            # The stated depth is often larger than what the table uses, so its brightest entry is white.
            shown = voi_lut(shown) / max(voi_lut.table.max(), 1)
        elif window is not None:
            shown = window(shown)
        return 1.0 - shown if inverted else shown

    if voi_lut is not None or window is not None:
        grey = _map_values(pixels, shade)
    elif modality_lut is not None:
        grey = window_by_own_range(modality_lut(pixels), inverted=inverted, background=background)
    else:
        # A linear rescale gives the values a unit and leaves the picture as it is, unless the slope turns it round.
        turned = inverted != (header.slope < 0)
        if header.bits_stored == 8 and pixels.dtype.kind == "u":
            grey = np.clip(pixels, 0, 255).astype(np.uint8)
            grey = 255 - grey if turned else grey
        else:
            grey = window_by_own_range(pixels, inverted=turned, background=background)
    if background is not None:
        grey[background] = 0
    return grey


def _as_stored(value: int, pixels: np.ndarray, stored: int) -> int:
    # Some writers give the padding of signed data as unsigned, or use bits above Bits Stored, lost in decoding.
    value &= 2**stored - 1
    return value - 2**stored if pixels.dtype.kind == "i" and value >= 2 ** (stored - 1) else value


def _number(dataset: Any, keyword: str, default: float) -> float:
    """The first value of a numeric element, ``default`` where it is absent or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return default
    number = float(value if isinstance(value, int | float) else value[0] if not isinstance(value, str) else value)
    if not np.isfinite(number):
        raise _damaged("DICOM")
    return number


def _padding(dataset: Any) -> tuple[int, int] | None:
    """Pixel Padding Value and Range Limit (PS3.3 C.7.5.1.1.2), as the header has them."""
    if dataset.get("PixelPaddingValue") is None:
        return None
    value, limit = int(dataset.PixelPaddingValue), dataset.get("PixelPaddingRangeLimit")
    return value, value if limit is None else int(limit)


def _lookup_table(dataset: Any, keyword: str) -> _LookupTable | None:
    # Not pydicom's own functions: they wrap around in 8-bit tables of more than 256 entries.
    if not dataset.get(keyword):
        return None
    item = dataset[keyword].value[0]
    length, first, bits = (int(number) for number in item.LUTDescriptor)
    length = length or 2**16  # 65,536 does not fit into the 16 bits of the descriptor
    raw = item.LUTData
    if isinstance(raw, bytes):
        little_endian = dataset.original_encoding[1] is not False
        words = np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<u2" if little_endian else ">u2")
    else:
        words = np.atleast_1d(np.asarray(raw)).astype(np.uint16)
    if bits == 8 and len(words) == (length + 1) // 2 and length > 1:
        words = np.asarray(words.astype("<u2").view(np.uint8))  # two 8-bit entries to a word
    if length < 1 or len(words) < length:
        raise _damaged("DICOM")
    return _LookupTable(first, words[:length].astype(np.float64))


def _window(dataset: Any) -> _Window | None:
    """The first VOI window; None where there is none."""
    if any(dataset.get(name) in (None, "", []) for name in ("WindowCenter", "WindowWidth")):
        return None
    center, width = _number(dataset, "WindowCenter", 0.0), _number(dataset, "WindowWidth", 0.0)
    kind = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if kind not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or width <= 0 or (kind == "LINEAR" and width < 1):
        raise InputError(f"The DICOM file asks for a display window that cannot be: {_EXPORT}.")
    return _Window(center, width, kind)


# --- silence --------------------------------------------------------------------------------------------------------


class _Quiet:
    """While at least one thread reads, PIL and pydicom neither warn nor log: their texts may quote header values.

    Warning filters and log levels belong to the whole process, so the first thread in sets them and the last one out
    restores them; a plain `catch_warnings` per thread could restore them in the wrong order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._levels: dict[str, int] = {}
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
                for name in ("PIL", "pydicom"):
                    self._levels[name] = logging.getLogger(name).level
                    logging.getLogger(name).setLevel(logging.CRITICAL + 1)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                for name, level in self._levels.items():
                    logging.getLogger(name).setLevel(level)
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()
