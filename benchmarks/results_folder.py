"""Result folders: read one, check that its three files belong together, recompute it from the user's labels."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from boneage_hf.errors import InputError
from boneage_hf.interval_boneage import interval_months
from boneage_hf.metrics import MEASURES, by_group, coverage_metrics, error_metrics, error_over_age, match_by_id

from .measured import RESULTS, MeasuredResult, result_of
from .protocol import PROTOCOLS, Protocol, is_sha256
from .run import load_test_set, over_age

FILES = ("manifest.json", "metrics.json", "predictions.csv")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A checked result folder.

    Attributes:
        folder: its name.
        system: as reports show it.
        protocol: under which it was measured.
        leakage: "none", "unknown" or what the system had seen of the test.
        predictions: `id` (text), `predicted_months`.
        metrics, manifest: the two JSON files.
    """

    folder: str
    system: str
    protocol: Protocol
    leakage: str
    predictions: pd.DataFrame
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any]


def load_result(folder: str | Path) -> Result:
    """Read a result folder that `boneage-benchmark run` wrote.

    Raises:
        InputError: a file is missing, damaged or not of this run; the message names it.
    """
    folder = Path(folder)
    where = f"result folder {folder.name}"
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{where} has no {name}; give a folder that `boneage-benchmark run` finished.")
    metrics, manifest = (_json(folder / name, where) for name in ("metrics.json", "manifest.json"))
    predictions = read_predictions(folder / "predictions.csv", where)
    digest = hashlib.sha256((folder / "predictions.csv").read_bytes()).hexdigest()
    for name, content in (("metrics.json", metrics), ("manifest.json", manifest)):
        if content.get("predictions_sha256") != digest:
            raise InputError(f"{where}: predictions.csv is not the one that {name} is about; run again.")
    fields = manifest.get("protocol")
    system = manifest.get("system")
    if not isinstance(fields, dict) or not isinstance(system, dict):
        raise InputError(f"{where}: manifest.json does not say its protocol or its system; run again.")
    try:
        protocol = Protocol.from_dict(fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if protocol.name in PROTOCOLS and protocol != PROTOCOLS[protocol.name]:
        raise InputError(f"{where}: its protocol {protocol.name} is another one than that of this version; run again.")
    if metrics.get("protocol") != protocol.name or metrics.get("n") != len(predictions):
        raise InputError(
            f"{where}: metrics.json and manifest.json or predictions.csv are of different runs; run again."
        )
    for content in (metrics, manifest):
        given = content.get("ground_truth_fingerprint")
        if given != protocol.ground_truth_fingerprint or not is_sha256(str(given)):
            raise InputError(f"{where}: its labels are not those of {protocol.name}; run again on the right version.")
    measures = metrics.get("metrics")
    if not isinstance(measures, dict) or any(key not in measures for key in MEASURES):
        raise InputError(f"{where}: metrics.json lacks measures; run again.")
    if protocol.name in PROTOCOLS:
        try:
            result_of(metrics, system=str(system.get("name") or ""))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return Result(
        folder=folder.name,
        system=str(system.get("name") or folder.name),
        protocol=protocol,
        leakage=str(system.get("leakage") or "unknown"),
        predictions=predictions,
        metrics=metrics,
        manifest=manifest,
    )


def read_predictions(path: Path, where: str) -> pd.DataFrame:
    """`id` and `predicted_months` of a file of predictions; anything else in it is refused."""
    try:
        table = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
    except (OSError, ValueError):
        raise InputError(f"{where}: {path.name} cannot be read as a table; run again.") from None
    if list(table.columns) != ["id", "predicted_months"]:
        raise InputError(f"{where}: {path.name} must have the columns id,predicted_months and nothing else.")
    if table.empty or table["id"].duplicated().any() or (table["id"] == "").any():
        raise InputError(f"{where}: {path.name} is empty, lacks an id or repeats one; keep one row per image.")
    months = pd.to_numeric(table["predicted_months"], errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(months).all():
        missing = np.count_nonzero(~np.isfinite(months))
        raise InputError(f"{where}: {missing} predictions are missing, NaN or infinite; predict those images again.")
    return table.assign(predicted_months=months)


def matched_errors(result: Result, references: pd.DataFrame) -> np.ndarray:
    """(n,) predicted - reference in months, in the order of `references`; refuses what does not pair one to one."""
    try:
        table = match_by_id(result.predictions, references)
    except InputError as error:
        raise InputError(f"result folder {result.folder}: {error}") from None
    return (table["predicted_months"] - table["reference_months"]).to_numpy(dtype=np.float64)


def recompute(result: Result, data: str | Path) -> None:
    """Measure the predictions again against the user's labels: errors, groups, slopes, limits of agreement, the claim
    about ages, and the coverage of intervals where the manifest says how they follow from the predictions.

    Raises:
        InputError: a figure differs from metrics.json by more than 1e-6; the message names it.
    """
    test = load_test_set(result.protocol, data)
    table = match_by_id(result.predictions, test.references)
    predicted, reference = table["predicted_months"].to_numpy(), table["reference_months"].to_numpy()
    groups = by_group(predicted, reference, sex=table["sex"].tolist())
    again = {
        "metrics": error_metrics(predicted, reference),
        "groups": groups.to_dict(orient="records"),
        "error_over_age": error_over_age(predicted, reference),
        **over_age(table),
    }
    found = first_difference(result.metrics, again)
    interval = result.manifest["system"].get("interval")
    if found is None and interval:
        low, high = interval_months(predicted, interval)
        covered = coverage_metrics(table.assign(interval_low_months=low, interval_high_months=high))
        # Those of the run were made before the predictions were rounded to four decimals.
        found = first_difference(result.metrics, {"interval": covered}, tolerance=ROUNDED_TWICE)
    if found is not None:
        name, old, new = found
        raise InputError(
            f"result folder {result.folder}: {name} is {old} in metrics.json and {new} from its predictions; "
            "run again."
        )


def first_difference(old: Any, new: Any, *, name: str = "", tolerance: float = 1e-6) -> tuple[str, Any, Any] | None:
    """Name and both values of the first figure of `new` that `old` does not hold; None where it holds all.

    Args:
        old, new: numbers, texts and None in mappings and sequences; NaN in `new` stands for None, as JSON has none.
    """
    if isinstance(new, Mapping):
        parts = [(str(key), old.get(key) if isinstance(old, Mapping) else None, value) for key, value in new.items()]
    elif isinstance(new, (list, tuple)):
        if not isinstance(old, (list, tuple)) or len(old) != len(new):
            return name, old, new
        parts = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        if isinstance(new, float) and math.isnan(new):
            new = None
        if isinstance(old, (int, float)) and isinstance(new, (int, float)):
            same = math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance)
        else:
            same = bool(old == new)
        return None if same else (name, old, new)
    found = (first_difference(one, other, name=part, tolerance=tolerance) for part, one, other in parts)
    return next((difference for difference in found if difference is not None), None)


def result_folders(results: Path = RESULTS) -> list[Path]:
    """The committed result folders of every kind, see `findings.kind_of`."""
    return sorted({path.parent for name in ("predictions.csv", "manifest.json") for path in results.glob(f"*/{name}")})


#: How far a figure of a measured row may lie from that of its run: the run measures predictions as they are kept, with
#: four decimals, and rows of earlier versions keep their figures with four.
ROUNDED_TWICE = 1.1e-4


def check_rows(rows: Sequence[MeasuredResult], results: Sequence[Result]) -> None:
    """Every measured row must have the folder of its predictions, with the same numbers.

    Raises:
        InputError: naming the row.
    """
    by_digest = {result.metrics["predictions_sha256"]: result for result in results}
    for row in rows:
        where = f"measured row {row.system} under {row.protocol}"
        result = by_digest.get(row.predictions_sha256)
        if result is None:
            raise InputError(f"{where}: there is no result folder with its predictions; commit the folder of its run.")
        again = result_of(result.metrics, system=row.system, checkpoint=row.checkpoint)
        for key, numbers in row.values.items():
            for old, new in zip(numbers, again.values[key], strict=True):
                same = old is new if old is None or new is None else abs(old - new) <= ROUNDED_TWICE
                if not same:
                    raise InputError(f"{where}: {key} is not that of {result.folder}/metrics.json; add it again.")


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{where}: {path.name} cannot be read as JSON; run again.")
    return content
