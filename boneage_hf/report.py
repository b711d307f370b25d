"""An answer of the pipeline in a person's words, as JSON, and as a report: the only place that puts bone age in years.

A `Report` is the answer, what is known of the child, and the assessment; it is written as plain text to paste, as
JSON, as an HTML page that needs no other file, and as a one-page PDF. Nothing in it names a person unless somebody
typed a name into `label`.

Codes in the JSON, and what is verified of them:

* LOINC 37362-1 with the display "Bones X-ray bone age": as HL7's FHIR profile of a bone age observation fixes it
  (hl7.org/fhir/2016May/hspc/hspc-boneage.html).
* RadElement set RDES14, "pediatric bone age": its name, the names of its elements, their units and the values of "Bone
  age determination" (delayed, normal, advanced, indeterminate, unknown) as the Open Imaging Finding Model
  (github.com/hoodcm/oifm-definitions, pediatric_bone_age) restates the set of radelement.org. The element codes could
  not be verified and are not given. "Brush foundation mean bone age" is left out, because its unit is not stated.
"""

import base64
import io
import json
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from .clinical import LIMIT_SDS, REFERENCE, Assessment, assess
from .errors import InputError
from .growth_plot import draw_growth, drawing_style, growth_plot_svg
from .sex import Sex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISCLAIMER = "Research use only, not a medical device."

NOT_CHECKED = "The image was not checked: look for yourself whether it shows one hand."

#: Share of reference bone ages that `interval_months` of an answer is calibrated to hold, in percent.
INTERVAL_PERCENT = 90


def format_age(months: float) -> str:
    """Bone age in years and months, rounded to whole months (halves go up): `"10 years 3 months"`, `"8 months"`.

    A model's answer may lie below zero, which is no age: `"below 0 months"`.

    Args:
        months: bone age in months.

    Raises:
        InputError: `months` is not a finite number.
    """
    whole = math.floor(_finite(months) + 0.5)
    if whole < 0:
        return "below 0 months"
    years, rest = divmod(whole, 12)
    return f"{_counted(years, 'year')} {_counted(rest, 'month')}" if years else _counted(rest, "month")


def format_months(months: float) -> str:
    """Months to one decimal: `"123.4 months"`.

    Raises:
        InputError: `months` is not a finite number.
    """
    return f"{_finite(months):z.1f} months"


def answer_as_text(answer: Mapping[str, Any]) -> str:
    """One line: `"bone age 10 years 3 months (123.4 months), 90 % interval not available"`.

    Args:
        answer: of [`BoneAgePipeline`] for one image.

    Raises:
        InputError: a number of the answer is not finite.
    """
    age = answer["bone_age_months"]
    text = f"bone age {format_age(age)} ({format_months(age)}), {INTERVAL_PERCENT} % interval "
    if answer["interval_months"] is None:
        return text + "not available"
    low, high = answer["interval_months"]
    return f"{text}{format_age(low)} to {format_age(high)} ({_finite(low):z.1f} to {format_months(high)})"


