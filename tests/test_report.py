"""How an answer reads: months, years where a person reads, and JSON."""

import io
import json
import logging
import math
import re
import warnings
from dataclasses import dataclass, replace
from datetime import date
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from boneage_hf.clinical import REFERENCE
from boneage_hf.errors import InputError
from boneage_hf.growth_plot import drawing_style
from boneage_hf.report import (
    DISCLAIMER,
    MAX_LABEL,
    CheckLine,
    Report,
    _sheet,
    answer_as_json,
    answer_as_text,
    clean_label,
    format_age,
    format_months,
    image_sentences,
    make_report,
    report_as_html,
    report_as_json,
    report_as_pdf,
    report_as_text,
    report_file,
    verdict_in_words,
)


def answer(months: float, *, interval: list[float] | None = None, sex: str | None = "female") -> dict[str, Any]:
    return {
        "bone_age_months": months,
        "interval_months": interval,
        "attention": np.zeros((2, 2), dtype=np.float32),
        "sex": sex,
    }


@pytest.mark.parametrize(
    ("months", "text"),
    [
        (0.0, "0 months"),
        (1.0, "1 month"),
        (8.2, "8 months"),
        (12.0, "1 year 0 months"),
        (13.0, "1 year 1 month"),
        (123.4, "10 years 3 months"),
        (228.0, "19 years 0 months"),
    ],
)
def test_an_age_is_put_in_years_and_months(months: float, text: str) -> None:
    assert format_age(months) == text


@pytest.mark.parametrize(
    ("months", "text"), [(11.49, "11 months"), (11.5, "1 year 0 months"), (12.5, "1 year 1 month")]
)
def test_half_a_month_is_rounded_up_even_into_a_year(months: float, text: str) -> None:
    assert format_age(months) == text


def test_rounding_never_gives_twelve_months_beside_the_years() -> None:
    for tenths in range(2401):
        words = format_age(tenths / 10).split()
        total = sum(
            int(n) * (12 if unit.startswith("year") else 1) for n, unit in zip(words[::2], words[1::2], strict=True)
        )
        assert total == math.floor(tenths / 10 + 0.5)
        assert int(words[-2]) < 12


def test_an_answer_below_zero_is_called_that_and_not_an_age() -> None:
    assert format_age(-0.4) == "0 months"
    assert format_age(-7.0) == "below 0 months"
    assert format_months(-7.0) == "-7.0 months"


def test_months_have_one_decimal_and_no_negative_zero() -> None:
    assert format_months(123.44) == "123.4 months"
    assert format_months(-0.01) == "0.0 months"


def test_numpy_numbers_are_printed_like_any_other() -> None:
    number: Any = np.float32(123.4)
    assert format_age(number) == "10 years 3 months"
    assert format_months(number) == "123.4 months"


def test_an_answer_without_an_interval_says_so() -> None:
    text = "bone age 10 years 3 months (123.4 months), 90 % interval not available"
    assert answer_as_text(answer(123.4)) == text


def test_an_interval_is_given_in_years_and_in_months() -> None:
    text = answer_as_text(answer(123.4, interval=[108.06, 138.72]))
    assert text.endswith("90 % interval 9 years 0 months to 11 years 7 months (108.1 to 138.7 months)")


def test_json_holds_months_to_two_decimals_and_no_array() -> None:
    low: Any = np.float32(108.0612)
    given = answer(123.456789, interval=[low, 138.7288])
    assert answer_as_json(given) == {
        "bone_age_months": 123.46,
        "interval_months": [108.06, 138.73],
        "sex": "female",
    }
    assert json.loads(json.dumps(answer_as_json(given))) == answer_as_json(given)


def test_json_says_null_for_what_is_not_known() -> None:
    assert json.dumps(answer_as_json(answer(60.0, sex=None))) == (
        '{"bone_age_months": 60.0, "interval_months": null, "sex": null}'
    )


@pytest.mark.parametrize("months", [math.nan, math.inf, -math.inf])
def test_an_age_that_is_no_number_is_refused(months: float) -> None:
    for write in (format_age, format_months):
        with pytest.raises(InputError, match="not a finite number"):
            write(months)
    with pytest.raises(InputError, match="not a finite number"):
        answer_as_json(answer(months))
    with pytest.raises(InputError, match="not a finite number"):
        answer_as_text(answer(60.0, interval=[50.0, months]))


def test_the_disclaimer_names_research() -> None:
    assert DISCLAIMER == "Research use only, not a medical device."


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The shape of the quality gate's verdict."""

    checks: tuple[CheckLine, ...]
    corrections: tuple[str, ...] = ()
    verdict: str = "pass"


