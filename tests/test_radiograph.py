"""Reading: one picture gives the same pixels from any container, and what cannot be read is refused in a sentence."""

import ast
import inspect
import io
import logging
import os
import re
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from drawn import PATIENT_NAME, deep_picture, dicom, picture, png, png_chunk, saved, tiff
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from boneage_hf import radiograph
from boneage_hf.errors import InputError
from boneage_hf.radiograph import MAX_PIXELS, OUTLIERS_ONE_IN, Radiograph, read, window_by_own_range

GREY = picture()
DEEP = deep_picture()
WINDOWED = window_by_own_range(DEEP)


def _pixels(source: Any) -> np.ndarray:
    return np.asarray(read(source).image)


def _refusal(source: Any) -> str:
    """The message with which ``source`` is refused; every one is one sentence that ends in a full stop."""
    with pytest.raises(InputError) as refused:
        read(source)
    message = str(refused.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    assert "Secretname" not in message
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert refused.value.__cause__ is None
    return message


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def _with_alpha(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, alpha.astype(pixels.dtype)])


# --- the own-range window -------------------------------------------------------------------------------------------


def _slow_window(pixels: np.ndarray) -> np.ndarray:
    """The rule of `window_by_own_range` as a loop over sorted values."""
    ordered = sorted(float(value) for value in pixels.ravel())
    skip = len(ordered) // OUTLIERS_ONE_IN
    low, high = ordered[skip], ordered[len(ordered) - 1 - skip]
    if low == high:
        low, high = ordered[0], ordered[-1]
    grey = np.zeros(pixels.shape, np.uint8)
    for place, value in np.ndenumerate(pixels):
        if high > low:
            grey[place] = round(min(max((float(value) - low) / (high - low) * 255, 0.0), 255.0))
    return grey


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float32])
def test_the_own_range_window_agrees_with_a_plain_loop(dtype: type) -> None:
    values: np.ndarray = np.random.default_rng(4).normal(120, 30, (50, 70)).clip(0, 250).astype(dtype)
    assert np.array_equal(window_by_own_range(values), _slow_window(values))


def test_the_own_range_window_uses_all_grey_levels() -> None:
    assert (WINDOWED.min(), WINDOWED.max()) == (0, 255)
    assert len(np.unique(WINDOWED)) > 100


def test_a_single_hot_pixel_does_not_change_the_others() -> None:
    hot = DEEP.copy()
    hot[30, 20] = 65535
    others = np.ones(DEEP.shape, bool)
    others[30, 20] = False
    change = np.abs(window_by_own_range(hot).astype(int) - WINDOWED)[others]
    assert change.max() <= 2  # the window moves by one place in the order of values
    naive = np.rint((hot - hot.min()) / (65535.0 - hot.min()) * 255)
    assert np.abs(naive - WINDOWED)[others].max() > 100


def test_a_dead_detector_line_does_not_set_the_window() -> None:
    large = deep_picture(1300, 1100)
    dead = large.copy()
    dead[:, 700] = 65535
    kept = np.arange(1100) != 700
    assert np.abs(window_by_own_range(dead).astype(int) - window_by_own_range(large))[:, kept].max() <= 3


def test_a_picture_of_few_deviating_pixels_falls_back_to_its_full_range() -> None:
    values = np.full((60, 60), 1000, np.uint16)
    values[0, 0] = 3000
    grey = window_by_own_range(values)
    assert grey[0, 0] == 255
    assert grey.sum() == 255


def test_shifting_scaling_and_mirroring_the_values_leaves_the_window_as_it_is() -> None:
    signed = (DEEP.astype(np.int32) - 2000).astype(np.int16)
    assert np.array_equal(window_by_own_range(signed), WINDOWED)
    assert np.array_equal(window_by_own_range(DEEP * np.uint16(16)), WINDOWED)
    assert np.array_equal(window_by_own_range(DEEP.astype(np.float32)), WINDOWED)
    assert np.array_equal(window_by_own_range(4095 - DEEP, inverted=True), WINDOWED)


def test_blocks_of_rows_of_wide_types_meet_without_a_seam() -> None:
    tall = deep_picture(700, 40)
    assert np.array_equal(window_by_own_range(tall.astype(np.float32)), window_by_own_range(tall))


# --- one picture, many containers -----------------------------------------------------------------------------------

