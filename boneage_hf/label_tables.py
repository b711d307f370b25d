"""Readers: a folder as a data set is published -> one label table, with what is wrong in it said row by row.

A reader returns a ``pandas.DataFrame`` with one row per row of the published table (and one per image that no row
names), and the columns

* ``id`` (str), ``bone_age_months`` (float, NaN if there is none), ``sex`` ("female", "male" or None),
* ``path`` (``pathlib.Path`` of the radiograph, or None),
* ``part`` (str: the part of the data set that the row was published in),
* ``problem`` (one of :data:`PROBLEMS`, or None).

It opens no image. Each reader maps the codes of its own tables; a code it does not know is a problem of that row,
never a default.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from .errors import InputError
from .sex import Sex
from .splits import MAX_BONE_AGE_MONTHS, MIN_BONE_AGE_MONTHS

#: What can be wrong with a row, and how it is said. The first seven concern the label, the others the image.
PROBLEMS: Mapping[str, str] = MappingProxyType(
    {
        "no_id": "no id",
        "duplicate_id": "id occurs more than once in its table",
        "two_splits": "id occurs in more than one part",
        "no_sex": "sex is missing",
        "unknown_sex": "sex code is not one of the table's two codes",
        "no_age": "bone age is missing or not a number",
        "age_range": f"bone age is outside {MIN_BONE_AGE_MONTHS:.0f} to {MAX_BONE_AGE_MONTHS:.0f} months",
        "no_image": "no image file for this id",
        "two_images": "more than one image file for this id",
        "unreadable": "image cannot be read",
        "same_image": "image is identical, pixel by pixel, to that of another id",
        "unlabelled": "image without a row in the table",
    }
)
IMAGE_PROBLEMS = ("no_image", "two_images", "unreadable", "same_image", "unlabelled")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def is_labelled(problem: str | None) -> bool:
    """Whether a row with this problem still has a trustworthy id, sex and age, so that it takes part in the split."""
    return problem is None or (problem in IMAGE_PROBLEMS and problem != "unlabelled")


@dataclass(frozen=True)
class ChallengePart:
    """One part of the RSNA 2017 Pediatric Bone Age Challenge as it was published.

    A table is known by its header (upper and lower case and order do not matter, more columns may follow), images lie
    in any of ``folders`` (nested twice in the Kaggle copy). ``rows``, ``female``, ``male`` and ``fingerprints`` are
    the published counts and the fingerprints of the published labels (:func:`boneage_hf.splits.fingerprint`).
    """

    name: str
    id_column: str
    age_column: str
    sex_column: str
    sex_codes: Mapping[str, Sex]
    folders: tuple[str, ...]
    rows: int
    female: int | None = None
    male: int | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)


_MALE_COLUMN: Mapping[str, Sex] = MappingProxyType(
    {"True": "male", "False": "female", "TRUE": "male", "FALSE": "female"}
)

#: Counts and headers: Halabi et al., Radiology 2019;290(2):498-503, and the published files themselves.
CHALLENGE_PARTS: tuple[ChallengePart, ...] = (
    ChallengePart(
        name="training",
        id_column="id",
        age_column="boneage",
        sex_column="male",
        sex_codes=_MALE_COLUMN,
        folders=("boneage-training-dataset",),
        rows=12_611,
        female=5_778,
        male=6_833,
        fingerprints={"published": "f1116d2570e549c22bb59b8e8f8348450c244c955e140948ed0446138b95a298"},
    ),
    ChallengePart(
        name="validation",
        id_column="image id",
        age_column="bone age (months)",
        sex_column="male",
        sex_codes=_MALE_COLUMN,
        folders=("boneage-validation-dataset", "boneage-validation-dataset-1", "boneage-validation-dataset-2"),
        rows=1_425,
        fingerprints={"published": "dfa784cdf29e62d97d3c18047cc2651124a4c286208675ff8d0ba9f59aed16bf"},
    ),
    ChallengePart(
        name="test",
        id_column="case id",
        age_column="ground truth bone age (months)",
        sex_column="sex",
        sex_codes=MappingProxyType({"M": "male", "F": "female"}),
        folders=("boneage-test-dataset", "test set images"),
        rows=200,
        female=100,
        male=100,
        fingerprints={
            "decimal (weighted mean of six readings)": (
                "6804a6b6e661fe7d64adc12b21a31f85ab10ba68bf5e077b826af419bf8f6441"
            ),
            "integer": "44330955ea010ad681a2abc566f168e73066c9fecb6e1e71986c03eab864f043",
        },
    ),
)


def read_challenge(source: str | os.PathLike[str], *, parts: Sequence[str] = ("training",)) -> pd.DataFrame:
    """Read the RSNA challenge data from a folder in the layout of the challenge or of its Kaggle copy.

    Recognised, in ``source`` or one folder below (comma-separated text; an .xlsx file must be saved as CSV first):

    =========== ================================================== ============ ==================================
    part        header of the table                                sex codes    image folders (ID.png or ID.jpg)
    =========== ================================================== ============ ==================================
    training    ``id,boneage,male``                                True, False  ``boneage-training-dataset``
    validation  ``Image ID,male,Bone Age (months)``                TRUE, FALSE  ``boneage-validation-dataset``,
                                                                                ``...-1`` and ``...-2``
    test        ``Case ID,Sex,Ground truth bone age (months)``     M, F         ``boneage-test-dataset``,
                                                                                ``Test Set Images``
    =========== ================================================== ============ ==================================

    The folders may lie anywhere below ``source`` and may be nested in a folder of the same name.

    Args:
        source: the folder.
        parts: which parts to read; a part whose table is not there is left out.

    Raises:
        InputError: if ``source`` is no folder, holds none of the tables, holds two tables of one part, or lacks the
            image folder of a part.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that holds boneage-training-dataset.csv.")
    tables = _find_tables(folder, parts)
    if not tables:
        excel = any(True for _ in folder.glob("*.xlsx"))
        raise InputError(
            f"No label table of the RSNA challenge was found in {folder}: a CSV file with the header "
            "id,boneage,male (usually boneage-training-dataset.csv) is needed"
            + ("; save the .xlsx file as CSV." if excel else ".")
        )
    read = [
        _read_part(part, tables[part.name], _find_images(folder, part.folders))
        for part in CHALLENGE_PARTS
        if part.name in tables
    ]
    table = pd.concat(read, ignore_index=True)
    parts_of_id = table[table["problem"] != "unlabelled"].groupby("id")["part"].nunique()
    in_two = table["id"].isin(parts_of_id.index[parts_of_id > 1]) & (table["id"] != "")
    table.loc[in_two & (table["problem"] != "unlabelled"), "problem"] = "two_splits"
    return table


