"""Predictions that somebody else made, as a CSV file with any column names, in months or years."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from boneage_hf.errors import InputError
from boneage_hf.splits import fingerprint

from ..protocol import did_you_mean
from .base import System, SystemOptions

# Nobody under treatment for growth is older than 25 years, and no cohort has nine of ten bone ages below 25 months. A
# share is judged and not the largest value: one odd value in a file must not hide the unit of all others.
_MOST_YEARS = 25
_NEARLY_ALL = 0.9


class PredictionsCsvSystem(System):
    """Looks every image up in a table.

    Args:
        table: `id` (text) and `predicted_months`; optionally `reference_months`, the truth that came with it.
    """

    preprocessing = "unknown: predictions were made elsewhere"
    reads_images = False
    resumable = False

    def __init__(
        self, table: pd.DataFrame, *, name: str, revision: str, trained_on: tuple[str, ...] | None = None
    ) -> None:
        self.table = table.set_index("id")
        self.name, self.revision, self.trained_on = name, revision, trained_on

    @classmethod
    def build(cls, argument: str, options: SystemOptions) -> "PredictionsCsvSystem":
        """`argument`: the file. Ids are compared as text.

        Raises:
            InputError: a column is missing, an id is missing or repeated, a number is missing, not finite or
                negative, or the numbers do not look like the declared unit.
        """
        if not argument:
            raise InputError("predictions-csv needs a file; write predictions-csv:FILE.csv.")
        try:
            content = Path(argument).read_bytes()
            table = pd.read_csv(Path(argument), dtype=str, keep_default_na=False)
        except (OSError, ValueError):  # pandas' ParserError and EmptyDataError are ValueErrors
            raise InputError("the file of predictions cannot be read; give a CSV file with a header.") from None
        if options.unit not in ("months", "years"):
            raise InputError(f'the unit is "{options.unit}"; it must be "months" or "years".')
        wanted = {"id": options.id_column, "predicted_months": options.prediction_column}
        if options.truth_column is not None:
            wanted["reference_months"] = options.truth_column
        for column in wanted.values():
            if column not in table.columns:
                hint = did_you_mean(column, map(str, table.columns))
                raise InputError(f'the file of predictions has no column "{column}"; {hint}')
        read = pd.DataFrame({"id": table[wanted["id"]].str.strip()})
        if (read["id"] == "").any():
            raise InputError(f"{(read['id'] == '').sum()} predictions have no id; give every row the id of its image.")
        repeated = read["id"][read["id"].duplicated()].unique()
        if len(repeated):
            raise InputError(f"the file of predictions repeats the id {_some(repeated)}; keep one row per image.")
        for name in [name for name in wanted if name != "id"]:
            read[name] = _months(table[wanted[name]], wanted[name], options.unit)
        digest = hashlib.sha256(content + repr((sorted(wanted.items()), options.unit)).encode()).hexdigest()
        return cls(read, name=Path(argument).stem, revision=digest[:12], trained_on=options.trained_on)

    def predict(self, dataset: Any) -> pd.DataFrame:
        """Raises `InputError` if ids do not match one to one, or the truth beside them is another than the data's."""
        ids = [str(row_id) for row_id in dataset["id"]]
        missing, extra = [i for i in ids if i not in self.table.index], sorted(set(self.table.index) - set(ids))
        if missing:
            raise InputError(
                f"{len(missing)} of {len(ids)} images have no prediction ({_some(missing)}); predict them too, or a "
                "score over the rest would pass for one over all."
            )
        if extra:
            raise InputError(
                f"{len(extra)} predictions are of no image of this test ({_some(extra)}); take them out, or name the "
                "protocol that they belong to."
            )
        rows = self.table.loc[ids]
        if "reference_months" in rows:
            given = rows["reference_months"].to_numpy()
            own = np.asarray(dataset["bone_age_months"], dtype=np.float64)
            if fingerprint(ids, given) != fingerprint(ids, own):
                differ = np.count_nonzero(np.abs(given - own) > 0.005)
                raise InputError(
                    f"the truth beside the predictions differs from the data set's in {differ} of {len(ids)} images; "
                    "another version of the ground truth was used: name its protocol and prepare its labels."
                )
        return pd.DataFrame({"id": ids, "predicted_months": rows["predicted_months"].to_numpy()})


def _months(column: pd.Series, name: str, unit: str) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        raise InputError(
            f'{np.count_nonzero(wrong)} of {len(values)} values in "{name}" are missing, no number, or negative; give '
            "one age per image."
        )
    if not len(values):
        raise InputError("the file of predictions has no row; give one per image.")
    if unit == "months" and (values <= _MOST_YEARS).mean() >= _NEARLY_ALL:
        raise InputError(
            f'nearly all values in "{name}" are at most {_MOST_YEARS}, which are years and not months; declare --unit '
            "years."
        )
    if unit == "years" and values.max() > _MOST_YEARS:
        raise InputError(
            f'"{name}" goes up to {values.max():.0f}, which are months and not years; declare --unit months.'
        )
    return values * 12 if unit == "years" else values


def _some(values: Any) -> str:
    shown = ", ".join(str(value) for value in values[:3])
    return shown if len(values) <= 3 else f"{shown}, ..."