EIGHT_BIT = {
    "PNG": lambda: png(GREY),
    "PNG by PIL": lambda: saved(Image.fromarray(GREY), "PNG", optimize=True),
    "PNG RGB": lambda: png(_rgb(GREY)),
    "PNG RGBA": lambda: png(_with_alpha(_rgb(GREY), np.full(GREY.shape, 255))),
    "PNG LA": lambda: png(_with_alpha(GREY, np.full(GREY.shape, 255))),
    "PNG palette": lambda: saved(Image.fromarray(_rgb(GREY)).quantize(256), "PNG"),
    "TIFF": lambda: tiff(GREY),
    "TIFF big-endian": lambda: tiff(GREY, big_endian=True),
    "TIFF WhiteIsZero": lambda: tiff(255 - GREY, photometric=0),
    "TIFF RGB": lambda: tiff(_rgb(GREY)),
    "TIFF RGBA": lambda: tiff(_with_alpha(_rgb(GREY), np.full(GREY.shape, 255))),
    "TIFF LA": lambda: tiff(_with_alpha(GREY, np.full(GREY.shape, 255))),
    "TIFF LZW": lambda: saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
    "BigTIFF": lambda: saved(Image.fromarray(GREY), "TIFF", big_tiff=True),
    "DICOM": lambda: dicom(GREY),
    "DICOM 8 in 16": lambda: dicom(GREY.astype(np.uint16), bits_stored=8),
    "DICOM MONOCHROME1": lambda: dicom(255 - GREY, elements={"PhotometricInterpretation": "MONOCHROME1"}),
    "DICOM negative slope": lambda: dicom(255 - GREY, elements={"RescaleSlope": -1, "RescaleIntercept": 255}),
    "DICOM rescaled": lambda: dicom(GREY, elements={"RescaleSlope": 2.5, "RescaleIntercept": -7}),
    "DICOM full window": lambda: dicom(GREY, elements={"WindowCenter": 128, "WindowWidth": 256}),
    "DICOM empty window": lambda: dicom(GREY, elements={"WindowCenter": "", "WindowWidth": ""}),
    "DICOM RGB": lambda: dicom(_rgb(GREY)),
    "DICOM implicit": lambda: dicom(GREY, syntax=ImplicitVRLittleEndian),
    "DICOM RLE": lambda: dicom(GREY, syntax=RLELossless),
    "DICOM deflated": lambda: dicom(GREY, syntax=DeflatedExplicitVRLittleEndian),
    "DICOM JPEG 2000": lambda: dicom(
        GREY,
        syntax=JPEG2000Lossless,
        codestream=saved(Image.fromarray(GREY), "JPEG2000", irreversible=False, no_jp2=True),
    ),
}

SIXTEEN_BIT = {
    "PNG": lambda: png(DEEP),
    "PNG RGB": lambda: png(_rgb(DEEP)),
    "PNG RGBA": lambda: png(_with_alpha(_rgb(DEEP), np.full(DEEP.shape, 65535))),
    "PNG LA": lambda: png(_with_alpha(DEEP, np.full(DEEP.shape, 65535))),
    "PNG by PIL": lambda: saved(Image.fromarray(DEEP), "PNG"),
    "TIFF": lambda: tiff(DEEP),
    "TIFF big-endian": lambda: tiff(DEEP, big_endian=True),
    "TIFF WhiteIsZero": lambda: tiff(65535 - DEEP, photometric=0),
    "TIFF signed": lambda: tiff((DEEP.astype(np.int32) - 2000).astype(np.int16)),
    "TIFF signed big-endian": lambda: tiff((DEEP.astype(np.int32) - 2000).astype(np.int16), big_endian=True),
    "TIFF 32-bit": lambda: tiff(DEEP.astype(np.int32) * 1000),
    "TIFF 32-bit unsigned": lambda: tiff(DEEP.astype(np.uint32) * 1_000_000),
    "TIFF float": lambda: tiff(DEEP.astype(np.float32)),
    "TIFF float WhiteIsZero": lambda: tiff(-DEEP.astype(np.float32), photometric=0),
    "TIFF float by PIL": lambda: saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
    "TIFF LZW": lambda: saved(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    "TIFF RGB": lambda: tiff(_rgb(DEEP)),
    "TIFF RGB big-endian": lambda: tiff(_rgb(DEEP), big_endian=True),
    "TIFF RGBA": lambda: tiff(_with_alpha(_rgb(DEEP), np.full(DEEP.shape, 65535))),
    "DICOM": lambda: dicom(DEEP),
    "DICOM 12 in 16": lambda: dicom(DEEP, bits_stored=12),
    "DICOM big-endian": lambda: dicom(DEEP, syntax=ExplicitVRBigEndian),
    "DICOM MONOCHROME1 12 in 16": lambda: dicom(
        4095 - DEEP, bits_stored=12, elements={"PhotometricInterpretation": "MONOCHROME1"}
    ),
    "DICOM rescaled": lambda: dicom(DEEP, elements={"RescaleSlope": 0.3, "RescaleIntercept": -1024}),
    "DICOM signed": lambda: dicom((DEEP.astype(np.int32) - 2000).astype(np.int16)),
    "DICOM signed 12 in 16": lambda: dicom((DEEP.astype(np.int32) - 2048).astype(np.int16), bits_stored=12),
    "DICOM RGB": lambda: dicom(_rgb(DEEP)),
    "DICOM RLE": lambda: dicom(DEEP, syntax=RLELossless),
    "DICOM JPEG 2000": lambda: dicom(
        DEEP,
        syntax=JPEG2000Lossless,
        codestream=saved(Image.fromarray(DEEP), "JPEG2000", irreversible=False, no_jp2=True),
    ),
}


@pytest.mark.parametrize("container", EIGHT_BIT)
def test_an_8_bit_picture_comes_through_untouched(container: str) -> None:
    result = read(EIGHT_BIT[container]())
    assert np.array_equal(np.asarray(result.image), GREY)
    assert result.image.mode == "L"
    assert result.file_format == re.split(r" |(?<=Big)", container)[0].replace("Big", "TIFF")
    assert result.bits_stored == 8
    assert not result.has_colour


@pytest.mark.parametrize("container", SIXTEEN_BIT)
def test_a_deep_picture_gives_the_same_pixels_from_every_container(container: str) -> None:
    result = read(SIXTEEN_BIT[container]())
    assert np.array_equal(np.asarray(result.image), WINDOWED)
    assert result.image.mode == "L"
    assert not result.has_colour
    assert result.bits_stored == (12 if "12" in container else 32 if re.search("32|float", container) else 16)


def test_an_interlaced_16_bit_colour_png_keeps_all_bits() -> None:
    # Adam7 of a 16-bit RGB picture, each pass a small image of its own.
    height, width = DEEP.shape
    lines = []
    for top, left, down, across in (
        *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
        *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
    ):
        lines += [b"\x00" + line.astype(">u2").tobytes() for line in _rgb(DEEP)[top::down, left::across]]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 1)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"".join(lines))) + png_chunk(b"IEND", b"")
    assert np.array_equal(_pixels(b"\x89PNG\r\n\x1a\n" + body), WINDOWED)


