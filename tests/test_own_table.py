"""A table of one's own, or a data set of the Hub, made into a prepared data set."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from drawn import dicom, png
from hub_server import HubServer
from PIL import Image as Picture

from boneage_hf.cli import main
from boneage_hf.data import DataProblemsError, load_prepared, load_split, prepare_table, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.own_table import TableColumns, parse_sex_values, read_own_table
from boneage_hf.phantom import draw

ROWS = 30
MONTHS = TableColumns("months")


def hand(number: int) -> np.ndarray:
    return np.asarray(draw(20.0 + 6 * number, ("female", "male")[number % 2], seed=number, size=64))


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn hands as a hospital has them: PNG, JPEG and DICOM files with names of patients."""
    folder = tmp_path_factory.mktemp("hospital")
    for number in range(ROWS):
        pixels, name = hand(number), f"Smith_{number:02d}"
        if number % 3 == 0:
            (folder / f"{name}.dcm").write_bytes(dicom(pixels))
        elif number % 3 == 1:
            (folder / f"{name}.png").write_bytes(png(pixels))
        else:
            Picture.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)
    return folder


def table_of(radiographs: Path, **columns: Any) -> pd.DataFrame:
    files = sorted(path.name for path in radiographs.glob("Smith_*"))
    months = [20.0 + 6 * number for number in range(ROWS)]
    sex = [("F", "M")[number % 2] for number in range(ROWS)]
    return pd.DataFrame({"Datei": files, "Geschlecht": sex, "Alter": months} | columns)


OPTIONS = [
    "--file-column",
    "Datei",
    "--sex-column",
    "Geschlecht",
    "--age-column",
    "Alter",
    "--sex-values",
    "M=male,F=female",
]
COLUMNS = TableColumns("months", file="Datei", sex="Geschlecht", age="Alter", sex_values={"M": "male", "F": "female"})


def write(radiographs: Path, name: str, table: pd.DataFrame, **options: Any) -> Path:
    path = radiographs / name
    table.to_csv(path, index=False, **options)
    return path


@pytest.fixture
def csv(radiographs: Path) -> Path:
    return write(radiographs, "table.csv", table_of(radiographs))


def labels(folder: Path) -> dict[str, tuple[str, float]]:
    return {
        row_id: (("female", "male")[sex], months)
        for split in load_prepared(folder).values()
        for row_id, sex, months in zip(split["id"], split["sex"], split["bone_age_months"], strict=True)
    }


def test_a_hospitals_table_becomes_a_prepared_data_set(
    csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(csv), str(tmp_path / "out"), *OPTIONS, "--age-unit", "months"]) == 0
    assert "15 female" not in capsys.readouterr().err
    found = labels(tmp_path / "out")
    assert found == {str(n + 1): (("female", "male")[n % 2], 20.0 + 6 * n) for n in range(ROWS)}
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "table"
    assert [(part["name"], part["rows"]) for part in manifest["source"]] == [("table", ROWS)]
    assert set(manifest["splits"]) == {"train", "validation", "test"}


def test_the_pixels_of_png_and_dicom_files_are_kept_and_their_names_and_headers_are_not(
    csv: Path, tmp_path: Path
) -> None:
    prepare_table(csv, tmp_path / "out", COLUMNS, progress=False)
    rows = {row["id"]: row["image"] for split in load_prepared(tmp_path / "out").values() for row in split}
    for number in range(ROWS):
        if number % 3 < 2:
            assert np.array_equal(np.asarray(rows[str(number + 1)]), hand(number))
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"Smith" not in content
    assert str(csv.parent).encode() not in content


def test_a_second_run_finds_it_done(csv: Path, tmp_path: Path) -> None:
    assert not prepare_table(csv, tmp_path / "out", COLUMNS, progress=False).already_prepared
    assert prepare_table(csv, tmp_path / "out", COLUMNS, progress=False).already_prepared


