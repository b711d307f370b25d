"""The published results: load them, check them, look one up. A row that contradicts itself is refused by name."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from boneage_hf.errors import InputError

from .protocol import did_you_mean, get_protocol

PUBLISHED = Path(__file__).parent / "published"

#: What each status of a published row promises.
STATUSES: dict[str, str] = {
    "confirmed": "the number was found in the named source",
    "secondary": "the number was found in another publication that quotes it",
    "as-reported": "the authors' own statement, which nobody has checked",
    "computed": "worked out from the reference ages alone",
}

KINDS = ("cited", "derived")

COLUMNS = (
    "system",
    "year",
    "protocol",
    "n",
    "raters",
    "uses_sex",
    "model",
    "mae_months",
    "mae_low_months",
    "mae_high_months",
    "rmse_months",
    "mse_months",
    "mad_months",
    "mad_meaning",
    "ci",
    "citation",
    "doi",
    "status",
    "kind",
    "note",
)


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One row of `published/results.csv`; numbers are decimals that keep the digits of their source, None is unknown.

    Attributes:
        mae_low_months, mae_high_months: a range of MAEs, where the source gives one instead of, or around, the MAE.
        mse_months: mean squared error, in months squared.
        mad_months, mad_meaning: what the source calls MAD, and which measure that is.
        kind: "cited" if the source prints the number in months, "derived" if it was converted or computed from it.
    """

    system: str
    year: int | None
    protocol: str
    n: int | None
    raters: int | None
    uses_sex: str
    model: str
    mae_months: Decimal | None
    mae_low_months: Decimal | None
    mae_high_months: Decimal | None
    rmse_months: Decimal | None
    mse_months: Decimal | None
    mad_months: Decimal | None
    mad_meaning: str
    ci: str
    citation: str
    doi: str
    status: str
    kind: str
    note: str


@dataclass(frozen=True)
class PrintedRow:
    """One row of the reference project's comparison table, as the text it prints; "" where it prints no number."""

    method: str
    mae: str
    mse: str
    mad: str
    rmse: str


def load_published(path: str | os.PathLike[str] | None = None) -> tuple[PublishedResult, ...]:
    """Read and check the published results.

    Raises:
        InputError: if the file cannot be read or a row is wrong; the message names the row and what to correct.
    """
    path = Path(path) if path is not None else PUBLISHED / "results.csv"
    results: list[PublishedResult] = []
    first_line: dict[tuple[str, str], int] = {}
    for line, row in read_table(path, COLUMNS):
        where = f"{path.name} line {line} ({row['system'] or 'no system'}, {row['protocol'] or 'no protocol'})"
        result = _parse(row, where)
        _check(result, where)
        key = (result.system, result.protocol)
        if key in first_line:
            raise InputError(f"{where}: repeats line {first_line[key]}; keep one row per system and protocol.")
        first_line[key] = line
        results.append(result)
    return tuple(results)


def load_reference_table(path: str | os.PathLike[str] | None = None) -> tuple[PrintedRow, ...]:
    """Read the reference project's comparison table as it was printed, errors included."""
    path = Path(path) if path is not None else PUBLISHED / "reference_table.csv"
    columns = ("method", "MAE", "MSE", "MAD", "RMSE")
    return tuple(PrintedRow(*(row[column] for column in columns)) for _, row in read_table(path, columns))


def find(results: Sequence[PublishedResult], system: str, protocol: str) -> PublishedResult:
    """Return the row of a system under a protocol; an unknown name raises `InputError` with the nearest known one."""
    get_protocol(protocol)
    systems = {result.system for result in results}
    if system not in systems:
        raise InputError(f'there is no published result of "{system}"; {did_you_mean(system, sorted(systems))}')
    for result in results:
        if (result.system, result.protocol) == (system, protocol):
            return result
    known = sorted(result.protocol for result in results if result.system == system)
    raise InputError(f'"{system}" has no result under "{protocol}"; it has {", ".join(known)}.')


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a CSV file that has exactly these columns."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path.name} cannot be read; it must be a CSV file in UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if header != list(columns):
        wrong = sorted(set(header) ^ set(columns))
        what = f"missing or unknown: {', '.join(wrong)}" if wrong else "they are in another order"
        raise InputError(f"{path.name} has other columns than it must have ({what}); they are {','.join(columns)}.")
    for cells in reader:
        if len(cells) != len(columns):
            raise InputError(
                f"{path.name} line {reader.line_num} ({cells[0] if cells else 'empty'}): has {len(cells)} cells, not "
                f"{len(columns)}; quote texts that hold a comma."
            )
        yield reader.line_num, dict(zip(columns, cells, strict=True))