def test_a_compressed_16_bit_colour_tiff_keeps_all_bits() -> None:
    # The strip of the plain file, deflated: tag 259 says so, and the strip is the last thing in the file.
    plain = tiff(_rgb(DEEP), extra={259: 8})
    strip = zlib.compress(plain[-6 * DEEP.size :])
    data = plain[: -6 * DEEP.size] + strip
    counts = struct.pack("<HHI", 279, 4, 1)
    data = data.replace(counts + struct.pack("<I", 6 * DEEP.size), counts + struct.pack("<I", len(strip)))
    assert np.array_equal(_pixels(data), WINDOWED)


def test_a_jpeg_is_read_like_pil_reads_it() -> None:
    data = saved(Image.fromarray(GREY), "JPEG", quality=92)
    result = read(data)
    assert (result.file_format, result.bits_stored, result.has_colour) == ("JPEG", 8, False)
    assert np.array_equal(np.asarray(result.image), np.asarray(Image.open(io.BytesIO(data))))


def test_a_jpeg_in_a_dicom_file_is_decoded() -> None:
    stream = saved(Image.fromarray(GREY), "JPEG", quality=92)
    assert np.array_equal(_pixels(dicom(GREY, syntax=JPEGBaseline8Bit, codestream=stream)), _pixels(stream))


def test_a_one_bit_picture_becomes_black_and_white() -> None:
    bits = GREY > 100
    for file_format in ("PNG", "TIFF"):
        result = read(saved(Image.fromarray(bits), file_format))
        assert result.bits_stored == 1
        assert np.array_equal(np.asarray(result.image), bits * np.uint8(255))


def test_a_signed_8_bit_tiff_keeps_its_order() -> None:
    signed = (GREY.astype(int) - 128).astype(np.int8)
    assert np.array_equal(_pixels(tiff(signed)), window_by_own_range(GREY))


def test_the_primary_picture_of_a_telephone_jpeg_is_read() -> None:
    other = Image.fromarray(GREY[:40, :40])
    data = saved(Image.fromarray(GREY), "MPO", save_all=True, append_images=[other], quality=92)
    assert read(data).image.size == (48, 60)
    assert read(data).file_format == "JPEG"


@pytest.mark.parametrize("depth", [GREY, DEEP], ids=["8 bit", "16 bit"])
def test_transparent_pixels_become_black(depth: np.ndarray) -> None:
    opaque = np.full(depth.shape, np.iinfo(depth.dtype).max)
    opaque[10:20, 10:20] = 0
    expected = depth if depth.dtype == np.uint8 else window_by_own_range(depth, background=opaque == 0)
    expected = np.where(opaque == 0, 0, expected)
    assert np.array_equal(_pixels(png(_with_alpha(depth, opaque))), expected)
    assert np.array_equal(_pixels(png(_with_alpha(_rgb(depth), opaque))), expected)


def test_a_value_declared_transparent_becomes_black_at_both_depths() -> None:
    for values in (GREY, DEEP):
        value = int(values[5, 5])
        whole = png(values)
        marked = whole[:33] + png_chunk(b"tRNS", struct.pack(">H", value)) + whole[33:]
        shown = _pixels(marked)
        assert (shown[values == value] == 0).all()
        assert shown.max() > 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(GREY), file_format, exif=exif)
    flat = _pixels(saved(Image.fromarray(GREY), file_format))
    upright = {
        1: flat,
        2: flat[:, ::-1],
        3: flat[::-1, ::-1],
        4: flat[::-1],
        5: flat.T,
        6: np.rot90(flat, -1),
        7: flat[::-1, ::-1].T,
        8: np.rot90(flat),
    }[orientation]
    assert np.array_equal(_pixels(data), upright)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_orientation_is_applied_once_to_deep_tiff(dtype: type) -> None:
    assert np.array_equal(_pixels(tiff(DEEP.astype(dtype), extra={274: 6})), np.rot90(WINDOWED, -1))


def test_orientation_is_applied_once_to_deep_colour() -> None:
    assert np.array_equal(_pixels(tiff(_rgb(DEEP), extra={274: 6})), np.rot90(WINDOWED, -1))