def _header(path: Path) -> list[str]:
    """Cells of the first line, lower case, runs of white space as one blank; [] if it is no text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline(2000)
    except UnicodeDecodeError:
        return []
    return [" ".join(cell.strip().strip('"').split()).lower() for cell in line.split(",")]


def _find_tables(folder: Path, parts: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*/*.csv")]):
        if path.name.startswith("."):
            continue
        header = set(_header(path))
        for part in CHALLENGE_PARTS:
            if part.name not in parts or not {part.id_column, part.age_column, part.sex_column} <= header:
                continue
            if part.name in found:
                raise InputError(
                    f"{found[part.name].relative_to(folder)} and {path.relative_to(folder)} are both {part.name} "
                    "tables; leave only the version you mean in the folder."
                )
            found[part.name] = path
    return found


def _find_images(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """File stem -> image files in any folder called one of ``names`` (at any depth, also nested in each other)."""
    found: dict[str, list[Path]] = {}
    for directory, subfolders, files in os.walk(folder):
        # "__MACOSX" and "._1377.png" are what macOS leaves beside the unpacked files.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        if os.path.basename(directory).lower() not in names:
            continue
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.setdefault(stem, []).append(Path(directory, name))
    return found


def _read_part(part: ChallengePart, table_path: Path, images: Mapping[str, list[Path]]) -> pd.DataFrame:
    if not images:
        raise InputError(
            f"The {part.name} table is there but none of its images: a folder {part.folders[0]} with ID.png or "
            "ID.jpg files is needed beside it."
        )
    try:
        cells = pd.read_csv(table_path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"The {part.name} table is not a readable CSV file: {error}") from error
    cells.columns = pd.Index([" ".join(str(name).split()).lower() for name in cells.columns])
    if cells.columns.has_duplicates:
        raise InputError(f"The {part.name} table has two columns of the same name; keep one of them.")
    ids = [str(cell).strip() for cell in cells[part.id_column]]
    often = {row_id for row_id, count in pd.Series(ids, dtype=str).value_counts().items() if count > 1}
    rows: list[dict[str, object]] = []
    for row_id, age_cell, sex_cell in zip(ids, cells[part.age_column], cells[part.sex_column], strict=True):
        months = _months(str(age_cell))
        code = str(sex_cell).strip()
        files = images.get(row_id, [])
        problem = None
        if not row_id:
            problem = "no_id"
        elif row_id in often:
            problem = "duplicate_id"
        elif not code:
            problem = "no_sex"
        elif code not in part.sex_codes:
            problem = "unknown_sex"
        elif math.isnan(months):
            problem = "no_age"
        elif not MIN_BONE_AGE_MONTHS <= months <= MAX_BONE_AGE_MONTHS:
            problem = "age_range"
        elif not files:
            problem = "no_image"
        elif len(files) > 1:
            problem = "two_images"
        rows.append(
            {
                "id": row_id,
                "bone_age_months": months,
                "sex": part.sex_codes.get(code),
                "path": files[0] if files else None,
                "part": part.name,
                "problem": problem,
            }
        )
    for number, stem in enumerate(sorted(images.keys() - set(ids)), start=1):
        rows.append(
            {
                # A stray file may be named after a patient; a number is an id of the challenge.
                "id": stem if stem.isdecimal() else f"unlabelled file {number}",
                "bone_age_months": math.nan,
                "sex": None,
                "path": images[stem][0],
                "part": part.name,
                "problem": "unlabelled",
            }
        )
    return pd.DataFrame(rows, columns=["id", "bone_age_months", "sex", "path", "part", "problem"], dtype=object)


def _months(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
