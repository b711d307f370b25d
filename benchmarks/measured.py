"""Rows that this project measured: taken over from the `metrics.json` of `boneage evaluate`, never typed in."""

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from boneage_hf.errors import InputError
from boneage_hf.files import write_text

from .protocol import get_protocol, is_sha256
from .registry import read_table

RESULTS = Path(__file__).parent / "results"
MEASURED_CSV = RESULTS / "measured.csv"

#: Measure in `metrics.json` -> name of its interval's ends in the table, before `_low` and `_high`.
MEASURES: dict[str, str] = {
    "mae_months": "mae",
    "rmse_months": "rmse",
    "mse_months2": "mse",
    "median_absolute_error_months": "median_absolute_error",
    "mean_absolute_deviation_about_bias_months": "mean_absolute_deviation_about_bias",
    "bias_months": "bias",
    "r2": "r2",
    "within_6_months": "within_6_months",
    "within_12_months": "within_12_months",
    "within_24_months": "within_24_months",
}

COLUMNS: tuple[str, ...] = (
    "system",
    "checkpoint",
    "revision",
    "protocol",
    "split",
    "n",
    *(column for key, stem in MEASURES.items() for column in (key, f"{stem}_low", f"{stem}_high")),
    "flip_average",
    "predictions_sha256",
    "data_fingerprint",
    "ground_truth_fingerprint",
    "package_version",
    "commit",
    "versions",
    "date",
    "status",
)

# Parts of a data set that a checkpoint was fitted to, chosen on, or calibrated on: no test of it.
_NOT_FOR_TESTING = ("train", "selection", "calibration")


@dataclass(frozen=True, kw_only=True)
class MeasuredResult:
    """One measured row.

    Attributes:
        values: key of `MEASURES` -> (value, low, high); None where undefined; months, shares from 0 to 1.
        data_fingerprint: as `metrics.json` has it.
        ground_truth_fingerprint: of the labels that the predictions were held against (`Protocol` says how), or "".
        versions: of the packages that ran, as sorted JSON.
    """

    system: str
    checkpoint: str
    revision: str
    protocol: str
    split: str
    n: int
    values: Mapping[str, tuple[float | None, float | None, float | None]]
    flip_average: bool
    predictions_sha256: str
    data_fingerprint: str
    ground_truth_fingerprint: str
    package_version: str
    commit: str
    versions: str
    date: str
    status: str = "measured"

    @property
    def same_ground_truth(self) -> bool:
        """Whether the labels are shown to be those of the protocol."""
        expected = get_protocol(self.protocol).ground_truth_fingerprint
        return expected is not None and self.ground_truth_fingerprint == expected


def load_measured(path: str | os.PathLike[str] | None = None) -> tuple[MeasuredResult, ...]:
    """Read and check the measured rows; a file that does not exist holds none.

    Raises:
        InputError: if a row is wrong; the message names the row.
    """
    path = Path(path) if path is not None else MEASURED_CSV
    if not path.exists():
        return ()
    results: list[MeasuredResult] = []
    for line, row in read_table(path, COLUMNS):
        where = f"{path.name} line {line} ({row['system'] or 'no system'}, {row['protocol'] or 'no protocol'})"
        result = _from_row(row, where)
        _check(result, where)
        if any(_key(result) == _key(earlier) for earlier in results):
            raise InputError(f"{where}: is there twice; keep one row per system and protocol.")
        results.append(result)
    return tuple(results)