@pytest.mark.parametrize("container", ["PNG", "TIFF", "DICOM"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_constant_image_is_read(container: str, dtype: type) -> None:
    flat: np.ndarray = np.full((40, 40), 77, dtype)
    data = {"PNG": png, "TIFF": tiff, "DICOM": dicom}[container](flat)
    assert len(np.unique(_pixels(data))) == 1


# --- colour ---------------------------------------------------------------------------------------------------------


def test_grey_saved_as_colour_jpeg_is_not_coloured() -> None:
    for quality in (20, 50, 75, 95):
        for subsampling in (0, 2):
            data = saved(Image.fromarray(_rgb(GREY)), "JPEG", quality=quality, subsampling=subsampling)
            assert not read(data).has_colour


def test_scanner_noise_between_the_channels_is_not_colour() -> None:
    noise = np.random.default_rng(0).normal(0, 1.5, (*GREY.shape, 3))
    assert not read(png((_rgb(GREY) + noise).clip(0, 255).astype(np.uint8))).has_colour


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("make", [png, tiff, dicom])
def test_a_tinted_picture_is_coloured(make: Callable[[np.ndarray], bytes], dtype: type) -> None:
    tinted: np.ndarray = _rgb(GREY).astype(dtype) * (1 if dtype == np.uint8 else 16)
    tinted[..., 2] //= 2
    assert read(make(tinted.astype(dtype))).has_colour


def test_a_speck_of_colour_does_not_make_a_coloured_picture() -> None:
    large = _rgb(picture(300, 200))
    large[100:105, 50:60] = (255, 0, 0)
    assert not read(png(large)).has_colour
    large[100:110, 50:60] = (255, 0, 0)
    assert read(png(large)).has_colour


def test_a_coloured_palette_is_coloured() -> None:
    tinted = _rgb(GREY)
    tinted[..., 0] //= 3
    assert read(saved(Image.fromarray(tinted).quantize(128), "PNG")).has_colour


def test_a_coloured_jpeg_in_dicom_is_coloured() -> None:
    tinted = _rgb(GREY)
    tinted[..., 2] //= 2
    stream = saved(Image.fromarray(tinted), "JPEG", quality=92, subsampling=0)
    data = dicom(
        tinted, syntax=JPEGBaseline8Bit, codestream=stream, elements={"PhotometricInterpretation": "YBR_FULL"}
    )
    assert read(data).has_colour
    assert np.abs(_pixels(data).astype(int) - _pixels(stream)).max() <= 2


# --- DICOM display --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_window_is_applied_as_pydicom_applies_it(kind: str, signed: bool, rescaled: bool, inverted: bool) -> None:
    values = (DEEP.astype(np.int32) - 2000).astype(np.int16) if signed else DEEP
    slope, intercept = (0.5, -300.0) if rescaled else (1.0, 0.0)
    center = (1900.0 - 2000 * signed) * slope + intercept
    elements = {"WindowCenter": center, "WindowWidth": 1500 * slope, "VOILUTFunction": kind}
    elements["PhotometricInterpretation"] = "MONOCHROME1" if inverted else "MONOCHROME2"
    if rescaled:
        elements |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    data = dicom(values, bits_stored=12 if not signed else 16, elements=elements)

    dataset = pydicom.dcmread(io.BytesIO(data))
    shown = apply_windowing(values * slope + intercept, dataset)
    bits = dataset.BitsStored
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = low * slope + intercept, high * slope + intercept
    reference = (shown - low) / (high - low) * 255
    reference = 255 - reference if inverted else reference
    assert np.abs(_pixels(data) - reference).max() <= 0.5 + 1e-6
    assert len(np.unique(_pixels(data))) > 50


def test_the_linear_window_follows_the_formula_of_the_standard() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint16), (40, 1))
    data = dicom(ramp, elements={"WindowCenter": 30, "WindowWidth": 20})
    expected = []
    for x in range(64):  # PS3.3 C.11.2.1.2.1 with y from 0 to 255
        if x <= 30 - 0.5 - 19 / 2:
            expected.append(0)
        elif x > 30 - 0.5 + 19 / 2:
            expected.append(255)
        else:
            expected.append(round(((x - 29.5) / 19 + 0.5) * 255))
    assert _pixels(data)[0].tolist() == expected


def test_a_linear_window_of_width_one_is_a_threshold() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint16), (40, 1))
    shown = _pixels(dicom(ramp, elements={"WindowCenter": 30, "WindowWidth": 1}))[0]
    assert shown.tolist() == [0] * 30 + [255] * 34


def test_the_first_of_several_windows_is_used() -> None:
    several = {"WindowCenter": [1900, 500], "WindowWidth": [1500, 100]}
    single = {"WindowCenter": 1900, "WindowWidth": 1500}
    assert np.array_equal(_pixels(dicom(DEEP, elements=several)), _pixels(dicom(DEEP, elements=single)))


@pytest.mark.parametrize("width", [0, -5, 0.5])
def test_an_impossible_window_is_refused(width: float) -> None:
    message = _refusal(dicom(DEEP, elements={"WindowCenter": 100, "WindowWidth": width}))
    assert "window" in message
    assert "PNG" in message


def _table(first: int, outputs: np.ndarray, bits: int) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(outputs) % 65536, first, bits])
    item.LUTExplanation = PATIENT_NAME
    item.add_new("LUTData", "OW", outputs.astype("<u2").tobytes())
    return [item]


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 4095)])
def test_a_voi_table_is_applied_and_goes_before_the_window(bits: int, top: int) -> None:
    # 16 bits stated and 4,095 used is what some devices write. pydicom wraps around in the 8-bit table.
    outputs = np.rint(np.linspace(0, 1, 3000) ** 2 * top)
    elements = {"VOILUTSequence": _table(500, outputs, bits), "WindowCenter": 100, "WindowWidth": 2}
    expected = np.empty(DEEP.shape)
    for place, value in np.ndenumerate(DEEP):
        expected[place] = round(outputs[min(max(int(value) - 500, 0), 2999)] / top * 255)
    assert np.array_equal(_pixels(dicom(DEEP, elements=elements)), expected)


