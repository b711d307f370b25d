"""The report: the table as printed, the corrected one, one table per protocol, and all that was measured.

It holds no date of its writing and nothing of the machine that wrote it: the same tables and result folders give the
same bytes, pictures with the same version of matplotlib.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

from boneage_hf.errors import InputError

from .findings import Findings, read_manifest
from .measured import MeasuredResult, load_measured, result_of, to_csv, write_text
from .protocol import PROTOCOLS, Protocol
from .provenance import seal
from .registry import STATUSES, PrintedRow, PublishedResult, find, load_published, load_reference_table
from .rendering import MISSING, Section, Table, to_html, to_markdown
from .results_folder import Result
from .sections import images_unknown, measured_sections, rank_text

__all__ = ["MISSING", "Section", "Table", "build_sections", "to_html", "to_markdown", "write_report"]

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
    "rank",
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


def write_report(
    out: Path,
    *,
    published: Sequence[PublishedResult] | None = None,
    measured: Sequence[MeasuredResult] | None = None,
    findings: Findings | None = None,
) -> list[Path]:
    """Write `report.md`, `report.html`, `report.csv`, the pictures and `manifest.json` into the folder `out`.

    Everything is drawn before anything is written.

    Args:
        findings: what result folders hold; runs without a measured row get one for this report.

    Returns:
        The files.
    """
    published = load_published() if published is None else published
    measured = load_measured() if measured is None else measured
    findings = Findings() if findings is None else findings
    measured = [*measured, *_rows_of(findings, measured)]
    printed = load_reference_table()
    sections = build_sections(printed, published, measured, findings)
    drawn = {picture.name: picture.draw() for section in sections for picture in section.pictures}
    content = {
        "report.md": to_markdown(sections),
        "report.html": to_html(sections, drawn),
        "report.csv": build_csv(printed, published, measured, findings),
        **{f"{name}.svg": svg for name, svg in drawn.items()},
    }
    manifest = {
        "task": "report",
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in content.items()},
        **seal(),
    }
    content["manifest.json"] = json.dumps(manifest, indent=2) + "\n"
    _make_room(out, content)
    for name, text in content.items():
        write_text(out / name, text)
    return [out / name for name in content]


def _make_room(out: Path, names: Iterable[str]) -> None:
    """Remove pictures of an earlier report, as its manifest lists them, that this one does not have.

    Raises:
        InputError: the folder holds something that is no report.
    """
    if out.exists() and not out.is_dir():
        raise InputError("--out is a file; name a folder.")
    earlier = set(out.iterdir()) if out.is_dir() else set()
    strangers = {path.name for path in earlier if path.suffix not in (".md", ".html", ".csv", ".svg", ".json")}
    if strangers or (earlier and not (out / "report.md").is_file()):
        raise InputError("--out holds files that are no report; name another folder.")
    listed: set[str] = set()
    if (out / "manifest.json").is_file():
        manifest = read_manifest(out)
        if manifest.get("task") != "report":
            raise InputError("--out holds results of another command; name another folder.")
        listed = set(manifest.get("files") or ())
    for path in earlier:
        if path.suffix == ".svg" and path.name in listed - set(names):
            path.unlink()


def _rows_of(findings: Findings, measured: Sequence[MeasuredResult]) -> list[MeasuredResult]:
    known = {row.predictions_sha256 for row in measured}
    return [
        result_of(run.metrics, system=run.system)
        for run in findings.runs
        if run.protocol.name in PROTOCOLS and run.metrics["predictions_sha256"] not in known
    ]


def build_sections(
    printed: Sequence[PrintedRow],
    published: Sequence[PublishedResult],
    measured: Sequence[MeasuredResult],
    findings: Findings | None = None,
) -> list[Section]:
    """Everything the report says, before it is set as Markdown or HTML; pictures are drawn only when asked to."""
    findings = Findings() if findings is None else findings
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
        _measured_section(measured, findings),
        *measured_sections(findings, measured, published),
        *(
            _protocol_section(protocol, published, measured, findings)
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
        "There is no common protocol. The three printed rows are on at least four test sets with different readers, "
        "so their order is no ranking.",
    )
    return Section("The same table, corrected", (), table, notes)


def _measured_section(measured: Sequence[MeasuredResult], findings: Findings) -> Section:
    leakages = {run.metrics["predictions_sha256"]: run.leakage for run in findings.runs}
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
        "Leakage",
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
            leakages.get(result.predictions_sha256, MISSING),
            "yes" if result.flip_average else "no",
            _checkpoint(result),
            f"{result.predictions_sha256[:12]}...",
            result.date[:10],
        )
        for result in measured
    )
    return Section(
        heading,
        (
            "In brackets: 95 % percentile bootstrap interval over images. It says nothing about another data set. "
            "Flip average: predictions are means of those for an image and for its mirror image.",
        ),
        Table("Measured rows, in no order of merit", columns, rows, frozenset(columns[2:9])),
    )


def _protocol_section(
    protocol: Protocol,
    published: Sequence[PublishedResult],
    measured: Sequence[MeasuredResult],
    findings: Findings,
) -> Section:
    cited = sorted(
        (result for result in published if result.protocol == protocol.name),
        key=lambda result: (result.year or 0, result.system),
    )
    own = sorted(
        (result for result in measured if result.protocol == protocol.name),
        key=lambda result: (not result.same_ground_truth, result.values["mae_months"][0]),
    )
    several = sum(result.same_ground_truth for result in own) > 1
    knows_sex = {run.metrics["predictions_sha256"]: _knows_sex(run) for run in findings.runs}
    elsewhere = {run.metrics["predictions_sha256"] for run in findings.runs if images_unknown(run)}
    ranks = _ranks(own, findings, protocol)
    columns: tuple[str, ...] = (
        "Rank",
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
            ranks.get(result.predictions_sha256, MISSING),
            result.system,
            result.date[:4],
            _interval(result, "mae_months"),
            _interval(result, "rmse_months"),
            _interval(result, "mse_months2"),
            knows_sex.get(result.predictions_sha256, MISSING),
            result.status,
            _checkpoint(result),
            "; ".join(
                said
                for said, holds in (
                    ("version of the ground truth not shown: no rank", not result.same_ground_truth),
                    ("images seen: unknown", result.predictions_sha256 in elsewhere),
                )
                if holds
            ),
        )
        for result in own
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
    if not several:
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
        paragraphs.append("Cited rows stand in the order of their year; they get no rank.")
    if any(result.kind == "derived" for result in cited):
        paragraphs.append("(derived): converted to months or computed from what the source prints.")
    if several:
        paragraphs.append(
            "Measured rows stand in the order of their MAE. "
            + (
                "A rank is given only where the paired tests tell a system apart from every other measured one."
                if ranks
                else "They get no rank: the paired tests need the labels (--data, or a folder of `compare --out`)."
            )
        )
    return Section(
        f"Protocol {protocol.name}",
        tuple(paragraphs),
        Table(f"Results under {protocol.name}", columns, tuple(rows), frozenset({"Year", "MAE", "RMSE", "MSE"})),
    )


def _ranks(own: Sequence[MeasuredResult], findings: Findings, protocol: Protocol) -> dict[str, str]:
    """Hash of predictions -> rank or why there is none; empty where the comparison is not of just these rows."""
    comparison = findings.comparison(protocol)
    digests = [result.predictions_sha256 for result in own if result.same_ground_truth]
    if comparison is None or comparison.digests != set(digests):
        return {}
    return {digest: rank_text(comparison, digest) for digest in digests}


def _knows_sex(run: Result) -> str:
    return {True: "yes", False: "no"}.get(run.manifest["system"].get("uses_sex"), MISSING)


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
    # A hash is known by its first digits; words, as of the constant, stay whole.
    revision = result.revision if " " in result.revision else result.revision[:12]
    return result.checkpoint + (f" @ {revision}" if revision else "")


def _interval(result: MeasuredResult, key: str) -> str:
    value, low, high = result.values[key]
    if value is None:
        return MISSING
    share = key.startswith("within_")

    def shown(number: float) -> str:
        return f"{100 * number:.1f} %" if share else f"{number:.2f}"

    return shown(value) if low is None or high is None else f"{shown(value)} [{shown(low)}, {shown(high)}]"


def build_csv(
    printed: Sequence[PrintedRow],
    published: Sequence[PublishedResult],
    measured: Sequence[MeasuredResult],
    findings: Findings,
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
        under = [row for row in measured if row.protocol == result.protocol]
        rows.append(
            {
                "table": "protocol",
                "system": result.system,
                "year": result.date[:4],
                "rank": _ranks(under, findings, protocol).get(result.predictions_sha256, ""),
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