def _parse(row: Mapping[str, str], where: str) -> PublishedResult:
    def whole(column: str) -> int | None:
        if not row[column]:
            return None
        if not row[column].isdecimal() or int(row[column]) < 1:
            raise InputError(f'{where}: {column} is "{row[column]}"; give a whole number, or nothing if unknown.')
        return int(row[column])

    def number(column: str) -> Decimal | None:
        if not row[column]:
            return None
        try:
            value = Decimal(row[column])
        except InvalidOperation:
            value = Decimal("NaN")
        if not value.is_finite() or value < 0:
            raise InputError(f'{where}: {column} is "{row[column]}"; give a number, or nothing if unknown.')
        return value

    return PublishedResult(
        system=row["system"],
        year=whole("year"),
        protocol=row["protocol"],
        n=whole("n"),
        raters=whole("raters"),
        uses_sex=row["uses_sex"],
        model=row["model"],
        mae_months=number("mae_months"),
        mae_low_months=number("mae_low_months"),
        mae_high_months=number("mae_high_months"),
        rmse_months=number("rmse_months"),
        mse_months=number("mse_months"),
        mad_months=number("mad_months"),
        mad_meaning=row["mad_meaning"],
        ci=row["ci"],
        citation=row["citation"],
        doi=row["doi"],
        status=row["status"],
        kind=row["kind"],
        note=row["note"],
    )


def _check(result: PublishedResult, where: str) -> None:
    if not result.system:
        raise InputError(f"{where}: the system has no name; give it one.")
    try:
        protocol = get_protocol(result.protocol)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for name, own, shared in (("n", result.n, protocol.n), ("raters", result.raters, protocol.readers)):
        if None not in (own, shared) and own != shared:
            raise InputError(f"{where}: {name} is {own}, its protocol says {shared}; use another protocol.")
    for name, value, allowed in (
        ("status", result.status, tuple(STATUSES)),
        ("kind", result.kind, KINDS),
        ("uses_sex", result.uses_sex, ("yes", "no", "unknown", "separate models", "")),
    ):
        if value not in allowed:
            raise InputError(f'{where}: {name} is "{value}"; it must be one of {", ".join(filter(None, allowed))}.')
    if not result.citation:
        raise InputError(f"{where}: has no citation; every number needs a source.")
    if result.doi and not result.doi.startswith("10."):
        raise InputError(f'{where}: doi is "{result.doi}"; it must begin with 10., without https://doi.org/.')

    low, high, mae = result.mae_low_months, result.mae_high_months, result.mae_months
    rmse, mse, mad = result.rmse_months, result.mse_months, result.mad_months
    if all(value is None for value in (mae, low, rmse, mse, mad)):
        raise InputError(f"{where}: has no number; take the row out or fill one in.")
    if (low is None) != (high is None):
        raise InputError(f"{where}: the range of the MAE has one end only; give both or none.")
    if low is not None and high is not None and not low <= (low if mae is None else mae) <= high:
        raise InputError(f"{where}: the range of the MAE, {low} to {high}, does not fit; check it in the source.")
    # sqrt(mean e^2) >= mean |e| for every set of errors.
    if mae is not None and rmse is not None and mae > rmse:
        raise InputError(f"{where}: the MAE {mae} is above the RMSE {rmse}, which is impossible; check both.")
    if mae is not None and mse is not None and _ends(mae)[0] ** 2 > _ends(mse)[1]:
        raise InputError(
            f"{where}: the MAE {mae} is above the root of the MSE {mse}, which is impossible; check both."
        )
    if rmse is not None and mse is not None and not squares_to(rmse, mse):
        raise InputError(f"{where}: the MSE {mse} is not the square of the RMSE {rmse}; check both in the source.")
    if (mad is None) != (not result.mad_meaning):
        raise InputError(f"{where}: MAD means two things; give mad_months and mad_meaning together or neither.")
    if mad is not None and "(= MAE)" in result.mad_meaning and mad != mae:
        raise InputError(f"{where}: the MAD {mad} is said to be the MAE, which is {mae}; make them equal.")


def squares_to(rmse: Decimal, mse: Decimal) -> bool:
    """Whether some unrounded RMSE prints as `rmse` and its square as `mse`."""
    (rmse_low, rmse_high), (mse_low, mse_high) = _ends(rmse), _ends(mse)
    return rmse_low**2 <= mse_high and mse_low <= rmse_high**2


def _ends(printed: Decimal) -> tuple[Decimal, Decimal]:
    """The lowest and highest number that rounds to what is printed."""
    half = Decimal(1).scaleb(int(printed.as_tuple().exponent)) / 2
    return max(printed - half, Decimal(0)), printed + half