def test_a_voi_table_of_packed_bytes_is_applied() -> None:
    outputs = np.rint(np.linspace(0, 255, 4096) ** 2 / 255).astype(np.uint8)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 8])
    item.add_new("LUTData", "OW", outputs.tobytes())
    assert np.array_equal(_pixels(dicom(DEEP, elements={"VOILUTSequence": [item]})), outputs[DEEP])


def test_a_modality_table_is_applied_before_the_window() -> None:
    root = np.rint(np.sqrt(np.arange(4096)) * 64)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    both = dicom(DEEP, elements={"ModalityLUTSequence": _table(0, root, 12), **window})
    assert np.array_equal(_pixels(both), _pixels(dicom(root[DEEP].astype(np.uint16), elements=window)))


def test_a_modality_table_alone_is_windowed_by_its_own_range() -> None:
    root = np.rint(np.sqrt(np.arange(4096)) * 64)
    alone = dicom(DEEP, elements={"ModalityLUTSequence": _table(0, root, 12)})
    assert np.array_equal(_pixels(alone), window_by_own_range(root[DEEP]))


def test_a_table_shorter_than_it_says_is_refused() -> None:
    item = _table(0, np.arange(100), 8)
    item[0].LUTDescriptor = [3000, 0, 8]
    assert "damaged" in _refusal(dicom(DEEP, elements={"VOILUTSequence": item}))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("windowed", [False, True])
def test_padding_is_black_and_does_not_set_the_window(photometric: str, windowed: bool) -> None:
    padded = DEEP.copy()
    padded[:20] = 60000
    elements: dict[str, Any] = {"PixelPaddingValue": 60000, "PhotometricInterpretation": photometric}
    if windowed:
        elements |= {"WindowCenter": 2000, "WindowWidth": 4000}
    shown = _pixels(dicom(padded, elements=elements))
    assert (shown[:20] == 0).all()
    del elements["PixelPaddingValue"]
    assert np.array_equal(shown[20:], _pixels(dicom(DEEP[20:], elements=elements)))


def test_a_range_of_padding_values_in_signed_data_is_black() -> None:
    values = (DEEP.astype(np.int32) - 2000).astype(np.int16)
    values[:10], values[10:20] = -32768, -30000
    elements = {"PixelPaddingValue": -32768, "PixelPaddingRangeLimit": -29000}
    shown = _pixels(dicom(values, elements=elements))
    assert (shown[:20] == 0).all()
    assert np.array_equal(shown[20:], window_by_own_range(DEEP[20:]))


def test_padding_outside_the_stored_bits_or_of_the_wrong_sign_is_found() -> None:
    high = DEEP.copy()
    high[:20] = 0xFFFF  # decoding leaves 4,095 of it
    assert (_pixels(dicom(high, bits_stored=12, elements={"PixelPaddingValue": 0xFFFF}))[:20] == 0).all()
    signed = (DEEP.astype(np.int32) - 2048).astype(np.int16)
    signed[:20] = 2047
    as_unsigned = dicom(signed, bits_stored=12, elements={"PixelPaddingValue": 2047 + 4096})
    assert (_pixels(as_unsigned)[:20] == 0).all()


def test_a_window_beside_a_voi_table_is_not_even_looked_at() -> None:
    table = {"VOILUTSequence": _table(0, np.arange(4096), 12)}
    broken = {"WindowCenter": 100, "WindowWidth": 0}
    assert np.array_equal(_pixels(dicom(DEEP, elements=table | broken)), _pixels(dicom(DEEP, elements=table)))


def test_what_lies_in_the_unused_high_bits_is_ignored() -> None:
    assert np.array_equal(_pixels(dicom(DEEP | 0x8000, bits_stored=12)), WINDOWED)


def test_bits_in_a_retired_order_are_refused() -> None:
    assert "PNG" in _refusal(dicom(DEEP << 4, bits_stored=12, elements={"HighBit": 15}))


# --- recognised by content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "image.png", "image.txt", "IM 0001"])
def test_a_dicom_file_of_any_name_is_recognised(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(dicom(GREY))
    assert read(file).file_format == "DICOM"
    assert read(str(file)).file_format == "DICOM"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("values", [GREY, DEEP], ids=["8 bit", "16 bit"])
def test_a_data_set_without_preamble_is_read(syntax: UID, values: np.ndarray) -> None:
    result = read(dicom(values, syntax=syntax, preamble=False))
    assert result.file_format == "DICOM"
    assert np.array_equal(np.asarray(result.image), GREY if values.dtype == np.uint8 else WINDOWED)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_file_meta_without_preamble_is_read(syntax: UID) -> None:
    assert np.array_equal(_pixels(dicom(GREY, syntax=syntax)[132:]), GREY)


def test_bytes_that_merely_begin_like_a_data_set_are_foreign() -> None:
    noise = np.random.default_rng(1).bytes(5000)
    for start in (b"\x08\x00\x05\x00CS\x0a\x00", b"\x08\x00\x05\x00\x0a\x00\x00\x00", b"\x02\x00\x00\x00UL\x04\x00"):
        assert re.search("known|damaged", _refusal(start + noise))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b"id,boneage,male\n1377,180,False\n", "text"),
        (b"<!DOCTYPE html><html></html>", "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "ZIP"),
        (b"\x93NUMPY\x01\x00" + bytes(60), "numpy"),
        (b"\x1f\x8b\x08" + bytes(60), "gzip"),
        (bytes(500), "known"),
        (b"\x00", "known"),
        (saved(Image.fromarray(GREY), "GIF"), "GIF"),
        (saved(Image.fromarray(GREY), "BMP"), "BMP"),
        (saved(Image.fromarray(GREY), "WEBP"), "WebP"),
        (saved(Image.fromarray(GREY), "JPEG2000"), "JPEG 2000"),
    ],
)
def test_a_foreign_file_is_named_and_refused(data: bytes, word: str) -> None:
    message = _refusal(data)
    assert word in message
    assert "PNG, JPEG, TIFF or DICOM" in message


