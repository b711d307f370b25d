"""The comparison table as printed, the corrected one, one table per protocol: as Markdown, HTML and CSV.

The report holds no date and nothing of the machine: the same tables give the same bytes.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

from .measured import MeasuredResult, load_measured, rank, to_csv, write_text
from .protocol import PROTOCOLS, Protocol
from .registry import STATUSES, PrintedRow, PublishedResult, find, load_published, load_reference_table

#: What a reader sees where a source gives no number.
MISSING = "\N{EN DASH}"

#: Rows of the corrected table: those of the printed one, and where Deeplasia's second figure comes from.
_CORRECTED = (
    ("VGG19+Attention (reference project)", "own-split-1024"),
    ("AXNet", "own-split"),
    ("Deeplasia", "rsna-test-200"),
    ("Deeplasia", "dha-1383"),
    ("Deeplasia", "gdbd-702"),
)

_CSV_COLUMNS = (
    "table",
    "system",
    "year",
    "protocol",
    "data_set",
    "n",
    "readers",
    "mae_months",
    "mae_low_months",
    "mae_high_months",
    "mae_ci95_low_months",
    "mae_ci95_high_months",
    "rmse_months",
    "mse_months2",
    "mad_months",
    "mad_meaning",
    "status",
    "source",
    "note",
)


@dataclass(frozen=True)
class Table:
    """Text cells under column heads; `numeric` are the columns that are set flush right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    heading: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    notes: tuple[str, ...] = ()


def write_report(
    out: Path,
    *,
    published: Sequence[PublishedResult] | None = None,
    measured: Sequence[MeasuredResult] | None = None,
) -> list[Path]:
    """Write `report.md`, `report.html` and `report.csv` into the folder `out`, each as a whole or not at all.

    Returns:
        The three files.
    """
    published = load_published() if published is None else published
    measured = load_measured() if measured is None else measured
    printed = load_reference_table()
    sections = build_sections(printed, published, measured)
    files = {
        out / "report.md": to_markdown(sections),
        out / "report.html": to_html(sections),
        out / "report.csv": build_csv(printed, published, measured),
    }
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def build_sections(
    printed: Sequence[PrintedRow], published: Sequence[PublishedResult], measured: Sequence[MeasuredResult]
) -> list[Section]:
    """Everything the report says, before it is set as Markdown or HTML."""
    used = {result.protocol for result in published} | {result.protocol for result in measured}
    return [
        Section(
            "Bone age from hand radiographs: what is published and what was measured",
            (
                "All errors are in months, the MSE in months squared. Numbers compare only within one protocol: the "
                f"same images, against the same reference ages. A dash ({MISSING}) stands where a source gives no "
                "number; none is filled in.",
            ),
        ),
        _printed_section(printed),
        _corrected_section(published),
        _measured_section(measured),
        *(
            _protocol_section(protocol, published, measured)
            for protocol in PROTOCOLS.values()
            if protocol.name in used
        ),
        Section(
            "How to read the status",
            (
                *(f"{status}: {meaning}." for status, meaning in STATUSES.items()),
                "measured: evaluated by this project, with the hash of its predictions in results/measured.csv.",
            ),
        ),
    ]


def _printed_section(printed: Sequence[PrintedRow]) -> Section:
    columns = ("Method", "MAE", "MSE", "MAD", "RMSE")
    rows = tuple((row.method, *(text or MISSING for text in (row.mae, row.mse, row.mad, row.rmse))) for row in printed)
    return Section(
        "The comparison table as the reference project prints it",
        ("Kept as it is, for the record. It must not be quoted without the corrections below.",),
        Table("Reference project, as printed", columns, rows, frozenset(columns[1:])),
    )