def test_years_are_made_months(radiographs: Path, tmp_path: Path) -> None:
    path = write(radiographs, "years.csv", table_of(radiographs, Alter=[n / 2 for n in range(ROWS)]))
    assert main(["prepare", str(path), str(tmp_path / "out"), *OPTIONS, "--age-unit", "years"]) == 0
    assert labels(tmp_path / "out")["4"][1] == 18.0


def test_semicolons_and_decimal_commas_are_read(radiographs: Path, tmp_path: Path) -> None:
    path = write(radiographs, "german.csv", table_of(radiographs), sep=";", decimal=",")
    prepare_table(path, tmp_path / "out", COLUMNS, progress=False)
    assert labels(tmp_path / "out")["2"] == ("male", 26.0)


def test_ids_of_the_table_are_kept_where_they_are_named(radiographs: Path, tmp_path: Path) -> None:
    path = write(radiographs, "ids.csv", table_of(radiographs, study=[f"s{n}" for n in range(ROWS)]))
    assert (
        main(["prepare", str(path), str(tmp_path / "out"), *OPTIONS, "--age-unit", "months", "--id-column", "study"])
        == 0
    )
    assert set(labels(tmp_path / "out")) == {f"s{n}" for n in range(ROWS)}


@pytest.mark.parametrize("inside", ["struct", "bytes", "path"])
def test_a_parquet_table_is_read_with_its_images_inside_or_beside(
    radiographs: Path, tmp_path: Path, inside: str
) -> None:
    table = table_of(radiographs)
    contents = [(radiographs / name).read_bytes() for name in table["Datei"]]
    column: list[Any] = list(table["Datei"])
    if inside == "struct":
        column = [{"bytes": content, "path": name} for content, name in zip(contents, column, strict=True)]
    elif inside == "bytes":
        column = contents
    arrow = pa.table({"Datei": column, "Geschlecht": list(table["Geschlecht"]), "Alter": list(table["Alter"])})
    pq.write_table(arrow, radiographs / f"{inside}.parquet")
    for already in (False, True):
        report = prepare_table(radiographs / f"{inside}.parquet", tmp_path / "out", COLUMNS, progress=False)
        assert report.already_prepared is already
    assert labels(tmp_path / "out")["3"] == ("female", 32.0)


def problems(csv: Path, out: Path) -> dict[str, list[str]]:
    with pytest.raises(DataProblemsError) as refusal:
        prepare_table(csv, out, COLUMNS, progress=False)
    assert not out.exists()
    assert "Smith" not in str(refusal.value)
    return {kind: list(ids) for kind, ids in refusal.value.problems.items()}


def test_every_row_that_cannot_be_used_is_reported_at_once(radiographs: Path, tmp_path: Path) -> None:
    table = table_of(radiographs).astype(object)
    table.loc[0, "Geschlecht"], table.loc[1, "Geschlecht"] = "", "w"
    table.loc[2, "Alter"], table.loc[3, "Alter"] = "twelve", 300.0
    table.loc[4, "Datei"] = "Smith_gone.png"
    table.loc[5, "Datei"] = str(table["Datei"].iloc[6])
    (radiographs / "Smith_broken.png").write_bytes(b"no picture")
    table.loc[8, "Datei"] = "Smith_broken.png"
    path = write(radiographs, "bad.csv", table)
    expected = {
        "no_sex": ["1"],
        "unknown_sex": ["2"],
        "no_age": ["3"],
        "age_range": ["4"],
        "no_image": ["5"],
        "unreadable": ["9"],
        "same_image": ["6", "7"],
    }
    assert problems(path, tmp_path / "out") == expected
    report = prepare_table(path, tmp_path / "out", COLUMNS, skip_bad=True, progress=False)
    assert report.left_out == expected
    assert sum(split["rows"] for split in report.splits.values()) == ROWS - 8
    (radiographs / "Smith_broken.png").unlink()


def test_an_id_that_occurs_twice_is_reported(radiographs: Path, tmp_path: Path) -> None:
    path = write(radiographs, "twice.csv", table_of(radiographs, study=["a", "a", *map(str, range(2, ROWS))]))
    table = read_own_table(path, TableColumns("months", "Datei", "Geschlecht", "Alter", "study"), scratch=tmp_path)
    assert list(table["problem"][:3]) == ["duplicate_id", "duplicate_id", "unknown_sex"]


def sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_the_unit_of_age_is_never_guessed(csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--age-unit" in sentence(["prepare", str(csv), str(tmp_path / "out"), *OPTIONS], capsys)


def test_a_column_that_is_not_there_is_named(csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = sentence(["prepare", str(csv), str(tmp_path / "out"), "--age-unit", "months"], capsys)
    assert "no column 'file', 'sex', 'bone_age_months'" in said
    assert "Geschlecht" in said


@pytest.mark.parametrize("text", ["M=male", "M=male,F=girl", "M,F", "M=male,M=female", "=male,F=female", ""])
def test_codes_of_sex_that_are_not_both_named_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--sex-values"):
        parse_sex_values(text)


def test_without_codes_only_the_two_words_are_a_sex(csv: Path, tmp_path: Path) -> None:
    table = read_own_table(csv, TableColumns("months", "Datei", "Geschlecht", "Alter"), scratch=tmp_path)
    assert set(table["problem"]) == {"unknown_sex"}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'a,b\n"1,2\n'])
def test_a_file_that_is_no_table_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(InputError, match="table"):
        prepare_table(tmp_path / "table.csv", tmp_path / "out", MONTHS, progress=False)


def test_a_table_without_rows_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("file,sex,bone_age_months\n")
    with pytest.raises(InputError, match="no row"):
        prepare_table(tmp_path / "table.csv", tmp_path / "out", MONTHS, progress=False)


def test_the_card_of_a_table_says_that_it_is_of_patients(csv: Path, tmp_path: Path) -> None:
    prepare_table(csv, tmp_path / "out", COLUMNS, progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Radiographs of patients" in card
    assert "RSNA" not in card
    assert "license" not in card.split("---")[1]


# --- from the Hub ---------------------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub_becomes_a_prepared_data_set(hub: HubServer, tmp_path: Path) -> None:
    features = Features({"image": Image(), "gender": ClassLabel(names=["girl", "boy"]), "years": Value("float32")})

    def rows(numbers: range) -> Dataset:
        columns = {
            "image": [{"bytes": png(hand(n)), "path": None} for n in numbers],
            "gender": [n % 2 for n in numbers],
            "years": [2 + n / 4 for n in numbers],
        }
        return Dataset.from_dict(columns, features=features)

    DatasetDict({"train": rows(range(20)), "test": rows(range(20, ROWS))}).push_to_hub("clinic/raw")
    arguments = ["prepare", "clinic/raw", str(tmp_path / "out"), "--file-column", "image", "--sex-column", "gender"]
    arguments += ["--age-column", "years", "--age-unit", "years", "--sex-values", "girl=female,boy=male"]
    assert main(arguments) == 0
    assert len(labels(tmp_path / "out")) == ROWS
    assert labels(tmp_path / "out")["22"] == ("male", 12 * (2 + 21 / 4))
    settings = read_manifest(tmp_path / "out")["settings"]
    assert settings["hub_id"] == "clinic/raw"
    assert settings["commit"] == hub.repository("clinic/raw", "dataset").branches["main"]
    image = np.asarray(load_split(tmp_path / "out", "train")[0]["image"])
    assert image.shape == (64, 64)
    assert np.array_equal(image, hand(int(load_split(tmp_path / "out", "train")["id"][0]) - 1))


def test_a_picture_in_memory_is_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Picture.fromarray(hand(0)).save(buffer, "PNG")
    pq.write_table(
        pa.table({"file": [buffer.getvalue()], "sex": ["female"], "bone_age_months": [20]}), tmp_path / "one.parquet"
    )
    (tmp_path / "scratch").mkdir()
    table = read_own_table(tmp_path / "one.parquet", MONTHS, scratch=tmp_path / "scratch")
    assert table["path"][0].read_bytes() == buffer.getvalue()