# --- sources --------------------------------------------------------------------------------------------------------


def test_path_bytes_and_binary_file_give_the_same(tmp_path: Path) -> None:
    data = png(GREY)
    file = tmp_path / "a.png"
    file.write_bytes(data)
    for source in (file, str(file), data, bytearray(data), io.BytesIO(data)):
        assert np.array_equal(_pixels(source), GREY)
    with open(file, "rb") as opened:
        assert np.array_equal(_pixels(opened), GREY)


def test_a_stream_that_gives_few_bytes_at_a_time_is_read_whole() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 7, 7))

    assert np.array_equal(_pixels(Slow(png(GREY))), GREY)


@pytest.mark.parametrize(
    "url",
    [
        *("http://host/Secretname.png", "https://host/Secretname.png", "ftp://host/Secretname", "file:///Secretname"),
        *("data:image/png;base64,iVBORw0Secretname", "s3://bucket/Secretname", "hf://datasets/Secretname"),
        *("HTTPS://HOST/Secretname", " https://host/Secretname"),
    ],
)
def test_a_url_is_refused_with_the_cure(url: str) -> None:
    assert "download" in _refusal(url)


def test_a_url_that_pathlib_has_folded_is_refused_too() -> None:
    assert "download" in _refusal(Path("https://host/Secretname.png"))


def test_a_file_name_with_a_colon_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scan:12.png").write_bytes(png(GREY))
    assert np.array_equal(_pixels("scan:12.png"), GREY)


def test_a_missing_file_a_directory_and_a_device_are_refused_without_their_name(tmp_path: Path) -> None:
    assert "no file" in _refusal(tmp_path / "Secretname.png")
    assert "no file" in _refusal("")
    (tmp_path / "Secretname").mkdir()
    assert "directory" in _refusal(tmp_path / "Secretname")
    (tmp_path / "Secretname.txt").write_bytes(png(GREY))
    for odd in (tmp_path / "Secretname.txt" / "x", "Secretname\0.png", "Secretname" * 1000):
        assert str(tmp_path) not in _refusal(odd)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "Secretname.pipe")
        assert "regular" in _refusal(tmp_path / "Secretname.pipe")


def test_a_file_opened_as_text_or_closed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "Secretname.png"
    file.write_bytes(png(GREY))
    with open(file, encoding="utf-8") as opened:
        assert "'rb'" in _refusal(opened)
    with open(file, "rb") as opened_binary:
        pass
    assert "'rb'" in _refusal(opened_binary)
    assert "'rb'" in _refusal(io.StringIO("text"))


@pytest.mark.parametrize("source", [None, 5, GREY, Image.fromarray(GREY), ["a.png"]])
def test_anything_else_is_refused_by_its_type(source: object) -> None:
    assert type(source).__name__ in _refusal(source)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for source in (b"", io.BytesIO(), tmp_path / "a"):
        assert "empty" in _refusal(source)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_file_of_too_many_bytes_is_refused_and_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radiograph, "MAX_FILE_BYTES", 2 * 1024**2)
    given = 0

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            nonlocal given
            given += size
            return bytes(size)

    assert "2 MiB" in _refusal(Endless())
    assert given <= 2 * 1024**2 + 1
    file = tmp_path / "large"
    file.write_bytes(bytes(2 * 1024**2 + 1))
    assert "2 MiB" in _refusal(file)
    assert "2 MiB" in _refusal(bytes(2 * 1024**2 + 1))


