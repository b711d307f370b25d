"""Prefill: of a DICOM header only sex, chronological age and laterality, and nothing where it is unclear."""

import datetime
import itertools
import logging
import sys
import warnings
from typing import Any

import numpy as np
import pydicom
import pytest
from drawn import dicom, picture, png, tiff
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from boneage_hf import radiograph
from boneage_hf.page import prefill_html
from boneage_hf.radiograph import MAX_AGE_MONTHS, Prefill, months_between, read, read_prefill
from boneage_hf.service import contradictions

GREY = picture()
GIRL: dict[str, Any] = {
    "PatientSex": "F",
    "PatientBirthDate": "20100315",
    "StudyDate": "20200315",
    "Laterality": "L",
}
READ_FROM_GIRL = Prefill("female", 120.0, "left")


def _with(**elements: Any) -> Prefill:
    return read_prefill(dicom(GREY, elements=GIRL | elements))


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless],
)
def test_sex_age_and_laterality_are_read_in_every_encoding(syntax: UID) -> None:
    assert read_prefill(dicom(GREY, elements=GIRL, syntax=syntax)) == READ_FROM_GIRL


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_data_set_without_preamble_is_read_as_its_picture_is(syntax: UID) -> None:
    bare = dicom(GREY, elements=GIRL, syntax=syntax, preamble=False)
    assert read(bare).file_format == "DICOM"
    assert read_prefill(bare) == READ_FROM_GIRL
    assert read_prefill(dicom(GREY, elements=GIRL)[132:]) == READ_FROM_GIRL


@pytest.mark.parametrize(("stored", "sex"), [("M", "male"), ("F", "female"), ("O", None), ("", None), ("W", None)])
def test_no_other_sex_than_m_and_f_is_taken(stored: str, sex: str | None) -> None:
    assert _with(PatientSex=stored).sex == sex


@pytest.mark.parametrize(
    ("lateralities", "side"),
    [
        ({"Laterality": "R"}, "right"),
        ({"Laterality": None, "ImageLaterality": "R"}, "right"),
        ({"Laterality": "L", "ImageLaterality": "L"}, "left"),
        ({"Laterality": "L", "ImageLaterality": "R"}, None),
        ({"Laterality": "", "ImageLaterality": "L"}, "left"),
        ({"Laterality": "B"}, None),
        ({"Laterality": None}, None),
    ],
)
def test_laterality_is_left_right_or_unknown(lateralities: dict[str, Any], side: str | None) -> None:
    elements = {keyword: value for keyword, value in (GIRL | lateralities).items() if value is not None}
    assert read_prefill(dicom(GREY, elements=elements)).laterality == side


