"""From a folder in the challenge's layout to a prepared data set, and back out of it; on small drawn pictures."""

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import PngImagePlugin

from boneage_hf import data
from boneage_hf.data import (
    DataProblemsError,
    licence_of,
    load_prepared,
    load_split,
    prepare,
    prepare_phantoms,
    read_manifest,
)
from boneage_hf.errors import InputError
from boneage_hf.label_tables import CHALLENGE_PARTS, PROBLEMS, read_challenge
from boneage_hf.splits import fingerprint, reference_split

TRAINING = "id,boneage,male"
VALIDATION = "Image ID,male,Bone Age (months)"
TEST = "Case ID,Sex,Ground truth bone age (months)"


def picture(seed: int, *, width: int = 40, height: int = 48) -> PILImage.Image:
    """A grey gradient with noise; another seed is another picture."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 200, height)[:, None] + np.zeros((1, width))
    return PILImage.fromarray((ramp + rng.integers(0, 40, (height, width))).astype(np.uint8))


def write_table(path: Path, header: str, rows: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def write_images(folder: Path, ids: Sequence[str], *, suffix: str = ".png", seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row_id in ids:
        picture(seed + int(row_id)).save(folder / f"{row_id}{suffix}")


def labels(n: int, *, first: int = 1377) -> list[tuple[str, float, str]]:
    """n rows: id, months, "True" or "False"."""
    return [(str(first + row), float(8 + 227 * row // max(n - 1, 1)), str(row % 2 == 0)) for row in range(n)]


def make_source(folder: Path, n: int = 24, *, extra: Sequence[str] = (), suffix: str = ".png") -> Path:
    """A training set of n good rows, and rows of the table as given in ``extra`` (without images)."""
    rows = labels(n)
    table = [f"{row_id},{months:.0f},{male}" for row_id, months, male in rows]
    write_table(folder / "boneage-training-dataset.csv", TRAINING, [*table, *extra])
    write_images(folder / "boneage-training-dataset", [row[0] for row in rows], suffix=suffix)
    return folder


def make_official(folder: Path) -> Path:
    make_source(folder, 12)
    ids = [str(number) for number in range(3000, 3009)]
    rows = [f"{row_id},{'TRUE' if int(row_id) % 2 else 'FALSE'},{int(row_id) - 2900}" for row_id in ids]
    write_table(folder / "Bone Age Validation Set" / "Validation Dataset.csv", VALIDATION, rows)
    write_images(folder / "Bone Age Validation Set" / "boneage-validation-dataset-1", ids[:5])
    write_images(folder / "Bone Age Validation Set" / "boneage-validation-dataset-2", ids[5:])
    write_table(folder / "Bone age ground truth.csv", TEST, ["4360,M,168.93", "4460,F,80.5"])
    write_images(folder / "Test Set Images", ["4360", "4460"])
    return folder


def refused(source: Path, out: Path, **settings: Any) -> Mapping[str, Sequence[str]]:
    """The problems for which ``prepare`` refuses a source, having written nothing."""
    with pytest.raises(DataProblemsError) as error:
        prepare(source, out, **settings)
    assert not out.exists()
    return error.value.problems


def rows_of(loaded: DatasetDict) -> dict[str, dict[str, Any]]:
    return {row["id"]: {**row, "split": name} for name, split in loaded.items() for row in split}


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_prepared_folder_loads_with_plain_datasets_as_a_whole_and_by_split(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    whole = load_dataset(str(tmp_path / "out"))
    assert {name: len(split) for name, split in whole.items()} == {"train": 18, "validation": 4, "test": 2}
    assert len(load_dataset(str(tmp_path / "out"), split="validation")) == 4


def test_the_features_are_fixed(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    assert load_prepared(tmp_path / "out")["train"].features == {
        "image": Image(),
        "id": Value("string"),
        "sex": ClassLabel(names=["female", "male"]),
        "bone_age_months": Value("float32"),
        "calibration": Value("bool"),
    }


def test_every_row_keeps_its_own_image_age_and_sex(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    loaded = rows_of(load_prepared(tmp_path / "out"))
    assert len(loaded) == 24
    for row_id, months, male in labels(24):
        row = loaded[row_id]
        assert row["bone_age_months"] == months
        assert row["sex"] == (1 if male == "True" else 0)
        assert np.array_equal(np.asarray(row["image"]), np.asarray(picture(int(row_id))))


def test_the_split_is_the_reference_split_of_the_table(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out", seed=5)
    rows = labels(24)
    sexes = ["male" if row[2] == "True" else "female" for row in rows]
    expected = reference_split([row[0] for row in rows], [row[1] for row in rows], sexes, seed=5)
    loaded = rows_of(load_prepared(tmp_path / "out"))
    found = [(loaded[row[0]]["split"], loaded[row[0]]["calibration"]) for row in rows]
    assert found == [tuple(assignment) for assignment in expected]


def stored_bytes(folder: Path, row_id: str) -> bytes:
    for split in load_prepared(folder).values():
        for row in split.cast_column("image", Image(decode=False)):
            if row["id"] == row_id:
                content = row["image"]["bytes"]
                assert isinstance(content, bytes)
                return content
    raise AssertionError(row_id)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_small_grey_file_is_kept_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    source = make_source(tmp_path / "source", suffix=suffix)
    prepare(source, tmp_path / "out")
    original = source / "boneage-training-dataset" / f"1380{suffix}"
    assert stored_bytes(tmp_path / "out", "1380") == original.read_bytes()


def test_a_large_image_is_reduced_bilinearly_and_keeps_its_shape(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    large = picture(1, width=300, height=200)
    large.save(source / "boneage-training-dataset" / "1380.png")
    prepare(source, tmp_path / "out", size=60)
    expected = io.BytesIO()
    large.resize((60, 40), PILImage.Resampling.BILINEAR).save(expected, format="JPEG", quality=95)
    assert stored_bytes(tmp_path / "out", "1380") == expected.getvalue()


def test_original_size_keeps_a_large_file_as_it_is(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    large = source / "boneage-training-dataset" / "1380.png"
    picture(1, width=700, height=600).save(large)
    prepare(source, tmp_path / "out", size=None)
    assert stored_bytes(tmp_path / "out", "1380") == large.read_bytes()


def test_a_grey_picture_saved_as_rgb_is_stored_as_grey_without_loss(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    picture(1).convert("RGB").save(source / "boneage-training-dataset" / "1380.png")
    prepare(source, tmp_path / "out")
    stored = PILImage.open(io.BytesIO(stored_bytes(tmp_path / "out", "1380")))
    assert stored.mode == "L"
    assert np.array_equal(np.asarray(stored), np.asarray(picture(1)))


def test_text_in_a_png_does_not_get_into_the_data_set(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "Jane Example")
    picture(1).save(source / "boneage-training-dataset" / "1380.png", pnginfo=text)
    prepare(source, tmp_path / "out")
    stored = stored_bytes(tmp_path / "out", "1380")
    assert b"Jane" not in stored
    assert np.array_equal(np.asarray(PILImage.open(io.BytesIO(stored))), np.asarray(picture(1)))


def test_a_jpeg_turned_by_exif_is_stored_upright_and_without_exif(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", suffix=".jpg")
    exif = PILImage.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "Jane Example"
    path = source / "boneage-training-dataset" / "1380.jpg"
    picture(1, width=40, height=64).save(path, exif=exif)
    prepare(source, tmp_path / "out")
    stored = PILImage.open(io.BytesIO(stored_bytes(tmp_path / "out", "1380")))
    turned = PILImage.open(path).transpose(PILImage.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(stored), np.asarray(turned))
    assert not stored.getexif()


def test_the_manifest_agrees_with_what_is_loaded(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    for name, split in load_prepared(tmp_path / "out").items():
        months = np.array(split["bone_age_months"], dtype=np.float64)
        summary = manifest["splits"][name]
        assert summary["rows"] == len(split)
        assert summary["male"] == sum(split["sex"])
        assert summary["calibration"] == sum(split["calibration"])
        assert summary["mean_months"] == pytest.approx(months.mean())
        assert summary["sd_months"] == pytest.approx(months.std(ddof=1))
        assert summary["fingerprint"] == fingerprint(split["id"], split["bone_age_months"])
        assert sum(summary["age_bands"].values()) == len(split)
    assert manifest["whole"]["fingerprint"] == fingerprint([row[0] for row in labels(24)], [r[1] for r in labels(24)])


def test_the_card_says_where_the_data_came_from_and_what_may_not_be_done_with_it(tmp_path: Path) -> None:
    report = prepare(make_source(tmp_path / "source"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "10.1148/radiol.2018180736" in card
    assert "Never re-host it" in card
    assert "Seed 2017" in card
    assert all(str(summary["fingerprint"]) in card for summary in report.splits.values())
    assert "No row and no image of the source was left out." in card


def test_the_licence_that_a_training_records_is_the_one_on_the_card(tmp_path: Path, phantoms: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    rsna, drawn = (
        (licence_of(read_manifest(folder)), (folder / "README.md").read_text(encoding="utf-8"))
        for folder in (tmp_path / "out", phantoms)
    )
    assert rsna[0] is not None
    assert f"license_name: {rsna[0]}\n" in rsna[1]
    assert f"license: {drawn[0]}\n" in drawn[1]
    assert licence_of({"kind": "table"}) is None


@pytest.mark.parametrize("name", ["boneage_hf/checkpoints/default", "checkpoints/vgg19-attention-sex"])
def test_checkpoints_trained_on_rsna_images_record_their_licence_at_every_step(name: str) -> None:
    def steps(provenance: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield provenance
        for before in (provenance.get("initial_weights"), provenance.get("teacher")):
            if before is not None and before.get("provenance") is not None:
                yield from steps(before["provenance"])

    config = json.loads((Path(__file__).parent.parent / name / "config.json").read_text(encoding="utf-8"))
    recorded = [step["data"] for step in steps(config["provenance"]) if "data" in step]
    assert len(recorded) > 1
    assert {(each["kind"], each["licence"]) for each in recorded} == {("rsna", licence_of({"kind": "rsna"}))}


def test_no_path_of_the_machine_gets_into_the_data_set(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_a_source_that_is_not_the_published_one_is_said_to_differ(tmp_path: Path) -> None:
    report = prepare(make_source(tmp_path / "source"), tmp_path / "out")
    assert "The training table has 24 rows, the published one 12611." in report.warnings
    assert "The labels of the training table are not those that were published (fingerprint)." in report.warnings
    assert "published one 12611" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_very_small_source_loses_its_empty_splits_with_a_warning(tmp_path: Path) -> None:
    report = prepare(make_source(tmp_path / "source", 3), tmp_path / "out")
    assert "The split test is empty." in report.warnings
    assert "test" not in load_prepared(tmp_path / "out")


# --- the layouts ----------------------------------------------------------------------------------------------------


def test_the_doubly_nested_folder_of_the_kaggle_copy_is_read(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    folder = source / "boneage-training-dataset"
    folder.rename(source / "inner")
    folder.mkdir()
    (source / "inner").rename(folder / "boneage-training-dataset")
    prepare(source, tmp_path / "out")
    assert len(rows_of(load_prepared(tmp_path / "out"))) == 24


def test_a_table_is_known_by_its_header_whatever_its_name(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    table = source / "boneage-training-dataset.csv"
    table.write_text("\ufeffMale,BoneAge,ID\nTrue,100,1377\n", encoding="utf-8")
    table.rename(source / "labels of the train set.csv")
    (source / "sample_submission.csv").write_text("id,boneage\n1,2\n", encoding="utf-8")
    row = read_challenge(source).iloc[0]
    assert (row["id"], row["bone_age_months"], row["sex"], row["problem"]) == ("1377", 100.0, "male", None)


def test_what_macos_leaves_beside_the_files_is_passed_over(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (source / "boneage-training-dataset" / "._1377.png").write_bytes(b"junk")
    write_images(source / "__MACOSX" / "boneage-training-dataset", ["1377"])
    assert read_challenge(source)["problem"].isna().all()


def test_a_folder_without_a_table_is_refused_with_the_header_that_is_needed(tmp_path: Path) -> None:
    write_images(tmp_path / "boneage-training-dataset", ["1"])
    with pytest.raises(InputError, match="header id,boneage,male"):
        prepare(tmp_path, tmp_path / "out")


def test_an_excel_table_is_to_be_saved_as_csv(tmp_path: Path) -> None:
    (tmp_path / "Bone age ground truth.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"save the \.xlsx file as CSV"):
        prepare(tmp_path, tmp_path / "out")


def test_two_tables_of_one_part_are_refused_by_name(tmp_path: Path) -> None:
    source = make_official(tmp_path / "source")
    write_table(source / "integer.csv", TEST, ["4360,M,169"])
    with pytest.raises(InputError, match=r"Bone age ground truth\.csv and integer\.csv are both test tables"):
        prepare(source, tmp_path / "out", split="official")


def test_a_table_without_its_image_folder_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "boneage-training-dataset.csv", TRAINING, ["1,12,True"])
    with pytest.raises(InputError, match="a folder boneage-training-dataset with"):
        prepare(tmp_path, tmp_path / "out")


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")


def test_the_official_split_takes_the_parts_of_the_challenge(tmp_path: Path) -> None:
    prepare(make_official(tmp_path / "source"), tmp_path / "out", split="official")
    loaded = load_prepared(tmp_path / "out")
    assert {name: len(split) for name, split in loaded.items()} == {"train": 12, "validation": 9, "test": 2}
    assert sum(loaded["validation"]["calibration"]) == 4
    assert not any(loaded["train"]["calibration"])
    assert not any(loaded["test"]["calibration"])
    assert [row["sex"] for row in loaded["test"]] == [1, 0]
    assert [round(row["bone_age_months"], 2) for row in loaded["test"]] == [168.93, 80.5]
    assert [row["sex"] for row in loaded["validation"]] == [int(row["id"]) % 2 for row in loaded["validation"]]


def test_the_reference_split_uses_the_training_set_alone(tmp_path: Path) -> None:
    prepare(make_official(tmp_path / "source"), tmp_path / "out")
    assert len(rows_of(load_prepared(tmp_path / "out"))) == 12


def test_the_official_split_needs_the_validation_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the challenge's validation set"):
        prepare(make_source(tmp_path / "source"), tmp_path / "out", split="official")


# --- what can be wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["O", "", "M", "F", "true", "0", "male", "unknown"])
def test_a_sex_code_that_is_not_the_training_tables_is_an_error_row(tmp_path: Path, code: str) -> None:
    source = make_source(tmp_path / "source", extra=[f"99,100,{code}"])
    assert refused(source, tmp_path / "out") == {"unknown_sex" if code else "no_sex": ["99"]}


@pytest.mark.parametrize("code", ["O", "m", "True", "FALSE"])
def test_a_sex_code_that_is_not_the_test_tables_is_an_error_row(tmp_path: Path, code: str) -> None:
    source = make_official(tmp_path / "source")
    write_table(source / "Bone age ground truth.csv", TEST, ["4360,M,100", f"4460,{code},80"])
    assert refused(source, tmp_path / "out", split="official") == {"unknown_sex": ["4460"]}


@pytest.mark.parametrize(
    ("age", "kind"),
    [
        ("", "no_age"),
        ("nan", "no_age"),
        ("ten", "no_age"),
        ("-1", "age_range"),
        ("240.5", "age_range"),
        ("inf", "age_range"),
    ],
)
def test_an_age_that_cannot_be_is_an_error_row(tmp_path: Path, age: str, kind: str) -> None:
    source = make_source(tmp_path / "source", extra=[f"99,{age},True"])
    assert refused(source, tmp_path / "out") == {kind: ["99"]}


@pytest.mark.parametrize("age", ["0", "240"])
def test_the_bounds_of_the_ages_are_allowed(tmp_path: Path, age: str) -> None:
    source = make_source(tmp_path / "source", extra=[f"99,{age},True"])
    write_images(source / "boneage-training-dataset", ["99"])
    assert read_challenge(source)["problem"].isna().all()


def spoil(source: Path) -> dict[str, list[str]]:
    """Add one row or image of every kind of problem that the training part can have; returns what they are."""
    folder = source / "boneage-training-dataset"
    with (source / "boneage-training-dataset.csv").open("a", encoding="utf-8") as table:
        table.write(",50,True\n")
        table.write("90,50,True\n90,51,True\n")
        table.write("91,50,\n92,50,O\n93,,True\n94,999,True\n95,50,False\n96,50,False\n97,50,False\n")
    write_images(folder, ["90", "91", "92", "93", "94", "96", "98"])
    write_images(folder, ["96"], suffix=".jpg")
    (folder / "97.png").write_bytes((folder / "1377.png").read_bytes()[:300])
    picture(1379).save(folder / "1378.png", compress_level=1)
    return {
        "no_id": ["training row 25"],
        "duplicate_id": ["90", "90"],
        "no_sex": ["91"],
        "unknown_sex": ["92"],
        "no_age": ["93"],
        "age_range": ["94"],
        "no_image": ["95"],
        "two_images": ["96"],
        "unreadable": ["97"],
        "same_image": ["1378", "1379"],
        "unlabelled": ["98"],
    }


def test_all_problems_are_reported_at_once_before_anything_is_written(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    expected = spoil(source)
    assert refused(source, tmp_path / "out") == expected
    with pytest.raises(InputError) as error:
        prepare(source, tmp_path / "out")
    for kind, ids in expected.items():
        assert f"{len(ids)} x {PROBLEMS[kind]} (id {', '.join(ids)})" in str(error.value)
    assert "skip_bad" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_long_list_of_bad_rows_is_cut_after_the_first_few_ids(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", extra=[f"{90 + row},50,True" for row in range(7)])
    with pytest.raises(InputError, match=r"7 x no image file for this id \(id 90, 91, 92, 93, 94, \.\.\.\)"):
        prepare(source, tmp_path / "out")


def test_bad_rows_can_be_left_out_and_are_recorded(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    expected = spoil(source)
    report = prepare(source, tmp_path / "out", skip_bad=True)
    assert report.left_out == expected
    assert read_manifest(tmp_path / "out")["left_out"] == expected
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert all(PROBLEMS[kind] in card for kind in expected)
    assert set(rows_of(load_prepared(tmp_path / "out"))) == {row[0] for row in labels(24)} - {"1378", "1379"}


def test_a_bad_image_does_not_move_the_other_rows_to_another_split(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "clean")
    clean = rows_of(load_prepared(tmp_path / "clean"))
    for row_id in ("1380", "1391"):
        (tmp_path / "source" / "boneage-training-dataset" / f"{row_id}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    prepare(tmp_path / "source", tmp_path / "left", skip_bad=True)
    left = rows_of(load_prepared(tmp_path / "left"))
    assert set(clean) - set(left) == {"1380", "1391"}
    for row_id, row in left.items():
        assert (row["split"], row["calibration"]) == (clean[row_id]["split"], clean[row_id]["calibration"])


def test_of_identical_images_with_one_label_the_first_stays(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", extra=["500,77,True", "1000,77,True"])
    for row_id in ("500", "1000"):
        picture(1).save(source / "boneage-training-dataset" / f"{row_id}.png")
    assert prepare(source, tmp_path / "out", skip_bad=True).left_out == {"same_image": ["1000"]}
    assert "500" in rows_of(load_prepared(tmp_path / "out"))


def test_an_id_in_two_parts_is_an_error_in_both(tmp_path: Path) -> None:
    source = make_official(tmp_path / "source")
    with (source / "boneage-training-dataset.csv").open("a", encoding="utf-8") as table:
        table.write("3001,50,True\n")
    write_images(source / "boneage-training-dataset", ["3001"], seed=7)
    assert refused(source, tmp_path / "out", split="official") == {"two_splits": ["3001", "3001"]}


def test_the_same_radiograph_in_two_parts_is_left_out_of_both(tmp_path: Path) -> None:
    source = make_official(tmp_path / "source")
    picture(4360).save(source / "boneage-training-dataset" / "1380.png")
    assert refused(source, tmp_path / "out", split="official") == {"same_image": ["1380", "4360"]}


def test_a_finished_folder_that_left_rows_out_still_wants_that_to_be_allowed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", extra=["99,50,True"])
    prepare(source, tmp_path / "out", skip_bad=True)
    with pytest.raises(DataProblemsError, match="no image file"):
        prepare(source, tmp_path / "out")


@pytest.mark.parametrize("size", [0, 31, 2.5, True, "512"])
def test_a_size_that_is_no_number_of_pixels_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match="size must be a whole number of pixels"):
        prepare(make_source(tmp_path / "source"), tmp_path / "out", size=size)


def test_an_unknown_split_rule_is_refused(tmp_path: Path) -> None:
    rule: Any = "random"
    with pytest.raises(InputError, match="split must be one of reference, official"):
        prepare(make_source(tmp_path / "source"), tmp_path / "out", split=rule)


# --- running it again -----------------------------------------------------------------------------------------------


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    prepare(source, tmp_path / "one")
    prepare(source, tmp_path / "two")
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    first = prepare(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    second = prepare(source, tmp_path / "out")
    assert (first.already_prepared, second.already_prepared) == (False, True)
    assert "Already prepared" in str(second)
    assert second.splits == first.splits
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


class InterruptedByTest(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let only the first shards be written, and the next one only in part."""
    write = data._write_shard
    written: list[Path] = []

    def stop(table: Any, rows: Any, spool: Any, path: Path, settings: Any) -> None:
        if len(written) == after:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise InterruptedByTest
        written.append(path)
        write(table, rows, spool, path, settings)

    monkeypatch.setattr(data, "_write_shard", stop)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    picture(1, width=300, height=200).save(source / "boneage-training-dataset" / "1400.png")
    monkeypatch.setattr(data, "_SHARD_ROWS", 5)
    prepare(source, tmp_path / "straight", size=60)
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        with pytest.raises(InterruptedByTest):
            prepare(source, tmp_path / "out", size=60)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").glob("*.parquet")}
    assert len(done) == 2

    def check_again(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the images were checked a second time")

    monkeypatch.setattr(data, "_check_images", check_again)
    assert not prepare(source, tmp_path / "out", size=60).already_prepared
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert content_of(tmp_path / "out") == content_of(tmp_path / "straight")


def test_an_unfinished_folder_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    interrupt(monkeypatch, after=1)
    with pytest.raises(InterruptedByTest):
        prepare(source, tmp_path / "out")
    with pytest.raises(InputError, match="only partly prepared; run the same"):
        load_prepared(tmp_path / "out")


def test_an_unfinished_folder_is_not_gone_on_with_under_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(InterruptedByTest):
            prepare(source, tmp_path / "out")
    with pytest.raises(InputError, match="made with seed 2017 instead of 1; give another"):
        prepare(source, tmp_path / "out", seed=1)


def test_other_settings_do_not_go_into_a_finished_folder(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    prepare(source, tmp_path / "out")
    before = content_of(tmp_path / "out")
    with pytest.raises(InputError, match="made with size 512 instead of 256; give another output folder"):
        prepare(source, tmp_path / "out", size=256)
    assert content_of(tmp_path / "out") == before


def test_another_source_does_not_go_into_a_finished_folder(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    make_source(tmp_path / "source", 30)
    with pytest.raises(InputError, match="made with other source files"):
        prepare(tmp_path / "source", tmp_path / "out")


def test_a_folder_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="not empty and holds no prepared data set"):
        prepare(make_source(tmp_path / "source"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="is a file; give a folder"):
        prepare(make_source(tmp_path / "source"), tmp_path / "out")


def test_a_cut_shard_is_noticed_and_the_same_command_repairs_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    prepare(source, tmp_path / "out")
    whole = content_of(tmp_path / "out")
    shard = next((tmp_path / "out" / "data").glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        load_prepared(tmp_path / "out")
    prepare(source, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_a_folder_that_was_prepared_anew_is_not_loaded_from_an_old_cache(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    first = rows_of(load_prepared(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    write_images(tmp_path / "source" / "boneage-training-dataset", list(first), seed=5)
    prepare(tmp_path / "source", tmp_path / "out")
    second = rows_of(load_prepared(tmp_path / "out"))
    assert np.array_equal(np.asarray(second["1377"]["image"]), np.asarray(picture(1377 + 5)))


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(make_source(folder / "source", 40), folder / "out")
    return folder / "out"


def test_selection_and_calibration_are_the_two_halves_of_validation(prepared: Path) -> None:
    loaded = load_prepared(prepared)
    selection, calibration = (set(load_split(loaded, name)["id"]) for name in ("selection", "calibration"))
    assert selection.isdisjoint(calibration)
    assert selection | calibration == set(load_split(loaded, "validation")["id"])
    assert len(calibration) == len(loaded["validation"]) // 2
    assert all(load_split(loaded, "calibration")["calibration"])


def test_a_split_loads_from_the_folder_as_well(prepared: Path) -> None:
    assert load_split(prepared, "test")["id"][:] == load_prepared(prepared)["test"]["id"][:]


def test_a_misspelt_split_is_corrected(prepared: Path) -> None:
    with pytest.raises(InputError, match=r'no split \'validaton\' \(did you mean "validation"\?\)'):
        load_split(prepared, "validaton")


def test_a_split_that_the_data_set_lacks_is_named(prepared: Path) -> None:
    loaded = load_prepared(prepared)
    del loaded["test"]
    with pytest.raises(InputError, match="has no split test; it has train, validation"):
        load_split(loaded, "test")


def test_an_empty_half_is_refused(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "source", 6), tmp_path / "out")
    assert len(load_split(tmp_path / "out", "selection")) == 1
    with pytest.raises(InputError, match="No row of validation is for calibration"):
        load_split(tmp_path / "out", "calibration")


def test_a_folder_that_was_never_prepared_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `boneage prepare"):
        load_prepared(tmp_path)
    with pytest.raises(InputError, match="run `boneage prepare"):
        load_prepared(tmp_path / "nowhere")


def test_preparing_and_loading_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(make_source(tmp_path / "source"), tmp_path / "out")
    load_split(tmp_path / "out", "calibration")
    assert capfd.readouterr() == ("", "")


# --- phantoms -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "out"
    prepare_phantoms(16, out, seed=1, size=64)
    return out


def test_phantoms_cover_6_to_216_months_and_both_sexes(phantoms: Path) -> None:
    rows = rows_of(load_prepared(phantoms))
    ages = sorted(row["bone_age_months"] for row in rows.values())
    assert len(rows) == 16
    assert np.allclose(ages, np.linspace(6, 216, 16), atol=0.01)
    assert sum(row["sex"] for row in rows.values()) == 8
    assert {row["image"].size for row in rows.values()} == {(64, 64)}


def test_phantoms_carry_their_mark_into_the_data_set(phantoms: Path) -> None:
    from boneage_hf.phantom import is_phantom

    assert is_phantom(stored_bytes(phantoms, "phantom-00003"))


def test_the_card_of_phantoms_says_that_they_are_drawn(phantoms: Path) -> None:
    card = (phantoms / "README.md").read_text(encoding="utf-8")
    assert "Drawn images, not radiographs." in card
    assert "Halabi" not in card
    assert read_manifest(phantoms)["warnings"] == []


def test_phantoms_that_are_there_are_not_drawn_again(phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boneage_hf.phantom

    def draw_again(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(boneage_hf.phantom, "draw", draw_again)
    assert prepare_phantoms(16, phantoms, seed=1, size=64).already_prepared
    with pytest.raises(InputError, match="made with n 16 instead of 17"):
        prepare_phantoms(17, phantoms, seed=1, size=64)


@pytest.mark.parametrize("n", [1, 0, True, 2.0])
def test_a_number_of_phantoms_that_makes_no_data_set_is_refused(tmp_path: Path, n: Any) -> None:
    with pytest.raises(InputError, match="whole number from 2 on"):
        prepare_phantoms(n, tmp_path / "out")


# --- the real tables ------------------------------------------------------------------------------------------------


@pytest.mark.development
def test_the_published_training_table_has_its_published_counts_and_fingerprint(rsna_dir: Path) -> None:
    table = read_challenge(rsna_dir)
    part = CHALLENGE_PARTS[0]
    assert table["problem"].isna().all()
    assert (table["sex"] == "male").sum() == part.male == 6_833
    assert (table["sex"] == "female").sum() == part.female == 5_778
    found = fingerprint(table["id"], table["bone_age_months"].astype(float))
    assert found == part.fingerprints["published"]


#: Rule "reference", seed 2017, all 12,611 rows: every measured result of this project names this test part.
REFERENCE_FINGERPRINTS = {
    "train": "bfe85996c66c9d7137ae82cdc600de31ae85ad65db799c8df6542af45b3c384b",
    "validation": "77faf41b4cebd0c1e1ab237890eefadf3a10e55e9137eab0a6b85fa2dad49eca",
    "calibration": "0814be6c9726e72ddc88f9224e1861af685a9f9cb5a7da5d7a33cd2de3d7e506",
    "test": "abb87207f300674f92502b6ea0646aa3212a13a59ce5afcc3d097f0a4d5f6176",
}


@pytest.mark.development
def test_the_reference_split_of_the_real_training_set_has_not_moved(rsna_dir: Path) -> None:
    table = read_challenge(rsna_dir)
    months = table["bone_age_months"].astype(float).tolist()
    split = reference_split(table["id"].tolist(), months, table["sex"].tolist())
    found = {}
    for name in REFERENCE_FINGERPRINTS:
        rows = [
            row for row, (part, reserved) in enumerate(split) if part == name or (reserved and name == "calibration")
        ]
        found[name] = fingerprint([table["id"][row] for row in rows], [months[row] for row in rows])
    assert found == REFERENCE_FINGERPRINTS