def _corrected_section(published: Sequence[PublishedResult]) -> Section:
    rows = [find(published, system, protocol) for system, protocol in _CORRECTED]
    own, _, rsna, dha, dysplasia = rows
    columns = ("Method", "Data set", "n", "Readers", "MAE", "MSE", "RMSE", "Printed as MAD", "Status", "Source")
    table = Table(
        "The same systems with data set, readers and status",
        columns,
        tuple(
            (
                result.system,
                f"{PROTOCOLS[result.protocol].data_set}: {PROTOCOLS[result.protocol].split}",
                _text(result.n),
                _text(result.raters),
                _mae(result),
                _text(result.mse_months),
                _rmse(result),
                MISSING if result.mad_months is None else f"{result.mad_months}: {result.mad_meaning}",
                result.status,
                _source(result),
            )
            for result in rows
        ),
        frozenset({"n", "Readers", "MAE", "MSE", "RMSE"}),
    )
    notes = (
        f"MAD means two things. Deeplasia's {rsna.mad_months} is the mean absolute difference, which is the MAE. The "
        f"reference project's {own.mad_months} is below its own MAE of {own.mae_months}, so it is another measure "
        "(median absolute error, or mean absolute deviation about the bias). Like for like the two figures are "
        f"{own.mae_months} and {rsna.mae_months}, and even those are from different test sets.",
        f"Deeplasia's two printed figures are from different test sets. {rsna.mae_months} is from {rsna.n} images of "
        f"the RSNA test set with {rsna.raters} readers, where its RMSE is {rsna.rmse_months}; an RMSE of "
        f"{dha.rmse_months} is published for {dha.n:,} images of the Digital Hand Atlas and for {dysplasia.n} images "
        "of children with skeletal dysplasias.",
        "There is no common protocol. The three printed rows are on three test sets with different readers, so their "
        "order is no ranking.",
    )
    return Section("The same table, corrected", (), table, notes)


def _measured_section(measured: Sequence[MeasuredResult]) -> Section:
    heading = "Measured by this project"
    if not measured:
        return Section(
            heading, ("Nothing has been measured yet: results/measured.csv has no row, so this report shows none.",)
        )
    columns = (
        "System",
        "Protocol",
        "n",
        "MAE",
        "RMSE",
        "Median absolute error",
        "Bias",
        "R2",
        "Within 12 months",
        "Flip average",
        "Checkpoint",
        "Predictions (sha256)",
        "Date",
    )
    rows = tuple(
        (
            result.system,
            result.protocol,
            str(result.n),
            _interval(result, "mae_months"),
            _interval(result, "rmse_months"),
            _interval(result, "median_absolute_error_months"),
            _interval(result, "bias_months"),
            _interval(result, "r2"),
            _interval(result, "within_12_months"),
            "yes" if result.flip_average else "no",
            _checkpoint(result),
            f"{result.predictions_sha256[:12]}...",
            result.date[:10],
        )
        for result in measured
    )
    return Section(
        heading,
        ("In brackets: 95 % percentile bootstrap interval over images. It says nothing about another data set.",),
        Table("Measured rows, in no order of merit", columns, rows, frozenset(columns[2:9])),
    )


def _protocol_section(
    protocol: Protocol, published: Sequence[PublishedResult], measured: Sequence[MeasuredResult]
) -> Section:
    cited = sorted(
        (result for result in published if result.protocol == protocol.name),
        key=lambda result: (result.year or 0, result.system),
    )
    own = [result for result in measured if result.protocol == protocol.name]
    ranked = rank([result for result in own if result.same_ground_truth])
    unranked = [result for result in own if not result.same_ground_truth]
    places = {result.system: str(place) for place, result in enumerate(ranked, start=1)} if len(ranked) > 1 else {}
    columns: tuple[str, ...] = (
        "Place",
        "System",
        "Year",
        "MAE",
        "RMSE",
        "MSE",
        "Knows the sex",
        "Status",
        "Source",
        "Note",
    )
    rows: list[tuple[str, ...]] = [
        (
            places.get(result.system, MISSING),
            result.system,
            result.date[:4],
            _interval(result, "mae_months"),
            _interval(result, "rmse_months"),
            _interval(result, "mse_months2"),
            MISSING,
            result.status,
            _checkpoint(result),
            "" if result.same_ground_truth else "version of the ground truth not shown: no place",
        )
        for result in (*ranked, *unranked)
    ]
    rows += [
        (
            MISSING,
            result.system,
            _text(result.year),
            _mae(result),
            _rmse(result),
            _text(result.mse_months),
            result.uses_sex or MISSING,
            result.status,
            _source(result),
            "; ".join(part for part in (result.model, result.ci, result.note) if part),
        )
        for result in cited
    ]
    if not places:
        columns, rows = columns[1:], [row[1:] for row in rows]
    paragraphs = [
        f"Data set: {protocol.data_set}. Split: {protocol.split}. Images: {_text(protocol.n)}. Readers per reference "
        f"age: {_text(protocol.readers)}. Ground truth: {protocol.ground_truth}. Preprocessing: "
        f"{protocol.preprocessing_note}.",
        "Fingerprint of the ground truth: "
        + (protocol.ground_truth_fingerprint or "not known, so no row can be shown to use the same labels")
        + ".",
    ]
    if not protocol.same_images:
        paragraphs.append("Every row is on other images: do not compare them with one another.")
    elif cited:
        paragraphs.append("Cited rows stand in the order of their year; they get no place.")
    if places:
        paragraphs.append(
            "Places go by the MAE of measured rows; where two intervals overlap, the order may be chance."
        )
    return Section(
        f"Protocol {protocol.name}",
        tuple(paragraphs),
        Table(f"Results under {protocol.name}", columns, tuple(rows), frozenset({"Year", "MAE", "RMSE", "MSE"})),
    )


