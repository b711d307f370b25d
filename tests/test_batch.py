"""Batches: a row per file, an answer or the reason; archives that cannot do harm; tables safe to open."""

import csv
import datetime
import io
import re
import stat
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import dicom, picture, png

from boneage_hf import batch, clinical, phantom
from boneage_hf.batch import BatchItem, BatchRow, collect, predict_batch, read_table, rows_to_csv
from boneage_hf.cli import main
from boneage_hf.errors import InputError
from boneage_hf.hub import load_pipeline
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.radiograph import MAX_AGE_MONTHS, months_between
from boneage_hf.report import DISCLAIMER

TINY = str(Path(__file__).parent / "checkpoints" / "tiny")
HAND = np.asarray(phantom.draw(120, "female", seed=3, size=200))
GIRL: dict[str, Any] = {"PatientSex": "F", "PatientBirthDate": "20100315", "StudyDate": "20200315"}


@pytest.fixture(scope="module")
def pipe() -> BoneAgePipeline:
    return load_pipeline(TINY)


def _zip(*members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def _reason(item: BatchItem) -> str:
    with pytest.raises(InputError) as refused:
        item.content()
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")
    return str(refused.value)


def _only(archive: bytes) -> BatchItem:
    (item,) = collect([("archive.zip", archive)])
    return item


# --- collecting -----------------------------------------------------------------------------------------------------


def test_files_folders_and_archives_give_the_same_bytes(tmp_path: Path) -> None:
    hand = png(HAND)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.png", ".hidden", "deeper/c.png"):
        (tmp_path / "folder" / name).write_bytes(hand)
    (tmp_path / "packed").write_bytes(_zip(("inside/d.png", hand)))
    items = collect([tmp_path / "folder", str(tmp_path / "packed"), ("e.png", hand), ("f.zip", _zip(("g", hand)))])
    assert [item.file for item in items] == ["a.png", "b.png", "d.png", "e.png", "g"]
    assert all(item.content() == hand for item in items)


def test_nothing_is_unpacked_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert _only(_zip(("a/b.png", png(HAND)))).content() == png(HAND)
    assert list(tmp_path.iterdir()) == []


def test_folders_hidden_files_and_the_shadows_of_a_mac_are_passed_over() -> None:
    archive = _zip(("a/", b""), ("__MACOSX/a/._b.png", b"x"), ("a/.DS_Store", b"x"), ("a/b.png", b"picture"))
    assert _only(archive).file == "b.png"


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a/../../b.png", "C:\\a.png", "..\\a.png", "\\a.png", ".."])
def test_a_name_that_points_outside_is_refused(name: str) -> None:
    assert "outside" in _reason(_only(_zip((name, b"picture"))))


def test_a_link_is_refused() -> None:
    link = zipfile.ZipInfo("a.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    assert "link" in _reason(_only(_zip((link, b"/etc/passwd"))))


def test_of_two_files_of_one_name_the_second_is_refused() -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive = _zip(("a.png", b"first"), ("a.png", b"second"))
    first, second = collect([("archive.zip", archive)])
    assert first.content() == b"first"
    assert "twice" in _reason(second)


def test_an_encrypted_file_is_refused() -> None:
    archive = bytearray(_zip(("a.png", b"picture")))
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    assert "password" in _reason(_only(bytes(archive)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_rare_compression_is_refused(compression: int) -> None:
    assert "deflate" in _reason(_only(_zip(("a.png", b"picture"), compression=compression)))


def test_an_archive_inside_an_archive_is_refused() -> None:
    assert "inside an archive" in _reason(_only(_zip(("a.png", _zip(("b.png", b"picture"))))))


def test_a_file_that_shrinks_too_much_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = _only(_zip(("a.png", bytes(10_000_000))))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was opened"))
    assert "200 times" in _reason(bomb)


def test_the_limits_of_an_archive_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    three = _zip(*((f"{number}.png", bytes(range(100))) for number in range(3)), compression=zipfile.ZIP_STORED)
    assert len(collect([("a.zip", three)])) == 3
    for limit, value, word in (
        ("MAX_MEMBERS", 2, "2 files"),
        ("MAX_TOTAL_BYTES", 299, "GiB"),
        ("MAX_DIRECTORY_BYTES", 100, "files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(batch, limit, value)
            assert word in _reason(_only(three))
    monkeypatch.setattr(batch, "MAX_FILE_BYTES", 99)
    assert all("MiB" in _reason(item) for item in collect([("a.zip", three)]))


def test_a_file_that_is_larger_than_its_directory_says_is_refused() -> None:
    archive = bytearray(_zip(("a.png", bytes(range(200)) * 50)))
    struct.pack_into("<I", archive, archive.index(b"PK\x01\x02") + 24, 100)
    assert "damaged" in _reason(_only(bytes(archive)))


def test_a_directory_of_the_large_form_is_refused() -> None:
    archive = _zip(("a.png", b"picture"))
    end = archive.index(b"PK\x05\x06")
    large = archive[:end] + struct.pack("<IQ2H2I4Q", 0x06064B50, 44, 45, 45, 0, 0, 1, 1, 2**40, 0)
    assert "split" in _reason(_only(large + struct.pack("<IIQI", 0x07064B50, 0, end, 1) + archive[end:]))


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" + bytes(80), b"PK\x05\x06", _zip(("a", b"x"))[:-9], _zip()],
    ids=["zeros", "only an end", "cut off", "empty"],  # the bytes hold the time of day, and every process must agree
)
def test_a_damaged_or_empty_archive_is_one_refused_item(content: bytes) -> None:
    assert "ZIP archive" in _reason(_only(content))


def test_a_missing_file_is_an_item_with_the_reason() -> None:
    (item,) = collect(["nowhere/Jane.png"])
    assert item.file == "Jane.png"
    assert "Jane" not in _reason(item)


def test_a_name_keeps_no_control_characters() -> None:
    assert _only(_zip(("a\x1b[31m\nb.png", b"x"))).file == "a\ufffd[31m\ufffdb.png"


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "file,sex,chronological_age_months\na.png,female,96.5\nb.png,,\n",
        "\ufeffSex;File;Chronological_Age_Months;notes\r\nfemale;a.png;96,5;x\r\n;b.png;;\r\n\r\n",
        "chronological_age_months\tFILE\tsex\n96.5\ta.png\tfemale\n\tb.png\t\n",
    ],
)
def test_a_table_is_read_in_the_dialects_of_spreadsheets(text: str) -> None:
    table = read_table(text.encode())
    assert list(table) == ["a.png", "b.png"]
    assert (table["a.png"].sex, table["a.png"].chronological_age_months) == ("female", 96.5)
    assert table["b.png"] == batch.TableRow()


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "file\na.png\n", "file,sex,sex\n", "\xff".encode("latin-1"), "\n"])
def test_what_is_no_such_table_is_refused(text: str | bytes) -> None:
    with pytest.raises(InputError, match="table"):
        read_table(text if isinstance(text, bytes) else text.encode())


def test_a_table_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_TABLE_BYTES", 20)
    with pytest.raises(InputError, match="larger"):
        read_table(b"file,sex\na.png,female\n")


# --- answers --------------------------------------------------------------------------------------------------------


def _rows(pipe: BoneAgePipeline, files: dict[str, bytes], table: str = "", sex: Any = None) -> list[BatchRow]:
    read = read_table(table.encode()) if table else None
    return list(predict_batch(pipe, collect(list(files.items())), table=read, sex=sex))


def test_an_answer_of_a_batch_is_that_of_the_pipeline(pipe: BoneAgePipeline) -> None:
    (row,) = _rows(pipe, {"a.png": png(HAND)}, sex="male")
    assert row.bone_age_months == pipe(png(HAND), sex="male")["bone_age_months"]
    assert (row.file, row.sex, row.sex_source, row.problem) == ("a.png", "male", "common", None)


def test_sex_is_that_of_the_table_then_of_the_header_then_the_common_one(pipe: BoneAgePipeline) -> None:
    girl, unknown = dicom(HAND, elements=GIRL), png(HAND)
    files = {"a": girl, "b": girl, "c": unknown, "d": unknown}
    rows = _rows(pipe, files, "file,sex\na,male\nd,female\n", "male")
    assert [(row.sex, row.sex_source) for row in rows] == [
        ("male", "table"),
        ("female", "dicom"),
        ("male", "common"),
        ("female", "table"),
    ]
    assert "other sex than the table" in str(rows[0].warnings)
    assert "other sex than the one given for all" in str(rows[1].warnings)
    assert rows[2].warnings is rows[3].warnings is None
    assert all(row.bone_age_months is not None for row in rows)


def test_without_a_sex_the_row_says_so(pipe: BoneAgePipeline) -> None:
    (row,) = _rows(pipe, {"a.png": png(HAND)})
    assert row.bone_age_months is None
    assert "sex is not known" in str(row.problem)


def test_the_score_is_that_of_the_assessment(pipe: BoneAgePipeline) -> None:
    (row,) = _rows(pipe, {"a": dicom(HAND, elements=GIRL)})
    assert row.chronological_age_months == 120
    assert row.bone_age_months is not None
    interval = None if row.interval_low_months is None else (row.interval_low_months, row.interval_high_months or 0.0)
    expected = clinical.assess(
        bone_age_months=row.bone_age_months, interval_months=interval, sex="female", chronological_age_months=120
    )
    assert row.sds is not None
    assert (row.sds, row.verdict) == (expected.sds, expected.verdict)


def test_the_age_of_the_table_goes_before_that_of_the_header_and_a_difference_is_told(pipe: BoneAgePipeline) -> None:
    files = {"a": dicom(HAND, elements=GIRL), "b": dicom(HAND, elements=GIRL), "c": dicom(HAND, elements=GIRL)}
    rows = _rows(pipe, files, "file,chronological_age_months\na,90\nb,121\nc,-4\n")
    assert [row.chronological_age_months for row in rows] == [90, 121, 120]
    assert "another chronological age" in str(rows[0].warnings)
    assert rows[1].warnings is None
    assert "no number of months" in str(rows[2].warnings)


def test_what_the_header_says_in_vain_is_told_where_nothing_else_says_it(pipe: BoneAgePipeline) -> None:
    vain = dicom(HAND, elements=GIRL | {"PatientSex": "O", "PatientBirthDate": "19000101"})
    rows = _rows(pipe, {"a": vain, "b": vain}, "file,sex,chronological_age_months\nb,female,120\n", "female")
    assert [row.bone_age_months is not None for row in rows] == [True, True]
    assert "neither female nor male: the one for all files was taken" in str(rows[0].warnings)
    assert "no possible chronological age: give it in the table" in str(rows[0].warnings)
    assert rows[1].warnings is None


def test_one_bad_file_does_not_stop_the_others(pipe: BoneAgePipeline) -> None:
    hand = png(HAND)
    rows = _rows(pipe, {"a": hand, "b": b"no picture", "c": b"", "d.zip": b"PK\x03\x04", "e": hand}, sex="female")
    assert [row.problem is None for row in rows] == [True, False, False, False, True]
    assert rows[0].bone_age_months == rows[4].bone_age_months


def test_bad_rows_of_a_table_are_told_and_no_others(pipe: BoneAgePipeline) -> None:
    files = {"a": png(HAND), "b": png(HAND), "x/c": png(HAND), "y/c": png(HAND), "d": png(HAND)}
    table = "file,sex\na,F\nb,female\nb,male\nc,female\nd,female\ngone,male\n"
    a, b, c, other_c, d, gone = _rows(pipe, files, table)
    assert "exactly female or male" in str(a.problem)
    assert "two different rows" in str(b.problem)
    assert c.problem == "Several files have this name: give their paths in the table, here: x/c"
    assert "here: y/c" in str(other_c.problem)
    assert d.problem is None
    assert gone.file == "gone"
    assert "not given" in str(gone.problem)


def test_a_table_tells_files_of_one_name_apart_by_their_paths(pipe: BoneAgePipeline) -> None:
    files = {"x/c": png(HAND), "y/c": png(HAND)}
    rows = _rows(pipe, files, "file,sex\nx/c,female\ny/c,male\n")
    assert [(row.file, row.sex) for row in rows] == [("x/c", "female"), ("y/c", "male")]


def test_rows_of_files_of_one_name_say_their_paths_and_those_of_one_path_a_number(pipe: BoneAgePipeline) -> None:
    names = ("x\n/c", "y/c", "d", "e", "e")
    rows = predict_batch(pipe, collect([(name, b"no picture") for name in names]))
    assert [row.file for row in rows] == ["x\ufffd/c", "y/c", "d", "e (1)", "e (2)"]


def test_a_row_of_a_table_is_not_used_for_two_files_of_one_path(pipe: BoneAgePipeline) -> None:
    items = collect([("c", png(HAND)), ("c", png(HAND))])
    rows = list(predict_batch(pipe, items, table=read_table(b"file,sex\nc,female\n")))
    sentence = "Several files have this path: rename them, or the table cannot tell them apart."
    assert [row.problem for row in rows] == [sentence] * 2


def test_one_file_is_read_at_a_time(pipe: BoneAgePipeline) -> None:
    read: list[str] = []

    def content(name: str) -> bytes:
        read.append(name)
        return png(HAND)

    items = [BatchItem(name, name, partial(content, name)) for name in "abc"]
    answers = predict_batch(pipe, items, sex="female")
    assert read == []
    next(answers)
    assert read == ["a"]


def test_age_by_header_is_age_by_assessment() -> None:
    for days in range(0, 7300, 37):
        birth, study = datetime.date(2004, 2, 29), datetime.date(2004, 2, 29) + datetime.timedelta(days)
        assert months_between(birth, study) == clinical.chronological_age_months(birth, study)
    assert MAX_AGE_MONTHS == clinical.OLDEST_MONTHS


def test_the_range_of_a_score_is_that_of_the_interval(pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = _rows(pipe, {"a.png": png(HAND)}, "file,sex,chronological_age_months\na.png,male,100\n")
    assert (row.sds is None, row.sds_low, row.sds_high) == (False, None, None)  # this checkpoint has no interval
    answer = pipe(png(HAND), sex="male") | {"interval_months": [90.0, 130.0]}
    monkeypatch.setattr(BoneAgePipeline, "__call__", lambda *arguments, **options: answer)
    (row,) = _rows(pipe, {"a.png": png(HAND)}, "file,sex,chronological_age_months\na.png,male,100\n")
    sd = clinical.growth_table("male").sd_at(100.0)
    assert (row.sds_low, row.sds_high) == pytest.approx((-10 / sd, 30 / sd))


def test_what_was_put_right_is_said(pipe: BoneAgePipeline) -> None:
    plain, inverted = _rows(pipe, {"a.png": png(HAND), "b.png": png(255 - HAND)}, sex="male")
    assert {plain.corrections is None, inverted.corrections is None} == {True, False}


# --- CSV ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_text_begins_a_formula_and_numbers_stay(start: str) -> None:
    row = BatchRow(f'{start}HYPERLINK("x"),1', bone_age_months=96.123, sds=-1.5)
    text = rows_to_csv([row], source={"model": f"{start}m", "date": "2026-01-02"})
    header, line = csv.reader(io.StringIO(text, newline=""))
    cells = dict(zip(header, line, strict=True))
    assert cells["file"] == f'\'{start}HYPERLINK("x"),1'
    assert (cells["bone_age_months"], cells["sds"], cells["problem"]) == ("96.12", "-1.50", "")
    assert (cells["model"], cells["date"]) == (f"'{start}m", "2026-01-02")


# --- the command ----------------------------------------------------------------------------------------------------


def _answers(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_answers_a_folder_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table, out = tmp_path / "hands", tmp_path / "rows.csv", tmp_path / "answers.csv"
    folder.mkdir()
    for name in ("Jane.png", "b.png"):
        (folder / name).write_bytes(png(HAND))
    table.write_text("file,sex\nJane.png,female\n")
    arguments = ["predict", TINY, "--batch", str(folder), "--table", str(table), "--out", str(out)]
    assert main([*arguments, "--sex", "male"]) == 0
    told = capsys.readouterr()
    assert "2 of 2 answered" in told.out
    assert "2/2" in told.err
    assert "Jane" not in told.err
    assert f"Reference: {clinical.REFERENCE}. Date: {datetime.date.today().isoformat()}. {DISCLAIMER}" in told.err
    assert [row["sex"] for row in _answers(out)] == ["female", "male"]
    for row in _answers(out):
        assert row["model"].startswith("tiny (tiny, ")
        assert re.fullmatch("[0-9a-f]{12}", row["revision"])
        assert (row["reference"], row["notice"]) == (clinical.REFERENCE, DISCLAIMER)
    assert main(arguments) == 1
    assert [bool(row["problem"]) for row in _answers(out)] == [False, True]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "FOLDER"],
        ["--batch", "FOLDER", "--out", "OUT", "--json"],
        ["--batch", "FOLDER", "--out", "FOLDER"],
        ["--batch", "FOLDER", "--out", "OUT"],
        ["--batch", "FOLDER", "--out", "OUT", "--table", "nowhere.csv"],
        ["FOLDER", "--out", "OUT"],
        ["FOLDER", "--table", "rows.csv"],
    ],
)
def test_a_mistake_in_the_command_is_one_sentence_and_nothing_is_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"FOLDER": str(tmp_path / "empty"), "OUT": str(tmp_path / "out.csv")}
    assert main(["predict", TINY, *(places.get(argument, argument) for argument in arguments)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def test_a_picture_that_is_no_hand_still_has_its_row(pipe: BoneAgePipeline) -> None:
    (row,) = _rows(pipe, {"slope.png": png(picture())}, sex="female")
    assert (row.bone_age_months is None) == (row.problem is not None)