def report(
    months: float = 115.0,
    *,
    interval: list[float] | None = None,
    sex: str | None = "female",
    age: float | None = 100.0,
    quality: Any = None,
    **changes: Any,
) -> Report:
    told = make_report(
        answer(months, interval=interval, sex=sex) | ({} if quality is None else {"quality": quality}),
        chronological_age_months=age,
        model="tiny (tiny, 64 px)",
        revision="0123456789ab",
        day=date(2026, 1, 2),
    )
    return replace(told, **changes)


def overlay(width: int = 60, height: int = 80) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 90))


FACTS = ("9 years 7 months", "115.0 months", "8 years 4 months (100.0 months)", "tiny (tiny, 64 px)", "0123456789ab")


def test_every_form_of_a_report_holds_the_facts() -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    told = report(interval=[97.0, 133.0])
    pages = pypdf.PdfReader(io.BytesIO(report_as_pdf(told, overlay=overlay()))).pages
    assert len(pages) == 1
    on_paper = " ".join(pages[0].extract_text().split())
    for text in (report_as_text(told), report_as_html(told, overlay=overlay()), on_paper):
        for part in (*FACTS, "97.0 to 133.0 months", "Not decided at this precision", "2026-01-02", DISCLAIMER):
            assert part in text
        assert REFERENCE in text or "Greulich and Pyle" in text


@pytest.mark.parametrize(
    ("months", "interval", "age", "words", "code"),
    [
        (60.0, [55.0, 65.0], 130.0, "Delayed", "delayed"),
        (100.0, [95.0, 105.0], 100.0, "Normal", "normal"),
        (180.0, [175.0, 185.0], 100.0, "Advanced", "advanced"),
        (115.0, [90.0, 140.0], 100.0, "Not decided at this precision", "indeterminate"),
        (115.0, None, 100.0, "Not decided at this precision", "indeterminate"),
        (115.0, [90.0, 140.0], None, "No standard deviation score", "unknown"),
        (190.0, [180.0, 200.0], 200.0, "No standard deviation score", "unknown"),
    ],
)
def test_a_verdict_is_given_only_where_the_interval_decides_it(
    months: float, interval: list[float] | None, age: float | None, words: str, code: str
) -> None:
    told = report(months, interval=interval, age=age)
    assert verdict_in_words(told) == words
    assert report_as_json(told)["radelement"]["elements"]["Bone age determination"] == code
    assert f"Assessment: {words}" in report_as_text(told)


def test_outside_the_table_the_report_says_why_there_is_no_score() -> None:
    told = report(190.0, age=200.0)
    assert "covers 3 to 192 months, and this child is older" in report_as_text(told)
    assert report_as_json(told)["assessment"]["sds"] is None


def test_without_a_sex_there_is_no_score_and_no_plot() -> None:
    told = report(sex=None)
    assert "the child's sex was not given" in report_as_text(told)
    assert "<svg" not in report_as_html(told)
    assert report_as_json(told)["sex"] is None
    assert report_as_pdf(told).startswith(b"%PDF")


def test_the_json_carries_the_codes_of_the_field() -> None:
    told = report_as_json(report(interval=[97.0, 133.0]))
    assert told["bone_age"]["code"]["code"] == "37362-1"
    assert told["bone_age"]["interval_months"] == [97.0, 133.0]
    assert told["radelement"]["set"]["code"] == "RDES14"
    assert told["radelement"]["elements"]["Skeletal age"] == 115.0
    assert told["radelement"]["elements"]["Chronological age"] == 100.0
    assert json.loads(json.dumps(told, allow_nan=False)) == told


@pytest.mark.parametrize("months", [-3.0, 229.0])
def test_an_age_outside_the_element_is_left_out_of_it(months: float) -> None:
    told = report_as_json(report(months))
    assert told["radelement"]["elements"]["Skeletal age"] is None
    assert told["bone_age"]["months"] == months


def test_no_name_stands_on_a_report_unless_it_was_typed() -> None:
    assert "Report for" not in report_as_text(report()) + report_as_html(report())
    assert report_as_json(report())["label"] is None
    typed = report(label="Case 7")
    assert "Report for: Case 7" in report_as_text(typed)
    assert "Report for Case 7" in report_as_html(typed)


def test_a_label_is_one_printable_line() -> None:
    assert clean_label("  Case\t7\n\x00 b ") == "Case 7 b"
    assert len(clean_label("x" * 500)) == MAX_LABEL


EVIL = '<script>alert("1")</script>'


def test_everything_from_outside_is_escaped_in_the_page() -> None:
    quality = Verdict((CheckLine(EVIL, "warn", EVIL),), (EVIL,))
    told = report(quality=quality, label=EVIL, model=EVIL, revision=EVIL, remarks=(EVIL,))
    page = report_as_html(told)
    assert "<script" not in page.lower()
    assert page.lower().count("&lt;script&gt;") >= 6