def _text(value: object) -> str:
    return MISSING if value is None else str(value)


def _mae(result: PublishedResult) -> str:
    ends = f"{result.mae_low_months} to {result.mae_high_months}" if result.mae_low_months is not None else ""
    if result.mae_months is None:
        return ends or MISSING
    return f"{result.mae_months} ({ends})" if ends else str(result.mae_months)


def _rmse(result: PublishedResult) -> str:
    if result.rmse_months is not None:
        return str(result.rmse_months)
    if result.mse_months is not None:
        return f"{result.mse_months.sqrt().quantize(Decimal('0.01'), ROUND_HALF_EVEN)} (root of the MSE)"
    return MISSING


def _source(result: PublishedResult) -> str:
    link = f" https://doi.org/{result.doi}" if result.doi else ""
    return f"{result.citation}{link}" + (" (derived)" if result.kind == "derived" else "")


def _checkpoint(result: MeasuredResult) -> str:
    return result.checkpoint + (f" @ {result.revision[:12]}" if result.revision else "")


def _interval(result: MeasuredResult, key: str) -> str:
    value, low, high = result.values[key]
    if value is None:
        return MISSING
    share = key.startswith("within_")

    def shown(number: float) -> str:
        return f"{100 * number:.1f} %" if share else f"{number:.2f}"

    return shown(value) if low is None or high is None else f"{shown(value)} [{shown(low)}, {shown(high)}]"


def build_csv(
    printed: Sequence[PrintedRow], published: Sequence[PublishedResult], measured: Sequence[MeasuredResult]
) -> str:
    """The tables in one CSV, told apart by the column `table`; an unknown number is an empty cell."""
    rows: list[dict[str, object]] = [
        {
            "table": "as printed",
            "system": row.method,
            "mae_months": row.mae,
            "mse_months2": row.mse,
            "mad_months": row.mad,
            "rmse_months": row.rmse,
            "source": "reference project",
        }
        for row in printed
    ]
    corrected = [find(published, system, protocol) for system, protocol in _CORRECTED]
    rows += [_csv_row(result, "corrected") for result in corrected]
    rows += [_csv_row(result, "protocol") for result in published]
    for result in measured:
        value, low, high = result.values["mae_months"]
        protocol = PROTOCOLS[result.protocol]
        rows.append(
            {
                "table": "protocol",
                "system": result.system,
                "year": result.date[:4],
                "protocol": result.protocol,
                "data_set": protocol.data_set,
                "n": result.n,
                "readers": protocol.readers,
                "mae_months": value,
                "mae_ci95_low_months": low,
                "mae_ci95_high_months": high,
                "rmse_months": result.values["rmse_months"][0],
                "mse_months2": result.values["mse_months2"][0],
                "status": result.status,
                "source": _checkpoint(result),
            }
        )
    return to_csv(_CSV_COLUMNS, rows)