@pytest.mark.parametrize(
    ("birth", "study"),
    [
        *(("2010", "20200315"), ("201003", "20200315"), ("20100300", "20200315"), ("20100230", "20200315")),
        *(("", "20200315"), ("20100315", ""), ("2010.03.15", "20200315"), ("00000000", "20200315")),
        *(("20200316", "20200315"), ("19000101", "20200315"), ("20000314", "20200315"), ("99991231", "99991231")),
        ("20100315", "20200315\\20210315"),
    ],
)
def test_an_unclear_or_impossible_age_is_none(birth: str, study: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom on writing these
        found = _with(PatientBirthDate=birth, StudyDate=study)
    assert found.chronological_age_months is None
    assert found.unusable == (("chronological age",) if birth and study else ())


def test_what_the_header_says_in_vain_is_named() -> None:
    assert _with(PatientSex="O").unusable == ("sex",)
    assert _with(Laterality="L", ImageLaterality="R").unusable == ("laterality",)
    assert _with(PatientSex="", Laterality="").unusable == ()


def test_the_page_says_what_it_did_not_take_from_the_header() -> None:
    told = prefill_html(_with(PatientBirthDate="19000101"))
    assert "filled in where nothing was chosen: sex female, left hand." in told
    assert "Not taken from the DICOM header" in told
    assert "chronological age. Enter it yourself." in told
    assert "Not taken" not in prefill_html(READ_FROM_GIRL)
    assert prefill_html(Prefill()) == ""


def test_a_reader_who_says_otherwise_than_the_header_is_told_so_for_each_of_the_three() -> None:
    told = contradictions(READ_FROM_GIRL, sex="male", chronological_age_months=84.0, hand="right")
    assert told == [
        "The DICOM header says female, but male was chosen: check which is right.",
        "The DICOM header gives another chronological age than the one typed: check which is right.",
        "The DICOM header says left hand, but the right hand was chosen: check which it is.",
    ]


def test_nothing_contradicts_a_header_that_says_the_same_or_nothing() -> None:
    assert contradictions(READ_FROM_GIRL, sex="female", chronological_age_months=120.5, hand="left") == []
    assert contradictions(READ_FROM_GIRL, sex=None, chronological_age_months=None, hand=None) == []
    assert contradictions(Prefill(), sex="male", chronological_age_months=84.0, hand="right") == []


def test_the_limits_of_age_are_taken() -> None:
    assert _with(PatientBirthDate="20200315").chronological_age_months == 0
    assert _with(PatientBirthDate="20000315").chronological_age_months == MAX_AGE_MONTHS


@pytest.mark.parametrize(
    ("birth", "study", "months"),
    [
        ("2010-03-15", "2020-03-15", 120),
        ("2010-03-15", "2020-03-14", 119 + 28 / 29),
        ("2010-03-15", "2020-04-01", 120 + 17 / 31),
        ("2012-02-29", "2013-02-28", 12),
        ("2012-02-29", "2016-02-28", 47 + 30 / 31),
        ("2015-01-31", "2015-04-30", 3),
        ("2015-01-31", "2015-03-01", 1 + 1 / 31),
        ("2015-01-31", "2015-01-30", -1 + 30 / 31),
    ],
)
def test_months_are_counted_by_the_calendar(birth: str, study: str, months: float) -> None:
    born, taken = datetime.date.fromisoformat(birth), datetime.date.fromisoformat(study)
    assert months_between(born, taken) == pytest.approx(months, abs=1e-12)


def test_age_grows_with_every_day() -> None:
    birth = datetime.date(2011, 12, 31)
    ages = [months_between(birth, birth + datetime.timedelta(days)) for days in range(-40, 1500)]
    assert all(earlier < later for earlier, later in itertools.pairwise(ages))


def test_what_is_not_dicom_gives_nothing() -> None:
    for content in (b"", b"\x08\x00", png(GREY), tiff(GREY), b"PatientSex F", bytes(200), b"\x00" * 128 + b"DICM"):
        assert read_prefill(content) == Prefill()


def test_without_pydicom_there_is_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    content = dicom(GREY, elements=GIRL)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert read_prefill(content) == Prefill()


def test_a_file_too_large_for_a_radiograph_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = dicom(np.zeros((900, 900), np.uint8), elements=GIRL, syntax=DeflatedExplicitVRLittleEndian)
    assert read_prefill(content) == READ_FROM_GIRL
    monkeypatch.setattr(radiograph, "MAX_FILE_BYTES", 100_000)
    assert read_prefill(content) == Prefill()
    assert read_prefill(dicom(np.zeros((900, 900), np.uint8), elements=GIRL)) == Prefill()


def test_five_elements_are_parsed_and_no_more() -> None:
    tags = list(radiograph._PREFILL_TAGS.values())
    dataset = radiograph._dicom_dataset(pydicom, dicom(GREY, elements=GIRL), has_prefix=True, tags=tags)
    assert {element.keyword for element in dataset} <= set(radiograph._PREFILL_TAGS)
    for keyword, tag in radiograph._PREFILL_TAGS.items():
        assert pydicom.datadict.keyword_for_tag(tag) == keyword


def test_damaged_headers_give_a_prefill_without_crash_or_word(caplog: pytest.LogCaptureFixture) -> None:
    whole = dicom(GREY, elements=GIRL)
    draw = np.random.default_rng(8)
    for name in ("pydicom", "PIL"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trial in range(300):
            data = bytearray(whole[: draw.integers(1, len(whole))] if trial % 3 == 0 else whole)
            for place in draw.integers(0, min(len(data), 700), draw.integers(1, 9)):
                data[place] ^= 1 << int(draw.integers(8))
            found = read_prefill(bytes(data))
            assert found.sex in ("female", "male", None)
            assert found.laterality in ("left", "right", None)
            assert found.chronological_age_months is None or 0 <= found.chronological_age_months <= MAX_AGE_MONTHS
    assert caplog.text == ""