def answer_as_json(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What `json.dumps` can write of an answer: `bone_age_months`, `interval_months`, `sex`; months to two decimals.

    Args:
        answer: of [`BoneAgePipeline`] for one image.

    Raises:
        InputError: a number of the answer is not finite (JSON has no such numbers).
    """
    interval = answer["interval_months"]
    return {
        "bone_age_months": _rounded(answer["bone_age_months"]),
        "interval_months": None if interval is None else [_rounded(end) for end in interval],
        "sex": answer["sex"],
    }


# --- the report -----------------------------------------------------------------------------------------------------

LOINC = {"system": "http://loinc.org", "code": "37362-1", "display": "Bones X-ray bone age"}
RADELEMENT_SET = {"system": "RadElement", "code": "RDES14", "display": "pediatric bone age"}

#: Longest that "Chronological age" and "Skeletal age" of RDES14 may be, months; the least is 0.
RADELEMENT_MAX_MONTHS = 228

#: Longest label that a report carries, characters.
MAX_LABEL = 80

Hand = Literal["left", "right"]


@dataclass(frozen=True)
class CheckLine:
    """One check of the image.

    Args:
        name: what was checked.
        verdict: `"pass"`, `"warn"` or `"refuse"`.
        sentence: what was found.
    """

    name: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Report:
    """One answer with what is known of the child; all months.

    Args:
        assessment: None where the sex is not known (only a model that does not use it answers then).
        hand: which hand is shown, if that is known.
        checks: of the image; None where the pipeline made none.
        corrections: what was put right before the image was read.
        remarks: sentences that the reader should see beside the answer, such as a contradiction to a header.
        model: name of the checkpoint, with `revision` of its weights.
        day: on which the report was made.
        label: what the reader typed to tell the report by; empty unless typed.
    """

    bone_age_months: float
    interval_months: tuple[float, float] | None
    sex: Sex | None
    chronological_age_months: float | None
    assessment: Assessment | None
    hand: Hand | None
    checks: tuple[CheckLine, ...] | None
    corrections: tuple[str, ...]
    remarks: tuple[str, ...]
    model: str
    revision: str
    day: date
    label: str = ""


def make_report(
    answer: Mapping[str, Any],
    *,
    chronological_age_months: float | None,
    hand: Hand | None = None,
    remarks: Sequence[str] = (),
    model: str,
    revision: str,
    day: date,
) -> Report:
    """The report of one answer.

    Args:
        answer: of [`BoneAgePipeline`] for one image.

    Raises:
        InputError: a number of the answer is not finite, or the chronological age is none (see `clinical.assess`).
    """
    months = _finite(answer["bone_age_months"])
    interval = answer["interval_months"]
    ends = None if interval is None else (_finite(interval[0]), _finite(interval[1]))
    sex: Sex | None = answer["sex"]
    assessment = None
    if sex is not None:
        assessment = assess(
            bone_age_months=months,
            interval_months=ends,
            sex=sex,
            chronological_age_months=chronological_age_months,
        )
    notes = list(remarks)
    if hand == "right":
        notes.append(
            "The right hand is shown; references of bone age, and nearly all training images, are left hands."
        )
    quality = answer.get("quality")
    return Report(
        bone_age_months=months,
        interval_months=ends,
        sex=sex,
        chronological_age_months=chronological_age_months,
        assessment=assessment,
        hand=hand,
        checks=None if quality is None else check_lines(quality),
        corrections=() if quality is None else tuple(quality.corrections),
        remarks=tuple(notes),
        model=model,
        revision=revision,
        day=day,
    )


def check_lines(quality: Any) -> tuple[CheckLine, ...]:
    """The checks of a verdict of the quality gate, in their order."""
    return tuple(
        CheckLine(check.name.replace("_", " ").capitalize(), check.verdict, check.sentence) for check in quality.checks
    )


def clean_label(text: str) -> str:
    """What a reader typed to tell a report by: one line, printable, at most MAX_LABEL characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:MAX_LABEL]


def verdict_in_words(report: Report) -> str:
    """`"Delayed"`, `"Normal"`, `"Advanced"`, `"Not decided at this precision"` or `"No standard deviation score"`."""
    assessment = report.assessment
    if assessment is None or assessment.sds is None:
        return "No standard deviation score"
    return "Not decided at this precision" if assessment.verdict is None else assessment.verdict.capitalize()


def statement(report: Report) -> str:
    """One sentence: score, range and verdict, or why there is none."""
    if report.assessment is None:
        return "There is no standard deviation score: the child's sex was not given."
    return report.assessment.statement


def interval_in_words(report: Report) -> str:
    """`"9 years 0 months to 11 years 7 months (108.1 to 138.7 months)"`, or that there is none."""
    if report.interval_months is None:
        return "not available for this model"
    low, high = report.interval_months
    return f"{format_age(low)} to {format_age(high)} ({low:z.1f} to {format_months(high)})"


def report_rows(report: Report) -> list[tuple[str, str]]:
    """What stands on every report, as pairs of name and text, in reading order; sentences of the image apart."""
    age = report.chronological_age_months
    rows = [("Report for", report.label)] if report.label else []
    rows += [
        ("Bone age", f"{format_age(report.bone_age_months)} ({format_months(report.bone_age_months)})"),
        (f"{INTERVAL_PERCENT} % interval", interval_in_words(report)),
        ("Assessment", verdict_in_words(report)),
        ("Reason", statement(report)),
        ("Sex", "not given" if report.sex is None else report.sex),
        ("Chronological age", "not given" if age is None else f"{format_age(age)} ({format_months(age)})"),
        ("Hand shown", report.hand or "not stated"),
        *context_rows(report),
    ]
    return rows


def context_rows(report: Report) -> list[tuple[str, str]]:
    """Where the answer comes from."""
    return [
        ("Model", report.model),
        ("Revision", report.revision),
        ("Reference", f"{REFERENCE}; limits -{LIMIT_SDS:g} and +{LIMIT_SDS:g} SD"),
        ("Date of the report", report.day.isoformat()),
    ]