def _csv_row(result: PublishedResult, table: str) -> dict[str, object]:
    return {
        "table": table,
        "system": result.system,
        "year": result.year,
        "protocol": result.protocol,
        "data_set": PROTOCOLS[result.protocol].data_set,
        "n": result.n,
        "readers": result.raters,
        "mae_months": result.mae_months,
        "mae_low_months": result.mae_low_months,
        "mae_high_months": result.mae_high_months,
        "rmse_months": result.rmse_months,
        "mse_months2": result.mse_months,
        "mad_months": result.mad_months,
        "mad_meaning": result.mad_meaning,
        "status": result.status,
        "source": _source(result),
        "note": result.note,
    }


def to_markdown(sections: Sequence[Section]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", r"\|")

    lines: list[str] = []
    for index, section in enumerate(sections):
        lines += [f"{'#' if index == 0 else '##'} {section.heading}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        if section.table is not None:
            table = section.table
            rules = ("--:" if column in table.numeric else "---" for column in table.columns)
            lines += [f"| {' | '.join(table.columns)} |", f"| {' | '.join(rules)} |"]
            lines += [f"| {' | '.join(cell(text) for text in row)} |" for row in table.rows]
            lines.append("")
        if section.notes:
            lines += [f"{number}. {note}" for number, note in enumerate(section.notes, start=1)]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 78rem; margin: 0 auto;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid #767676; padding-top: .8rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 3px solid #0b57d0; }
table { border-collapse: collapse; font-size: .875rem; }
.wide { min-width: 64rem; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { border-bottom: 1px solid #bbb; padding: .35rem .6rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; min-width: 3.5rem; }
.unconfirmed { font-weight: 600; font-style: italic; }
a { color: #0b4aa2; overflow-wrap: anywhere; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 8pt; min-width: 0; }
  .wide { width: 100%; }
  .scroll { overflow: visible; }
  h2, caption { break-after: avoid; }
  tr { break-inside: avoid; }
  thead { display: table-header-group; }
  a { color: inherit; }
}
"""


def to_html(sections: Sequence[Section]) -> str:
    """One page without any external resource; links to sources are only followed when a reader clicks them."""

    def text(raw: str) -> str:
        return re.sub(r"https://doi\.org/[^\s<]+", r'<a href="\g<0>">\g<0></a>', html.escape(raw))

    title = text(sections[0].heading)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        "<body><main>",
    ]
    for index, section in enumerate(sections):
        level = "h1" if index == 0 else "h2"
        parts.append(f"<section><{level}>{text(section.heading)}</{level}>")
        parts += [f"<p>{text(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.table is not None:
            parts += _html_table(section.table, f"table-{index}", text)
        if section.notes:
            parts.append("<ol>" + "".join(f"<li>{text(note)}</li>" for note in section.notes) + "</ol>")
        parts.append("</section>")
    parts.append("</main></body></html>")
    return "\n".join(parts) + "\n"


def _html_table(table: Table, name: str, text: Callable[[str], str]) -> list[str]:
    # The first column that names a system heads its row for a screen reader.
    heads_row = next(column for column in table.columns if column in ("Method", "System"))

    def cell(column: str, raw: str) -> str:
        classes = ["number"] if column in table.numeric else []
        if column == "Status" and raw in STATUSES and raw != "confirmed":
            classes.append("unconfirmed")
        attributes = f' class="{" ".join(classes)}"' if classes else ""
        if column == heads_row:
            return f'<th scope="row"{attributes}>{text(raw)}</th>'
        return f"<td{attributes}>{text(raw)}</td>"

    number = ' class="number"'
    heads = "".join(
        f'<th scope="col"{number if column in table.numeric else ""}>{text(column)}</th>' for column in table.columns
    )
    wide = ' class="wide"' if len(table.columns) > 6 else ""
    # A scrolling region must be reachable by keyboard and have a name.
    return [
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">',
        f'<table{wide}><caption id="{name}">{text(table.caption)}</caption>',
        f"<thead><tr>{heads}</tr></thead><tbody>",
        *(
            f"<tr>{''.join(cell(column, raw) for column, raw in zip(table.columns, row, strict=True))}</tr>"
            for row in table.rows
        ),
        "</tbody></table></div>",
    ]
