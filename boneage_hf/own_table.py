"""A hospital's own table of radiographs, or a data set of the Hub -> a label table as in `label_tables.py`.

Nothing is guessed: columns, the unit of age and the codes of sex are named by the user.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError
from .hub_access import hub_sentences, is_hub_id, no_bars, split_id
from .sex import SEXES, Sex
from .splits import MAX_BONE_AGE_MONTHS, MIN_BONE_AGE_MONTHS

AgeUnit = Literal["months", "years"]
MONTHS_PER_UNIT: Mapping[str, int] = {"months": 1, "years": 12}

#: The part of a label table that its rows belong to.
PART = "table"

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True)
class TableColumns:
    """How a table is to be read.

    Args:
        age_unit: "months" or "years", of the column `age`.
        file: column of the radiographs: paths (relative ones from the table's folder), or images inside parquet.
        sex: column of the sexes.
        age: column of the bone ages.
        id: column of ids, or None to number the rows from 1. Ids are kept: take none that tell of a person.
        sex_values: code in the table -> "female" or "male"; by default only these two words themselves.
    """

    age_unit: AgeUnit
    file: str = "file"
    sex: str = "sex"
    age: str = "bone_age_months"
    id: str | None = None
    sex_values: Mapping[str, Sex] = field(default_factory=lambda: {sex: sex for sex in SEXES})

    def names(self) -> list[str]:
        return [self.file, self.sex, self.age, *([] if self.id is None else [self.id])]


def parse_sex_values(text: str) -> dict[str, Sex]:
    """`"M=male,F=female"` -> `{"M": "male", "F": "female"}`.

    Raises:
        InputError: it is not of that form, or does not name both sexes.
    """
    values: dict[str, Sex] = {}
    for pair in text.split(","):
        code, equals, sex = (part.strip() for part in pair.partition("="))
        if not equals or not code or sex not in SEXES or code in values:
            raise InputError(f"--sex-values takes codes with their sexes, as in M=male,F=female, not {text!r}.")
        values[code] = sex
    if set(values.values()) != set(SEXES):
        raise InputError(f"--sex-values must say which code is female and which is male, and {text!r} does not.")
    return values


def is_table(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a file of a kind that [`read_own_table`] reads."""
    return Path(source).is_file() and Path(source).suffix.lower() in _TABLE_SUFFIXES


def read_own_table(source: str | os.PathLike[str], columns: TableColumns, *, scratch: Path) -> pd.DataFrame:
    """Read a CSV or parquet file, or a data set of the Hub, into a label table; no image is opened.

    Args:
        source: file, or Hub id of a data set with an image column (all of its splits are taken).
        scratch: folder for images that lie inside the source; must live as long as the table is used.

    Raises:
        InputError: the source cannot be read, lacks a column or is empty.
    """
    if columns.age_unit not in MONTHS_PER_UNIT:
        raise InputError(f"The unit of age is months or years, not {columns.age_unit!r}.")
    name = os.fspath(source)
    rows = _hub_rows(name, columns) if is_hub_id(name) else _file_rows(Path(name), columns)
    folder = Path(name).parent
    found: list[dict[str, object]] = []
    for number, row in enumerate(rows, start=1):
        row_id = str(number) if columns.id is None else _text(row[columns.id])
        path = _image_path(row[columns.file], folder, scratch / f"{number:06d}")
        found.append(_label_row(row_id, row, columns, path))
    if not found:
        raise InputError("The table has no row: give one with a radiograph, a sex and a bone age in each.")
    counts = Counter(row["id"] for row in found)
    for labelled in found:
        if labelled["id"] and counts[labelled["id"]] > 1:
            labelled["problem"] = "duplicate_id"
    return pd.DataFrame(found, columns=["id", "bone_age_months", "sex", "path", "part", "problem"], dtype=object)


def _label_row(row_id: str, row: Mapping[str, Any], columns: TableColumns, path: Path | None) -> dict[str, object]:
    code = _text(row[columns.sex])
    months = _number(row[columns.age]) * MONTHS_PER_UNIT[columns.age_unit]
    problem = None
    if not row_id:
        problem = "no_id"
    elif not code:
        problem = "no_sex"
    elif code not in columns.sex_values:
        problem = "unknown_sex"
    elif math.isnan(months):
        problem = "no_age"
    elif not MIN_BONE_AGE_MONTHS <= months <= MAX_BONE_AGE_MONTHS:
        problem = "age_range"
    elif path is None:
        problem = "no_image"
    return {
        "id": row_id,
        "bone_age_months": months,
        "sex": columns.sex_values.get(code),
        "path": path,
        "part": PART,
        "problem": problem,
    }


def _image_path(cell: Any, folder: Path, spare: Path) -> Path | None:
    """The file of a row; an image that lies inside the table is written to `spare`."""
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell if isinstance(cell, bytes) else None
    if content is not None:
        spare.write_bytes(content)
        return spare
    text = _text(cell.get("path") if isinstance(cell, Mapping) else cell)
    path = folder / text
    return path if text and path.is_file() else None


def _text(cell: Any) -> str:
    missing = cell is None or (isinstance(cell, float) and math.isnan(cell))
    return "" if missing else str(cell).strip()


def _number(cell: Any) -> float:
    try:
        return float(_text(cell))
    except ValueError:
        return math.nan


def _file_rows(path: Path, columns: TableColumns) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        separator = max("\t;,", key=header.count)
        cells = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, sep=separator
        )
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError):
        raise InputError("The table is not a readable CSV file: save it as CSV with UTF-8 text.") from None
    cells.columns = pd.Index([str(name).strip() for name in cells.columns])
    _check_columns(list(cells.columns), columns)
    if separator == ";":  # where lists are separated so, numbers have a decimal comma
        cells[columns.age] = cells[columns.age].str.replace(",", ".", regex=False)
    for row in cells[columns.names()].to_dict(orient="records"):
        yield {str(name): cell for name, cell in row.items()}


def _parquet_rows(path: Path, columns: TableColumns) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=64, columns=columns.names()):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException):
        raise InputError("The table is not a readable parquet file: write it again.") from None


def _hub_rows(source: str, columns: TableColumns) -> Iterator[dict[str, Any]]:
    """Rows of all splits of a data set of the Hub; class labels become their names."""
    import datasets

    repo_id, revision = split_id(source)
    with hub_sentences(repo_id, "dataset", revision=revision), no_bars():
        try:
            loaded = datasets.load_dataset(repo_id, revision=revision)
        except (datasets.exceptions.DatasetsError, datasets.exceptions.DatasetGenerationError, ValueError):
            raise InputError(f"{repo_id} is no data set that `load_dataset` reads: check it on the Hub.") from None
    for split in loaded.values():
        _check_columns(split.column_names, columns)
        if isinstance(split.features[columns.file], datasets.Image):
            split = split.cast_column(columns.file, datasets.Image(decode=False))
        names = getattr(split.features[columns.sex], "names", None)
        for row in split.select_columns(columns.names()):
            if names is not None and row[columns.sex] is not None:
                row[columns.sex] = names[row[columns.sex]]
            yield row


def _check_columns(there: Sequence[str], columns: TableColumns) -> None:
    missing = [name for name in columns.names() if name not in there]
    if missing:
        raise InputError(
            f"The table has no column {', '.join(map(repr, missing))}; it has {', '.join(there)}: name them with "
            "--file-column, --sex-column, --age-column and --id-column."
        )
    if len(set(there)) != len(there):
        raise InputError("The table has two columns of the same name: keep one of them.")