def add_measured_row(
    metrics: str | os.PathLike[str] | Mapping[str, Any],
    *,
    system: str | None = None,
    checkpoint: str | None = None,
    protocol: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> tuple[MeasuredResult, bool]:
    """Append the outcome of one evaluation to `results/measured.csv`, or replace the row of that system and protocol.

    Args:
        metrics: the `metrics.json` that `boneage evaluate` writes, or its content.
        system: the name under which it is shown; None: that of the row of this checkpoint or system, which is replaced
            and whose public name of the checkpoint it keeps too.
        checkpoint: public name of the checkpoint, where `metrics.json` holds another name, such as a directory.
        protocol: name of the protocol, where `metrics.json` holds one that is not known here.
        path: the table; the one of this package unless told.

    Returns:
        The row, and whether it replaced one.

    Raises:
        InputError: if the file cannot be read, lacks a field, contradicts itself or its protocol, or no row or several
            could give the name. The table is then as it was.
    """
    path = Path(path) if path is not None else MEASURED_CSV
    content = _read_json(metrics)
    earlier = load_measured(path)
    unnamed = result_of(content, system=system or "unnamed", checkpoint=checkpoint, protocol=protocol)
    result = unnamed if system else _named_as_before(unnamed, earlier, checkpoint=checkpoint)
    kept = [row for row in earlier if _key(row) != _key(result)]
    rows = sorted([*kept, result], key=_key)
    write_text(path, to_csv(COLUMNS, [_to_row(row) for row in rows]))
    return result, len(kept) < len(earlier)


def _named_as_before(
    result: MeasuredResult, earlier: Sequence[MeasuredResult], *, checkpoint: str | None
) -> MeasuredResult:
    # A system without a checkpoint, such as the constant, is known by its own name.
    same = [
        row for row in earlier if row.protocol == result.protocol and result.checkpoint in (row.checkpoint, row.system)
    ]
    if len(same) != 1:
        raise InputError(
            f"the table has {'several rows' if same else 'no row'} of {result.checkpoint} under {result.protocol} to "
            "take the name from; give it with --system."
        )
    return dataclasses.replace(result, system=same[0].system, checkpoint=checkpoint or same[0].checkpoint)


def result_of(
    content: Mapping[str, Any], *, system: str, checkpoint: str | None = None, protocol: str | None = None
) -> MeasuredResult:
    """The row that a `metrics.json` makes, checked; arguments and errors as `add_measured_row`."""
    result = _from_metrics(content, system=system, checkpoint=checkpoint, protocol=protocol)
    _check(result, "metrics.json")
    return result


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _key(result: MeasuredResult) -> tuple[str, str]:
    return result.protocol, result.system


def _read_json(metrics: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(metrics, Mapping):
        return metrics
    try:
        content = json.loads(Path(metrics).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(
            "the metrics file cannot be read as JSON; give the metrics.json that `boneage evaluate` wrote."
        )
    return content


def _from_metrics(
    content: Mapping[str, Any], *, system: str, checkpoint: str | None, protocol: str | None
) -> MeasuredResult:
    def text(field: str, *, optional: bool = False) -> str:
        value = content.get(field)
        if optional and value is None:
            return ""
        if not isinstance(value, str) or not value:
            raise InputError(f"metrics.json has no {field}; write it with this version of `boneage evaluate`.")
        return value

    measures = content.get("metrics")
    if not isinstance(measures, Mapping):
        raise InputError("metrics.json has no metrics; write it with this version of `boneage evaluate`.")
    values: dict[str, tuple[float | None, float | None, float | None]] = {}
    for key in MEASURES:
        interval = measures.get(f"{key}_ci95")
        if key not in measures or not isinstance(interval, Sequence) or len(interval) != 2:
            raise InputError(
                f"metrics.json lacks {key} or {key}_ci95; write it with this version of `boneage evaluate`."
            )
        values[key] = (
            _number(measures[key], f"metrics.json: {key}"),
            _number(interval[0], f"metrics.json: {key}_ci95"),
            _number(interval[1], f"metrics.json: {key}_ci95"),
        )
    n, flip_average = content.get("n"), content.get("flip_average")
    if not isinstance(n, int) or isinstance(n, bool):
        raise InputError("metrics.json has no whole number n; write it with this version of `boneage evaluate`.")
    if measures.get("n", n) != n:
        raise InputError(f"metrics.json says n is {n} and {measures['n']}; evaluate again.")
    if not isinstance(flip_average, bool):
        raise InputError("metrics.json does not say flip_average true or false; evaluate again.")
    versions = content.get("versions") or {}
    if not isinstance(versions, Mapping):
        raise InputError("metrics.json has versions that are no table of package to version; evaluate again.")
    return MeasuredResult(
        system=system,
        checkpoint=checkpoint or text("checkpoint"),
        revision=text("revision", optional=True),
        protocol=protocol or text("protocol"),
        split=text("split"),
        n=n,
        values=values,
        flip_average=flip_average,
        predictions_sha256=text("predictions_sha256"),
        data_fingerprint=text("data_fingerprint"),
        # `boneage evaluate` takes its data fingerprint over ids and reference ages: it is that of the ground truth.
        ground_truth_fingerprint=text("ground_truth_fingerprint", optional=True) or text("data_fingerprint"),
        package_version=text("package_version"),
        commit=text("commit", optional=True),
        versions=json.dumps(dict(versions), sort_keys=True),
        date=text("date"),
    )


def _to_row(result: MeasuredResult) -> dict[str, object]:
    row: dict[str, object] = {
        column: getattr(result, column) for column in COLUMNS if hasattr(result, column) and column != "flip_average"
    }
    row["flip_average"] = "true" if result.flip_average else "false"
    for key, stem in MEASURES.items():
        for column, value in zip((key, f"{stem}_low", f"{stem}_high"), result.values[key], strict=True):
            # Six decimals: a share of four would be rounded twice where it is printed in percent with one.
            row[column] = "" if value is None else f"{value:.6f}"
    return row


def _from_row(row: Mapping[str, str], where: str) -> MeasuredResult:
    if not row["n"].isdecimal():
        raise InputError(f'{where}: n is "{row["n"]}"; it must be a whole number.')
    if row["flip_average"] not in ("true", "false"):
        raise InputError(f'{where}: flip_average is "{row["flip_average"]}"; it must be true or false.')
    values: dict[str, tuple[float | None, float | None, float | None]] = {}
    for key, stem in MEASURES.items():
        columns = (key, f"{stem}_low", f"{stem}_high")
        value, low, high = (_number(row[column] or None, f"{where}: {column}") for column in columns)
        values[key] = (value, low, high)
    return MeasuredResult(
        system=row["system"],
        checkpoint=row["checkpoint"],
        revision=row["revision"],
        protocol=row["protocol"],
        split=row["split"],
        n=int(row["n"]),
        values=values,
        flip_average=row["flip_average"] == "true",
        predictions_sha256=row["predictions_sha256"],
        data_fingerprint=row["data_fingerprint"],
        ground_truth_fingerprint=row["ground_truth_fingerprint"],
        package_version=row["package_version"],
        commit=row["commit"],
        versions=row["versions"],
        date=row["date"],
        status=row["status"],
    )


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f'{where} is "{value}"; it must be a finite number. Evaluate again.')
    return number


def _check(result: MeasuredResult, where: str) -> None:
    try:
        protocol = get_protocol(result.protocol)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not result.system.strip():
        raise InputError(f"{where}: the system has no name; give one, for example with --system.")
    if re.match(r"[/~\\.]|[A-Za-z]:[/\\]", result.checkpoint):
        raise InputError(
            f"{where}: the checkpoint is a directory of one machine; give its public name with --checkpoint."
        )
    if result.status != "measured":
        raise InputError(f'{where}: status is "{result.status}"; every row here is "measured".')
    if result.split in _NOT_FOR_TESTING:
        raise InputError(f'{where}: the split "{result.split}" was used to make the checkpoint; evaluate on "test".')
    if protocol.n is not None and result.n != protocol.n:
        raise InputError(f"{where}: n is {result.n}, {protocol.name} has {protocol.n} images; evaluate all of them.")
    if not is_sha256(result.predictions_sha256):
        raise InputError(f"{where}: predictions_sha256 is no sha256; evaluate again.")
    given, expected = result.ground_truth_fingerprint, protocol.ground_truth_fingerprint
    if given and expected and given != expected:
        raise InputError(
            f"{where}: the labels have the fingerprint {given[:12]}..., those of {protocol.name} {expected[:12]}...; "
            "name the protocol of the ground truth that was used."
        )
    try:
        datetime.fromisoformat(result.date)
    except ValueError:
        raise InputError(f'{where}: date is "{result.date}"; write it as 2017-11-26.') from None
    try:
        json.loads(result.versions)
    except ValueError:
        raise InputError(f"{where}: versions is not JSON; evaluate again.") from None
    for key, (value, low, high) in result.values.items():
        if value is None and key != "r2":
            raise InputError(f"{where}: {key} is missing; evaluate again.")
        if (low is None) != (high is None) or (low is not None and high is not None and low > high):
            raise InputError(f"{where}: the interval of {key} has no order or one end only; evaluate again.")
    found = {key: numbers[0] or 0.0 for key, numbers in result.values.items()}
    # Tables of earlier versions keep four decimals.
    slack = 1e-4
    shares = [found[f"within_{months}_months"] for months in (6, 12, 24)]
    if not 0 <= shares[0] <= shares[1] <= shares[2] <= 1:
        raise InputError(f"{where}: the shares within 6, 12 and 24 months do not rise from 0 to 1; evaluate again.")
    if not abs(found["bias_months"]) - slack <= found["mae_months"] <= found["rmse_months"] + slack:
        raise InputError(f"{where}: |bias| <= MAE <= RMSE does not hold, which is impossible; evaluate again.")
    if not math.isclose(found["rmse_months"] ** 2, found["mse_months2"], rel_tol=1e-4, abs_tol=1e-2):
        raise InputError(f"{where}: the MSE is not the square of the RMSE; evaluate again.")