def provenance(*, model: str, revision: str, day: date) -> dict[str, str]:
    """What stands on every answer for a program: `model`, `revision`, `reference`, `date` and `notice`."""
    return {
        "model": model,
        "revision": revision,
        "reference": REFERENCE,
        "date": day.isoformat(),
        "notice": DISCLAIMER,
    }


def source_in_words(source: Mapping[str, str]) -> str:
    """`"Model ..., revision ... Reference: ... Date: ... Research use only, ..."`.

    Args:
        source: see `provenance`; without `reference` for answers that compare with none.
    """
    sentences = [f"Model {source['model']}, revision {source['revision']}."]
    sentences += [f"Reference: {source['reference']}."] if "reference" in source else []
    return " ".join([*sentences, f"Date: {source['date']}.", source["notice"]])


def image_sentences(report: Report) -> list[str]:
    """What was checked and corrected of the image, and the remarks; one sentence each, those to act on first."""
    marks = {"refuse": "refused", "warn": "warning", "pass": "passed"}
    lines = [f"Corrected before reading: {text}" for text in report.corrections]
    if report.checks is None:
        lines.append(NOT_CHECKED)
    else:
        checks = sorted(report.checks, key=lambda check: [*marks].index(check.verdict))
        lines += [f"{check.name}, {marks[check.verdict]}: {check.sentence}" for check in checks]
    return [*report.remarks, *lines]


def report_as_text(report: Report) -> str:
    """The report to paste into another system: a line for each fact, no line longer than its sentence."""
    lines = ["Bone age from a hand radiograph", DISCLAIMER, ""]
    lines += [f"{name}: {text}" for name, text in report_rows(report)]
    lines += ["", "Image:", *(f"- {text}" for text in image_sentences(report))]
    return "\n".join(lines) + "\n"


def report_as_json(report: Report) -> dict[str, Any]:
    """What `json.dumps` can write of a report; months and scores to two decimals, None for what is not known."""
    assessment = report.assessment
    interval = report.interval_months
    checks = report.checks
    return {
        "label": report.label or None,
        "bone_age": {
            "code": LOINC,
            "months": _rounded(report.bone_age_months),
            "words": format_age(report.bone_age_months),
            "interval_months": None if interval is None else [_rounded(end) for end in interval],
            "interval_percent": None if interval is None else INTERVAL_PERCENT,
        },
        "sex": report.sex,
        "chronological_age_months": _rounded_or_none(report.chronological_age_months),
        "hand": report.hand,
        "assessment": assessment_as_json(report),
        "radelement": {
            "set": RADELEMENT_SET,
            "elements": {
                "Chronological age": _radelement_months(report.chronological_age_months),
                "Skeletal age": _radelement_months(report.bone_age_months),
                "Bone age determination": _radelement_determination(assessment),
                "Standard deviation for age": None if assessment is None else _rounded_or_none(assessment.sd_months),
            },
        },
        "checks": None if checks is None else [vars(check) for check in checks],
        "corrections": list(report.corrections),
        "remarks": list(report.remarks),
        **provenance(model=report.model, revision=report.revision, day=report.day),
    }


def assessment_as_json(report: Report) -> dict[str, Any]:
    """`sds`, `sds_interval`, `verdict` (None where undecided), the two in words, and the table with its values."""
    assessment = report.assessment
    ends = None if assessment is None else assessment.sds_interval
    return {
        "sds": None if assessment is None else _rounded_or_none(assessment.sds),
        "sds_interval": None if ends is None else [_rounded(end) for end in ends],
        "verdict": None if assessment is None else assessment.verdict,
        "verdict_in_words": verdict_in_words(report),
        "statement": statement(report),
        "reference": REFERENCE,
        "sd_months": None if assessment is None else _rounded_or_none(assessment.sd_months),
        "mean_skeletal_age_months": None
        if assessment is None
        else _rounded_or_none(assessment.mean_skeletal_age_months),
    }


def _radelement_months(months: float | None) -> float | None:
    return None if months is None or not 0 <= months <= RADELEMENT_MAX_MONTHS else _rounded(months)


def _radelement_determination(assessment: Assessment | None) -> str:
    if assessment is None or assessment.sds is None:
        return "unknown"
    return assessment.verdict or "indeterminate"


# --- as a page, and as a sheet --------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 46rem; margin: 0 auto;
  padding: 1.5rem; }
header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 2rem;
  border-bottom: 2px solid #1a1a1a; }