def _png_that_claims(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_from_the_header() -> None:
    over = MAX_PIXELS // 8000 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "64 million" in _refusal(_png_that_claims(8000, over))
        assert "64 million" in _refusal(_png_that_claims(2**31 - 1, 2**31 - 1))
        assert "64 million" in _refusal(_png_that_claims(10_000, 10_000))
        large = tiff(GREY).replace(struct.pack("<HHIHH", 256, 3, 1, 48, 0), struct.pack("<HHII", 256, 4, 1, 2_000_000))
        assert "64 million" in _refusal(large)
        assert "64 million" in _refusal(dicom(GREY, elements={"Rows": 8000, "Columns": over}))


def test_the_limit_of_pixels_fits_into_the_limit_of_bytes_at_16_bits() -> None:
    assert 2 * MAX_PIXELS < radiograph.MAX_FILE_BYTES < 2.2 * MAX_PIXELS


def test_a_deflated_dicom_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = dicom(np.zeros((3000, 3000), np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    assert len(bomb) < 100_000
    assert not _pixels(bomb).any()
    monkeypatch.setattr(radiograph, "MAX_FILE_BYTES", 1024**2)
    assert "1 MiB" in _refusal(bomb)


def test_a_compressed_frame_larger_than_the_header_says_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("the frame must be refused before it is decoded")

    monkeypatch.setattr(pydicom.pixels, "pixel_array", decode)
    larger = saved(Image.fromarray(np.tile(GREY, (2, 2))), "JPEG")
    assert "damaged" in _refusal(dicom(GREY, syntax=JPEGBaseline8Bit, codestream=larger))
    run = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * 200_000  # 25 MB of zeros
    assert "damaged" in _refusal(dicom(GREY, syntax=RLELossless, codestream=run))


@pytest.mark.parametrize("shape", [(31, 100), (100, 31), (1, 1), (1, 5000)])
@pytest.mark.parametrize("make", [png, tiff, dicom])
def test_a_tiny_side_is_refused(make: Callable[[np.ndarray], bytes], shape: tuple[int, int]) -> None:
    assert "32 pixels" in _refusal(make(np.zeros(shape, np.uint8)))


def test_a_side_of_32_pixels_is_read() -> None:
    assert read(png(picture(32, 32))).image.size == (32, 32)


def test_an_image_without_pixels_is_refused() -> None:
    _refusal(_png_that_claims(0, 0))
    _refusal(dicom(GREY, elements={"Rows": 0}))


# --- several frames -------------------------------------------------------------------------------------------------


def test_several_frames_are_refused() -> None:
    one, two = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    for file_format in ("PNG", "TIFF"):
        assert "several images" in _refusal(saved(one, file_format, save_all=True, append_images=[two]))
    frames = dicom(np.concatenate([GREY, GREY]), elements={"Rows": 60, "NumberOfFrames": 2})
    assert "several images" in _refusal(frames)
    for file_format in ("GIF", "WEBP"):
        assert "PNG, JPEG, TIFF or DICOM" in _refusal(saved(one, file_format, save_all=True, append_images=[two]))


@pytest.mark.parametrize("frames", [1, ""])
def test_a_dicom_file_of_one_stated_frame_is_read(frames: object) -> None:
    assert np.array_equal(_pixels(dicom(GREY, elements={"NumberOfFrames": frames})), GREY)


# --- what cannot be shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_tiff_with_nan_or_infinity_is_refused(value: float) -> None:
    values = DEEP.astype(np.float32)
    values[3, 3] = value
    assert "not numbers" in _refusal(tiff(values))


def test_printing_colours_are_refused() -> None:
    for file_format in ("JPEG", "TIFF"):
        assert "greyscale" in _refusal(saved(Image.fromarray(GREY).convert("CMYK"), file_format))


def test_a_tiff_layout_that_pil_does_not_know_is_refused_with_a_cure() -> None:
    assert "16-bit greyscale" in _refusal(tiff(DEEP.astype(np.float64)))
    assert "16-bit greyscale" in _refusal(tiff(_rgb(DEEP), extra={284: 2}))
    assert "16-bit greyscale" in _refusal(tiff(_rgb(DEEP), extra={284: 2, 259: 8}))


@pytest.mark.parametrize(
    "elements",
    [
        {"PhotometricInterpretation": "PALETTE COLOR"},
        {"PhotometricInterpretation": "ARGB"},
        {"BitsStored": 20, "HighBit": 19},
        {"RescaleSlope": 0, "RescaleIntercept": 0},
        {"PhotometricInterpretation": None},
    ],
)
def test_a_dicom_picture_that_would_need_a_guess_is_refused(elements: dict[str, Any]) -> None:
    _refusal(dicom(GREY, elements=elements))


def test_bits_beyond_16_are_refused() -> None:
    assert "32 bits" in _refusal(dicom(DEEP.astype(np.uint32)))


def test_a_dicom_file_without_picture_is_refused() -> None:
    whole = dicom(GREY)
    assert "no image" in _refusal(whole[: whole.index(b"\xe0\x7f\x10\x00")])


def test_a_dicom_file_cut_in_its_pixels_is_refused() -> None:
    for values in (GREY, DEEP):
        whole = dicom(values)
        for lost in (1, 2, 100, values.nbytes // 2):
            assert "truncated" in _refusal(whole[:-lost])


def test_a_deflated_dicom_file_cut_at_its_end_is_refused() -> None:
    whole = dicom(GREY, syntax=DeflatedExplicitVRLittleEndian)
    assert "truncated" in _refusal(whole[:-3])


def test_a_truncated_picture_is_refused() -> None:
    for make in (png, tiff):
        whole = make(DEEP)
        assert "truncated" in _refusal(whole[: len(whole) // 2])
    whole = saved(Image.fromarray(GREY), "JPEG")
    assert "truncated" in _refusal(whole[: len(whole) * 3 // 4])


def test_a_compression_that_nothing_decodes_names_the_export() -> None:
    assert "export" in _refusal(dicom(GREY, syntax=MPEG2MPML, codestream=b"\x00\x00"))


def test_a_private_transfer_syntax_is_refused_without_being_quoted() -> None:
    private = dicom(GREY).replace(ExplicitVRLittleEndian.encode() + b"\x00", b"1.2.3.4567890123456\x00")
    assert "1.2.3" not in _refusal(private)


def test_without_pydicom_a_dicom_file_names_the_cure_and_others_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(GREY)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in _refusal(data)
    assert np.array_equal(_pixels(png(GREY)), GREY)


# --- privacy --------------------------------------------------------------------------------------------------------


def test_no_metadata_stays_with_the_image() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", PATIENT_NAME)
    exif = Image.Exif()
    exif[0x010E] = PATIENT_NAME
    exif[0x0112] = 6
    for data in (
        saved(Image.fromarray(GREY), "PNG", pnginfo=text, exif=exif),
        saved(Image.fromarray(GREY), "JPEG", comment=PATIENT_NAME, exif=exif),
        saved(Image.fromarray(DEEP), "TIFF", exif=exif),
        dicom(GREY),
    ):
        result = read(data)
        assert result.image.info == {}
        assert "Secretname" not in repr(result)
        assert not dict(result.image.getexif())
        assert "Secretname" not in str(vars(result.image))
        for file_format in ("PNG", "JPEG", "TIFF"):
            assert b"Secretname" not in saved(result.image, file_format)


def test_only_pixel_elements_are_parsed() -> None:
    dataset = radiograph._dicom_dataset(pydicom, dicom(GREY), has_prefix=True)
    assert {element.keyword for element in dataset} <= set(radiograph._DICOM_TAGS)
    for keyword, tag in radiograph._DICOM_TAGS.items():
        assert pydicom.datadict.keyword_for_tag(tag) == keyword


def test_nothing_is_warned_or_logged_about_a_strange_header(caplog: pytest.LogCaptureFixture) -> None:
    strange = dicom(GREY).replace(b"CS\x02\x00CR", b"CS\x02\x00\xff\xff")
    odd_numbers = dicom(GREY, elements={"NumberOfFrames": 1}).replace(b"IS\x02\x001 ", b"IS\x02\x00Se")
    longer = dicom(np.concatenate([GREY, GREY[:5]]), elements={"Rows": 60})
    cut_exif = saved(Image.fromarray(GREY), "TIFF", description=PATIENT_NAME)
    for name in ("pydicom", "PIL"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(_pixels(strange), GREY)
        assert np.array_equal(_pixels(longer), GREY)
        assert np.array_equal(_pixels(cut_exif), GREY)
        _refusal(odd_numbers)
    assert caplog.text == ""


def test_warnings_and_log_levels_are_as_before_after_reading_in_threads() -> None:
    before = list(warnings.filters), [logging.getLogger(name).level for name in ("PIL", "pydicom")]
    sources = [png(DEEP), dicom(DEEP), tiff(DEEP), dicom(DEEP)[:-9]] * 6
    results: list[object] = []

    def work(source: bytes) -> None:
        try:
            results.append(np.array_equal(_pixels(source), WINDOWED))
        except InputError:
            results.append("refused")

    threads = [threading.Thread(target=work, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(True) == 18
    assert results.count("refused") == 6
    assert before == (list(warnings.filters), [logging.getLogger(name).level for name in ("PIL", "pydicom")])
    assert radiograph._quiet._readers == 0


# --- damage ---------------------------------------------------------------------------------------------------------

DAMAGED = {
    "PNG": png(GREY),
    "PNG 16-bit colour": png(_rgb(DEEP)),
    "JPEG": saved(Image.fromarray(_rgb(GREY)), "JPEG"),
    "TIFF": tiff(DEEP),
    "TIFF LZW": saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
    "DICOM": dicom(
        DEEP,
        bits_stored=12,
        elements={"WindowCenter": 5, "WindowWidth": 9, "VOILUTSequence": _table(0, np.arange(9), 8)},
    ),
    "DICOM RLE": dicom(GREY, syntax=RLELossless),
    "DICOM bare": dicom(GREY, syntax=ImplicitVRLittleEndian, preamble=False),
    "DICOM deflated": dicom(GREY, syntax=DeflatedExplicitVRLittleEndian),
    "DICOM JPEG": dicom(GREY, syntax=JPEGBaseline8Bit, codestream=saved(Image.fromarray(GREY), "JPEG")),
}


@pytest.mark.parametrize("container", DAMAGED)
def test_damage_is_read_or_refused_and_never_crashes(container: str) -> None:
    whole = DAMAGED[container]
    draw = np.random.default_rng(20)
    refused, messages = 0, ""
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: draw.integers(1, len(data))]
        else:  # half of the flips go to the front, where the structure is
            reach = len(data) if trial % 3 == 1 else min(len(data), 900)
            for place in draw.integers(0, reach, draw.integers(1, 9)):
                data[place] ^= 1 << int(draw.integers(8))
        try:
            assert isinstance(read(bytes(data)), Radiograph)
        except InputError as error:
            refused += 1
            messages += str(error)
    assert refused > 10
    assert "Secretname" not in messages


# --- the file itself ------------------------------------------------------------------------------------------------


def test_pydicom_is_imported_in_try_blocks_only() -> None:
    tree = ast.parse(inspect.getsource(radiograph))
    excused = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    needed = set()
    for node in ast.walk(tree):
        if id(node) in excused:
            continue
        if isinstance(node, ast.Import):
            needed |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            needed.add("." * node.level + (node.module or ""))
    assert {name for name in needed if name.split(".")[0] not in sys.stdlib_module_names - {""}} == {
        "numpy",
        "PIL",
        ".errors",
        ".sex",
    }


def test_reading_takes_little_longer_than_pil() -> None:
    data = png(picture(1500, 2000))

    def fastest(action: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)

    # Generous, since other processes share the machine: a conversion to float or RGB on the way would not pass.
    assert fastest(lambda: read(data)) < 2 * fastest(lambda: Image.open(io.BytesIO(data)).load()) + 0.02


@pytest.mark.development
def test_real_radiographs_come_through_untouched(rsna_dir: Path) -> None:
    files = sorted((rsna_dir / "full-resolution").glob("*.png"))[:5]
    assert files
    for file in files:
        assert np.array_equal(_pixels(file), np.asarray(Image.open(file)))