def test_the_page_asks_nobody_for_anything() -> None:
    page = report_as_html(report(interval=[97.0, 133.0]), overlay=overlay())
    assert not re.search(r"(?:src|href|url\()\s*[=(]?[\"']?https?:", page)
    assert page.count("<img") == page.count('src="data:image/jpeg;base64,') == 1
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_the_same_report_gives_the_same_sheet() -> None:
    told = report(interval=[97.0, 133.0])
    assert report_as_pdf(told, overlay=overlay()) == report_as_pdf(told, overlay=overlay())


FOREIGN = "\N{CJK UNIFIED IDEOGRAPH-674E}"


def test_a_typed_dollar_is_no_mathematics() -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    content = report_as_pdf(report(label="Case $x^2$"))
    assert "Case $x^2$" in pypdf.PdfReader(io.BytesIO(content)).pages[0].extract_text()


def test_a_letter_that_the_pdf_lacks_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        report_as_pdf(report(model=FOREIGN))
    assert "674E" not in caplog.text.upper()


def test_a_name_with_letters_that_the_pdf_lacks_is_refused_there_and_nowhere_else() -> None:
    told = report(label=f"Case {FOREIGN}")
    with pytest.raises(InputError, match="type it in Latin letters, or save HTML") as refusal:
        report_as_pdf(told)
    assert FOREIGN not in str(refusal.value)
    for kind in ("html", "json", "txt"):
        assert FOREIGN in report_file(told, kind).decode()
    assert report_as_pdf(report(label="Łukasz Ünal Ærø Ελένη Жанна")).startswith(b"%PDF")


@pytest.mark.parametrize("letter", ["i", "W", "\N{EM DASH}"])
def test_the_longest_name_stays_on_the_sheet_however_wide_its_letters(letter: str) -> None:
    with drawing_style():
        figure = _sheet(report(label=letter * MAX_LABEL), None)
        line = next(text for text in figure.texts if text.get_text().startswith("Report for"))
        extent = line.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert extent.x1 <= 0.925 * figure.bbox.width
    assert (line.get_fontsize() == 9.5) == (letter == "i")


def test_many_checks_and_long_remarks_stay_on_one_page() -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    quality = Verdict(tuple(CheckLine(f"check_{n}", "pass", "A sentence of usual length on it.") for n in range(12)))
    told = report(quality=quality, remarks=("A remark that is long. " * 20,), label="x" * MAX_LABEL)
    pages = pypdf.PdfReader(io.BytesIO(report_as_pdf(told, overlay=overlay(30, 300)))).pages
    assert len(pages) == 1
    assert "Check 11, passed" in pages[0].extract_text()


@pytest.mark.parametrize("count", [15, 21, 60])
def test_no_line_of_many_checks_runs_off_the_sheet(count: int) -> None:
    quality = Verdict(tuple(CheckLine(f"check_{n}", "pass", "A sentence on it.") for n in range(count)))
    with drawing_style():
        figure = _sheet(report(quality=quality), None)
        renderer = FigureCanvasAgg(figure).get_renderer()
        extents = [text.get_window_extent(renderer) for text in figure.texts]
    assert min(extent.y0 for extent in extents) >= 0.025 * figure.bbox.height
    assert max(extent.x1 for extent in extents) <= 0.925 * figure.bbox.width


def test_warnings_stand_before_what_passed() -> None:
    quality = Verdict((CheckLine("grey_levels", "pass", "Enough."), CheckLine("cut_off", "warn", "A finger.")))
    assert image_sentences(report(quality=quality)) == ["Cut off, warning: A finger.", "Grey levels, passed: Enough."]


def test_checks_corrections_and_remarks_are_sentences() -> None:
    quality = Verdict((CheckLine("grey_levels", "pass", "Enough."),), ("Turned by 90 degrees.",))
    told = report(quality=quality, remarks=("Look.",))
    assert image_sentences(told) == [
        "Look.",
        "Corrected before reading: Turned by 90 degrees.",
        "Grey levels, passed: Enough.",
    ]


def test_an_unchecked_image_is_called_that() -> None:
    assert "was not checked" in report_as_text(report())
    assert report_as_json(report())["checks"] is None


def test_a_right_hand_is_remarked_on() -> None:
    told = make_report(
        answer(115.0), chronological_age_months=None, hand="right", model="m", revision="r", day=date(2026, 1, 2)
    )
    assert "right hand" in report_as_text(told)


def test_an_impossible_age_makes_no_report() -> None:
    with pytest.raises(InputError, match="negative"):
        report(age=-1.0)