h1 { font-size: 1.15rem; margin: 0 0 .4rem; }
h2 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.notice { font-weight: 600; color: #9a3412; margin: 0 0 .4rem; }
.age { font-size: 2rem; font-weight: 600; line-height: 1.2; margin: 1rem 0 0; }
.sub { color: #444; margin: 0; }
.verdict { font-size: 1.2rem; font-weight: 600; margin: 1rem 0 0; }
dl { margin: 1rem 0; }
dl div { display: flex; gap: 1rem; border-top: 1px solid #ccc; padding: .25rem 0; }
dt { flex: 0 0 10rem; color: #444; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; break-inside: avoid; }
figure svg, figure img { display: block; max-width: 100%; height: auto; max-height: 32rem; }
figcaption { font-size: .85rem; color: #444; }
@media print { @page { size: A4; margin: 14mm; } body { padding: 0; } figure img { max-height: 18rem; } }
"""

_MAP_CAPTION = (
    "Attention map over the radiograph as the model saw it: dark little weight, bright most. These are weights, not "
    "reasons, and need not lie on bones."
)


def report_as_html(report: Report, *, overlay: Image.Image | None = None) -> str:
    """The report as one HTML page that fetches nothing.

    Args:
        overlay: the attention map over the radiograph, from `explain.overlay`.
    """
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _page_rows(report))
    label = f'<p class="sub">Report for {escape(report.label)}</p>' if report.label else ""
    figures = "" if report.assessment is None else f"<figure>{growth_plot_svg(report.assessment)}</figure>"
    if overlay is not None:
        figures += (
            f'<figure><img src="{jpeg_data_uri(overlay)}" alt="Attention map over the radiograph">'
            f"<figcaption>{_MAP_CAPTION}</figcaption></figure>"
        )
    sentences = "".join(f"<li>{escape(text)}</li>" for text in image_sentences(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Bone age report</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>Bone age from a hand radiograph</h1><p class="notice">{escape(DISCLAIMER)}</p></header>'
        f'<main>{label}<p class="age">{escape(format_age(report.bone_age_months))}</p>'
        f'<p class="sub">{escape(format_months(report.bone_age_months))}; {INTERVAL_PERCENT} % interval '
        f"{escape(interval_in_words(report))}</p>"
        f'<p class="verdict">{escape(verdict_in_words(report))}</p><p class="sub">{escape(statement(report))}</p>'
        f"<dl>{rows}</dl>{figures}<h2>Image</h2><ul>{sentences}</ul>"
        f'<p class="notice">{escape(DISCLAIMER)}</p></main></body></html>\n'
    )


def report_as_pdf(report: Report, *, overlay: Image.Image | None = None) -> bytes:
    """The report as a PDF of one A4 page; its text is text. The same report gives the same bytes.

    Args:
        overlay: the attention map over the radiograph, from `explain.overlay`.

    Raises:
        InputError: `label` has letters that the font of the PDF lacks, such as Chinese ones.
    """
    with drawing_style(), warnings.catch_warnings():
        _check_letters(report.label)
        # Elsewhere, as in a model's name, a letter that the font lacks becomes a box, and no warning in the logs.
        warnings.simplefilter("ignore")
        stream = io.BytesIO()
        nothing = {"Creator": None, "Producer": None, "CreationDate": None, "Title": "Bone age report"}
        _sheet(report, overlay).savefig(stream, format="pdf", metadata=nothing)
    return stream.getvalue()


#: The forms in which a report is saved, by the ending of the file.
MEDIA_TYPES = {"pdf": "application/pdf", "html": "text/html", "json": "application/json", "txt": "text/plain"}


def report_file(report: Report, kind: str, *, overlay: Image.Image | None = None) -> bytes:
    """The content of a file with the report; `kind` is one of `MEDIA_TYPES`, text is UTF-8.

    Raises:
        InputError: see `report_as_pdf`.
    """
    if kind == "pdf":
        return report_as_pdf(report, overlay=overlay)
    if kind == "html":
        return report_as_html(report, overlay=overlay).encode("utf-8")
    if kind == "json":
        return (json.dumps(report_as_json(report), indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    return report_as_text(report).encode("utf-8")


def jpeg_data_uri(image: Image.Image, *, quality: int = 90) -> str:
    """A picture as a data URI, so that it lies in the page and nowhere else."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _page_rows(report: Report) -> list[tuple[str, str]]:
    above = {"Report for", "Bone age", f"{INTERVAL_PERCENT} % interval", "Assessment", "Reason"}
    return [row for row in report_rows(report) if row[0] not in above]


#: A4 in inches, and the edge of the sheet as shares of it.
_A4 = (8.27, 11.69)
_LEFT, _RIGHT = 0.08, 0.92
_PICTURE_WIDTH = 0.285
#: Lines of 8.5 points between the heading of the image's sentences and the lower edge.
_LINES_BELOW = 15
_INK, _PALE, _NOTICE = "#1a1a1a", "#555555", "#9a3412"


def _check_letters(label: str) -> None:
    """A box in place of a letter would make a report that belongs to nobody, or to somebody else."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    if any(font.get_char_index(ord(letter)) == 0 for letter in label):
        raise InputError(
            "The PDF has no letters for some of this name: type it in Latin letters, or save HTML, which has them."
        )


def _size_that_fits(text: str, size: float) -> float:
    """Font size in points, at most `size`, at which a line is no wider than the sheet between its edges."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return min(size, size * (_RIGHT - _LEFT) * _A4[0] * 72 / max(width, 1))


def _sheet(report: Report, overlay: Image.Image | None) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=_A4, facecolor="white")

    def write(x: float, y: float, text: str, size: float, *, colour: str = _INK, **options: Any) -> None:
        # Never as mathematics: a typed "$" is a "$".
        figure.text(x, y, text, fontsize=size, color=colour, va="top", parse_math=False, **options)

    def rule(y: float, width: float = 0.6, colour: str = "#bbbbbb") -> None:
        figure.add_artist(Line2D([_LEFT, _RIGHT], [y, y], linewidth=width, color=colour))

    write(_LEFT, 0.962, "Bone age from a hand radiograph", 13, weight="bold")
    write(_RIGHT, 0.960, DISCLAIMER, 9, colour=_NOTICE, weight="bold", ha="right")
    rule(0.940, 1.2, _INK)
    if report.label:
        line = f"Report for {report.label}"
        write(_LEFT, 0.932, line, _size_that_fits(line, 9.5), colour=_PALE)
    write(_LEFT, 0.914, format_age(report.bone_age_months), 24, weight="bold")
    write(_LEFT, 0.878, f"{format_months(report.bone_age_months)}", 10, colour=_PALE)
    write(_LEFT, 0.862, f"{INTERVAL_PERCENT} % interval: {interval_in_words(report)}", 10)
    write(_LEFT, 0.836, verdict_in_words(report), 14, weight="bold")
    write(_LEFT, 0.814, "\n".join(textwrap.wrap(statement(report), 105)), 9, linespacing=1.35)

    y = 0.776
    for name, text in _page_rows(report):
        rule(y + 0.004)
        wrapped = textwrap.wrap(text, 82) or [""]
        write(_LEFT, y, name, 9, colour=_PALE, linespacing=1.3)
        write(_LEFT + 0.19, y, "\n".join(wrapped), 9, linespacing=1.3)
        y -= 0.0155 * len(wrapped) + 0.005
    rule(y + 0.004)

    top, bottom = y - 0.018, 0.335
    if report.assessment is not None:
        draw_growth(figure.add_axes((_LEFT + 0.045, bottom, 0.46, top - bottom)), report.assessment)
    if overlay is not None:
        # As wide as its column, or as high as the plot beside it.
        width = min(_PICTURE_WIDTH, (top - bottom) * _A4[1] * overlay.width / overlay.height / _A4[0])
        height = width * _A4[0] * overlay.height / overlay.width / _A4[1]
        axes = figure.add_axes((_RIGHT - _PICTURE_WIDTH, top - height, width, height))
        axes.imshow(overlay)
        axes.set_axis_off()
        caption = "\n".join(textwrap.wrap(_MAP_CAPTION, 50))
        write(_RIGHT - _PICTURE_WIDTH, top - height - 0.006, caption, 6.5, colour=_PALE, linespacing=1.3)

    write(_LEFT, 0.262, "Image", 10, weight="bold")
    lines, size = _lines_that_fit(image_sentences(report), 8.5)
    write(_LEFT, 0.243, "\n".join(lines), size, linespacing=1.4)
    return figure


def _lines_that_fit(sentences: Sequence[str], size: float) -> tuple[list[str], float]:
    """The sentences in lines, and the font size in points, at most `size`, at which they end on the sheet."""
    while True:
        lines = [
            line
            for sentence in sentences
            for line in textwrap.wrap(sentence, int(112 * 8.5 / size), initial_indent="- ", subsequent_indent="  ")
        ]
        if len(lines) * size <= _LINES_BELOW * 8.5:
            return lines, size
        size *= 0.95


def _rounded(months: float) -> float:
    return round(_finite(months), 2) + 0.0  # no -0.0


def _rounded_or_none(value: float | None) -> float | None:
    return None if value is None else _rounded(value)


def _finite(months: float) -> float:
    value = float(months)
    if not math.isfinite(value):
        raise InputError("The bone age is not a finite number: the checkpoint is damaged; load another.")
    return value


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
