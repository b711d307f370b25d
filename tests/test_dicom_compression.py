"""Compressed DICOM: every common compression is read, by decoders that cannot take the reading process with them."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from drawn import deep_picture, dicom, picture
from pydicom.uid import (
    HTJ2K,
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from boneage_hf import radiograph
from boneage_hf.errors import InputError
from boneage_hf.radiograph import read

GREY = picture()
DEEP = deep_picture()
PICTURES = {
    "8 bit": GREY,
    "16 bit": DEEP,
    "signed": (DEEP.astype(np.int32) - 2000).astype(np.int16),
    "colour": np.repeat(GREY[..., None], 3, axis=2),
}

needs_gdcm = pytest.mark.skipif(importlib.util.find_spec("gdcm") is None, reason="gdcm is in the extra dicom")


def _transcoded(content: bytes, syntax: str, folder: Path) -> bytes:
    """A DICOM file in another transfer syntax, named as gdcm names it."""
    import gdcm

    source, target = folder / "source", folder / "target"
    source.write_bytes(content)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target.read_bytes()


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(read(content).image)


@needs_gdcm
@pytest.mark.parametrize(
    ("syntax", "kind"),
    [
        *(("JPEGLosslessProcess14_1", kind) for kind in PICTURES),
        ("JPEGLosslessProcess14", "16 bit"),
        *(("JPEGLSLossless", kind) for kind in ("8 bit", "16 bit")),
        ("JPEGLSNearLossless", "8 bit"),
        *(("JPEG2000Lossless", kind) for kind in PICTURES),
        ("JPEG2000", "16 bit"),
        *(("RLELossless", kind) for kind in PICTURES),
        ("DeflatedExplicitVRLittleEndian", "16 bit"),
    ],
)
def test_a_compressed_file_gives_the_picture_of_the_plain_one(syntax: str, kind: str, tmp_path: Path) -> None:
    plain = dicom(PICTURES[kind])
    compressed = _transcoded(plain, syntax, tmp_path)
    named = pydicom.dcmread(tmp_path / "target", stop_before_pixels=True).file_meta.TransferSyntaxUID
    assert named != pydicom.uid.ExplicitVRLittleEndian
    assert np.array_equal(_pixels(compressed), _pixels(plain))


@needs_gdcm
def test_baseline_jpeg_differs_by_its_own_loss_only(tmp_path: Path) -> None:
    compressed = _transcoded(dicom(GREY), "JPEGBaselineProcess1", tmp_path)
    assert np.abs(_pixels(compressed).astype(int) - GREY).max() <= 2


@pytest.mark.parametrize("syntax", [RLELossless, DeflatedExplicitVRLittleEndian])
def test_rle_and_deflated_need_no_extra(syntax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = dicom(GREY, syntax=syntax)
    monkeypatch.setitem(sys.modules, "gdcm", None)
    assert np.array_equal(_pixels(content), GREY)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_without_gdcm_the_extra_is_named(syntax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydicom.pixels.get_decoder(syntax), "_available", {})
    with pytest.raises(InputError, match=r'pip install "boneage-hf\[dicom\]"'):
        read(dicom(GREY, syntax=syntax, codestream=b"\xff\xd8"))


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K])
def test_what_gdcm_does_not_decode_either_names_the_export_and_no_extra(syntax: Any) -> None:
    with pytest.raises(InputError, match="export it from the viewer") as refusal:
        read(dicom(GREY, syntax=syntax, codestream=b"\xff\x4f\xff\x51"))
    assert "pip install" not in str(refusal.value)


def test_twelve_bit_jpeg_that_no_decoder_reads_names_the_export() -> None:
    with pytest.raises(InputError, match="export it from the viewer"):
        read(dicom(DEEP, bits_stored=12, syntax=JPEGExtended12Bit, codestream=b"\xff\xd8\xff"))


@needs_gdcm
def test_data_on_which_gdcm_aborts_are_refused_and_this_process_lives(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = []
    run = subprocess.run

    def watched(*arguments: Any, **options: Any) -> Any:
        done = run(*arguments, **options | {"check": False})
        codes.append(done.returncode)
        done.check_returncode()
        return done

    whole = _transcoded(dicom(GREY), "JPEGLosslessProcess14_1", tmp_path)
    start = whole.index(b"\xff\xd8\xff")
    damage = {start + 6: b"\xff", start + 16: b"\x00"}  # the precision; the marker of the Huffman tables
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radiograph.subprocess, "run", watched)
        for place, value in damage.items():
            with pytest.raises(InputError, match="damaged"):
                read(whole[:place] + value + whole[place + 1 :])
    assert [code < 0 for code in codes] == [True, True]  # ended by a signal
    assert capfd.readouterr() == ("", "")


@needs_gdcm
def test_a_decoder_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = _transcoded(dicom(GREY), "JPEGLSLossless", tmp_path)
    monkeypatch.setattr(radiograph, "_GDCM_SCRIPT", "import time; time.sleep(60)")
    monkeypatch.setattr(radiograph, "GDCM_SECONDS", 0.2)
    with pytest.raises(InputError, match="damaged"):
        read(compressed)
