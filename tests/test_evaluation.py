"""The prediction loop: it says what the pipeline says, whatever the batches; its files carry what a figure needs."""

import csv
import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from boneage_hf import __version__, evaluation
from boneage_hf.card import render_card
from boneage_hf.cli import main
from boneage_hf.data import FEATURES, fingerprint, load_split, prepare_phantoms, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.evaluation import (
    StorageDifference,
    evaluate_checkpoint,
    float16_difference,
    git_commit,
    package_versions,
    predict_dataset,
    predict_prepared,
    predictions_csv,
    protocol_name,
    write_text,
)
from boneage_hf.hub import checkpoint_revision, load_pipeline, save_checkpoint
from boneage_hf.metrics import error_metrics, match_by_id, over_age
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.prepared import prepare_images
from boneage_hf.splits import REFERENCE_SEED

TINY = str(Path(__file__).parent / "checkpoints" / "tiny")


@pytest.fixture(scope="module", autouse=True)
def one_commit() -> Iterator[None]:
    """The checkout that the tests run in may change between two evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "git_commit", lambda: "0" * 40)
        yield


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(48, folder, size=64, progress=False)
    return folder


@pytest.fixture(scope="module")
def split(phantoms: Path) -> datasets.Dataset:
    """Eight drawn hands."""
    return load_split(phantoms, "validation")


@pytest.fixture(scope="module")
def pipe() -> BoneAgePipeline:
    return load_pipeline(TINY, device="cpu")


@pytest.fixture(scope="module")
def pixels(split: datasets.Dataset, pipe: BoneAgePipeline) -> np.ndarray:
    return prepare_images(split, pipe.image_processor, cache=None, name="test", progress=False).pixels


@pytest.fixture(scope="module")
def table(pipe: BoneAgePipeline, split: datasets.Dataset) -> pd.DataFrame:
    return predict_dataset(pipe, split, progress=False)


@pytest.fixture(scope="module")
def evaluated(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that an evaluation of the validation split wrote, and what it returned."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return out, evaluate_checkpoint(TINY, phantoms, split="validation", out=out, progress=False)


def predict(pipe: BoneAgePipeline, pixels: np.ndarray, sex: np.ndarray, **options: Any) -> np.ndarray:
    return predict_prepared(pipe.model, pipe.image_processor, pixels, sex, **options)


# --- predictions ----------------------------------------------------------------------------------------------------


def test_a_data_set_is_predicted_as_the_pipeline_predicts_its_files_one_by_one(
    pipe: BoneAgePipeline, split: datasets.Dataset, table: pd.DataFrame
) -> None:
    stored = split.cast_column("image", datasets.Image(decode=False))
    alone = [pipe(row["image"]["bytes"], sex=("female", "male")[row["sex"]])["bone_age_months"] for row in stored]
    assert table["predicted_months"].to_numpy() == pytest.approx(np.array(alone), abs=1e-4)
    assert np.ptp(alone) > 0.1  # equal answers would agree whatever was read


def test_a_table_of_predictions_has_the_rows_of_the_split_in_its_order(
    split: datasets.Dataset, table: pd.DataFrame
) -> None:
    assert list(table.columns) == ["id", "predicted_months", "reference_months", "sex"]
    assert list(table["id"]) == list(split["id"])
    assert list(table["reference_months"]) == list(split["bone_age_months"])
    assert list(table["sex"]) == [("female", "male")[code] for code in split["sex"]]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_size_of_the_batches_does_not_change_the_numbers(
    batch_size: int, pipe: BoneAgePipeline, split: datasets.Dataset, table: pd.DataFrame
) -> None:
    other = predict_dataset(pipe, split, batch_size=batch_size, progress=False)
    assert other["predicted_months"].to_numpy() == pytest.approx(table["predicted_months"].to_numpy(), abs=1e-4)


def test_each_image_is_predicted_for_its_own_sex(pipe: BoneAgePipeline, pixels: np.ndarray) -> None:
    sex = np.arange(len(pixels)) % 2
    girls, boys = (predict(pipe, pixels, np.full(len(pixels), code)) for code in (0, 1))
    assert np.abs(girls - boys).min() > 1e-3
    assert predict(pipe, pixels, sex) == pytest.approx(np.where(sex == 0, girls, boys), abs=1e-4)


def test_flip_averaging_is_the_mean_of_both_views(pipe: BoneAgePipeline, pixels: np.ndarray) -> None:
    sex = np.zeros(len(pixels), np.int64)
    one, other = predict(pipe, pixels, sex), predict(pipe, pixels[:, :, ::-1], sex)
    assert np.abs(one - other).max() > 1e-3
    assert predict(pipe, pixels, sex, flip_average=True) == pytest.approx((one + other) / 2, abs=1e-4)


def test_flip_averaging_reaches_the_table(pipe: BoneAgePipeline, split: datasets.Dataset, pixels: np.ndarray) -> None:
    averaged = predict_dataset(pipe, split, flip_average=True, progress=False)["predicted_months"]
    wanted = predict(pipe, pixels, np.asarray(split["sex"]), flip_average=True)
    assert averaged.to_numpy() == pytest.approx(wanted, abs=1e-4)


def test_a_model_left_in_training_mode_is_put_into_evaluation_mode(pipe: BoneAgePipeline, pixels: np.ndarray) -> None:
    sex = np.zeros(len(pixels), np.int64)
    wanted = predict(pipe, pixels, sex)
    pipe.model.train()
    assert np.array_equal(predict(pipe, pixels, sex), wanted)


def test_predictions_are_float32_months_even_of_a_bfloat16_model(pipe: BoneAgePipeline, pixels: np.ndarray) -> None:
    sex = np.zeros(len(pixels), np.int64)
    coarse = BoneAgeModel.from_pretrained(TINY, dtype=torch.bfloat16)
    months = predict_prepared(coarse, pipe.image_processor, pixels, sex)
    assert months.dtype == np.float32
    assert months == pytest.approx(predict(pipe, pixels, sex), abs=3)


def test_no_images_give_no_predictions(pipe: BoneAgePipeline) -> None:
    months = predict(pipe, np.empty((0, 64, 64), np.uint8), np.empty(0, np.int64))
    assert (months.shape, months.dtype) == ((0,), np.float32)


def test_images_of_a_read_only_cache_are_predicted_without_a_warning(
    pipe: BoneAgePipeline, pixels: np.ndarray
) -> None:
    locked = pixels.copy()
    locked.flags.writeable = False
    # torch gives this warning only once in a process; it has to be given each time to be seen here.
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predict(pipe, locked, np.zeros(len(locked), np.int64))
    finally:
        torch.set_warn_always(always)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_empty_split_is_refused(pipe: BoneAgePipeline, split: datasets.Dataset) -> None:
    with pytest.raises(InputError, match="holds no image"):
        predict_dataset(pipe, split.select([]), progress=False)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_no_image_are_refused(batch_size: int, pipe: BoneAgePipeline, split: datasets.Dataset) -> None:
    with pytest.raises(InputError, match=f"batch size must be 1 or more, not {batch_size}"):
        predict_dataset(pipe, split, batch_size=batch_size, progress=False)


def test_an_unreadable_image_is_named_by_its_row(pipe: BoneAgePipeline, split: datasets.Dataset) -> None:
    rows = list(split.cast_column("image", datasets.Image(decode=False)))
    rows[2]["image"]["bytes"] = b"no image"
    with pytest.raises(InputError, match=f"^Image of row {rows[2]['id']}: "):
        predict_dataset(pipe, datasets.Dataset.from_list(rows, features=FEATURES), progress=False)


def test_a_split_that_does_not_exist_is_refused_before_anything_is_written(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'tset'"):
        evaluate_checkpoint(TINY, phantoms, split="tset", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_published_predictions_are_ids_and_months_and_nothing_else(
    evaluated: tuple[Path, dict[str, Any]], phantoms: Path
) -> None:
    lines = (evaluated[0] / "predictions.csv").read_text().splitlines()
    assert lines[0] == "id,predicted_months"
    assert all(re.fullmatch(r"phantom-\d{5},-?\d+\.\d{4}", line) for line in lines[1:])
    assert [line.split(",")[0] for line in lines[1:]] == list(load_split(phantoms, "validation")["id"])


def test_an_id_with_a_comma_stays_one_field() -> None:
    text = predictions_csv(pd.DataFrame({"id": ["a,b", 'c"d'], "predicted_months": [1.0, 123.456789], "sex": "male"}))
    assert list(csv.reader(io.StringIO(text))) == [["id", "predicted_months"], ["a,b", "1.0000"], ['c"d', "123.4568"]]


def test_the_table_for_the_users_own_disk_has_references_and_sex_too(evaluated: tuple[Path, dict[str, Any]]) -> None:
    table = pd.read_csv(evaluated[0] / "table.csv")
    assert list(table.columns) == ["id", "predicted_months", "reference_months", "sex"]
    assert set(table["sex"]) == {"female", "male"}


def test_metrics_json_is_what_the_evaluation_returned(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, summary = evaluated
    assert json.loads((out / "metrics.json").read_text()) == summary


def test_metrics_json_carries_all_that_a_figure_needs(evaluated: tuple[Path, dict[str, Any]]) -> None:
    assert list(evaluated[1]) == [
        *("checkpoint", "revision", "protocol", "split", "n", "flip_average", "metrics", "groups"),
        *("error_over_age", "bland_altman", "equal_over_age", "interval", "data_fingerprint", "predictions_sha256"),
        *("package_version", "commit", "versions", "date"),
    ]


def test_metrics_json_measures_the_table(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, summary = evaluated
    table = pd.read_csv(out / "table.csv")
    assert summary["metrics"] == error_metrics(table["predicted_months"], table["reference_months"])
    for sex in ("female", "male"):
        part = table[table["sex"] == sex]
        (row,) = [row for row in summary["groups"] if row["group"] == sex]
        measured = error_metrics(part["predicted_months"], part["reference_months"])
        assert (row["n"], row["mae_months"]) == (len(part), pytest.approx(measured["mae_months"]))
    assert summary["n"] == len(table)


def test_agreement_and_the_claim_about_all_ages_follow_from_the_published_predictions(
    evaluated: tuple[Path, dict[str, Any]], phantoms: Path
) -> None:
    out, summary = evaluated
    rows = load_split(phantoms, "validation")
    references = pd.DataFrame({"id": rows["id"], "reference_months": rows["bone_age_months"]})
    published = match_by_id(pd.read_csv(out / "predictions.csv", dtype={"id": str}), references)
    assert {name: summary[name] for name in ("bland_altman", "equal_over_age")} == over_age(published)
    assert summary["equal_over_age"]["verdict"].split(" at ")[0] in ("refuted", "not refuted")


def test_metrics_json_names_data_weights_and_predictions(
    evaluated: tuple[Path, dict[str, Any]], phantoms: Path, pipe: BoneAgePipeline
) -> None:
    out, summary = evaluated
    rows = load_split(phantoms, "validation")
    assert summary["data_fingerprint"] == read_manifest(phantoms)["splits"]["validation"]["fingerprint"]
    assert summary["data_fingerprint"] == fingerprint(rows["id"], rows["bone_age_months"])
    assert summary["predictions_sha256"] == hashlib.sha256((out / "predictions.csv").read_bytes()).hexdigest()
    assert summary["revision"] == checkpoint_revision(pipe)
    assert (summary["checkpoint"], summary["split"], summary["flip_average"]) == ("tiny", "validation", False)
    assert (summary["package_version"], summary["commit"]) == (__version__, "0" * 40)


def test_metrics_json_names_no_folder_of_this_computer(evaluated: tuple[Path, dict[str, Any]], phantoms: Path) -> None:
    text = (evaluated[0] / "metrics.json").read_text()
    assert str(Path(TINY).parent) not in text
    assert str(phantoms) not in text


def test_a_second_evaluation_writes_the_same_bytes(
    evaluated: tuple[Path, dict[str, Any]], phantoms: Path, tmp_path: Path
) -> None:
    evaluate_checkpoint(TINY, phantoms, split="validation", out=tmp_path, progress=False)
    plots = ["bland_altman.png", "error_by_age.png", "scatter.png"]
    names = sorted(["metrics.json", "predictions.csv", "table.csv", *plots])
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert sorted(path.name for path in evaluated[0].iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (evaluated[0] / name).read_bytes()


def test_the_command_evaluates_the_calibration_half_with_its_options(
    phantoms: Path, tmp_path: Path, pipe: BoneAgePipeline
) -> None:
    options = ["--split", "calibration", "--out", str(tmp_path), "--batch-size", "2", "--flip-average"]
    assert main(["evaluate", TINY, str(phantoms), *options]) == 0
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary["flip_average"] is True
    table = pd.read_csv(tmp_path / "table.csv")
    wanted = predict_dataset(pipe, load_split(phantoms, "calibration"), flip_average=True, progress=False)
    assert list(table["id"]) == list(wanted["id"])
    assert table["predicted_months"].to_numpy() == pytest.approx(wanted["predicted_months"].to_numpy(), abs=1e-4)


def test_the_command_prints_the_figures_of_the_card(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", TINY, str(phantoms), "--split", "train", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    card = render_card(TINY, name="tiny", metrics_file=tmp_path / "metrics.json")
    section = card.split("## Measured error")[1].split("## Training")[0]
    groups, slopes, claim = section.split("| images |")[1].strip().split("\n\n")[:3]
    for row in groups.splitlines()[2:]:
        name, n, mae, _, bias, _ = (cell.strip() for cell in row.strip("| ").split("|"))
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
        assert re.search(rf"n +{n}  MAE +{mae}\d* .*bias +{re.escape(bias)}", line), line
    for figure in re.findall(r"[+-]\d\.\d{3}", slopes):
        assert figure in printed
    assert claim.split(": ")[1].rstrip(".") in printed


@pytest.mark.parametrize(
    ("kind", "rule", "seed", "name"),
    [
        ("rsna", "reference", REFERENCE_SEED, "reference-test-1024"),
        ("rsna", "reference", 5, "reference-test-1024-seed5"),
        ("rsna", "official", REFERENCE_SEED, "official-test-1024"),
        ("phantom", "reference", REFERENCE_SEED, "phantom-test-1024"),
    ],
)
def test_a_protocol_is_named_after_the_data_and_the_split_rule(kind: str, rule: str, seed: int, name: str) -> None:
    assert protocol_name({"kind": kind, "settings": {"split": rule, "seed": seed}}, "test", 1024) == name


def test_drawn_hands_are_not_reported_as_radiographs(evaluated: tuple[Path, dict[str, Any]]) -> None:
    assert evaluated[1]["protocol"] == f"phantom-validation-{evaluated[1]['n']}"


# --- parts ----------------------------------------------------------------------------------------------------------


def test_a_text_that_cannot_be_written_leaves_the_older_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "metrics.json"
    write_text(target, "old")

    def fail(self: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert target.read_text() == "old"


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "boneage_hf" / "evaluation.py"))
    assert git_commit() is None


def test_versions_are_those_installed() -> None:
    versions = package_versions(("torch", "numpy"))
    assert list(versions) == ["python", "torch", "numpy"]
    assert versions["numpy"] == np.__version__


def test_weights_that_float16_holds_are_stored_without_a_difference(phantoms: Path) -> None:
    pipe = load_pipeline(TINY)
    images = prepare_images(
        load_split(phantoms, "validation"), pipe.image_processor, cache=None, name="validation", progress=False
    )
    difference = float16_difference(pipe.model, pipe.image_processor, images.pixels, images.sex)
    assert (difference.n, difference.mean_months, difference.largest_months) == (len(images), 0.0, 0.0)
    assert difference.allowed


def test_the_storage_difference_is_that_of_a_saved_and_loaded_checkpoint(phantoms: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = load_pipeline(TINY)
    with torch.no_grad():
        for value in pipe.model.parameters():
            value.mul_(1 + 0.003 * torch.rand(()))
    images = prepare_images(
        load_split(phantoms, "validation"), pipe.image_processor, cache=None, name="validation", progress=False
    )
    difference = float16_difference(pipe.model, pipe.image_processor, images.pixels, images.sex)
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "stored")
    stored = load_pipeline(tmp_path / "stored")
    own, other = (
        predict_prepared(one.model, one.image_processor, images.pixels, images.sex) for one in (pipe, stored)
    )
    assert difference.largest_months == pytest.approx(np.abs(own.astype(float) - other.astype(float)).max(), abs=1e-9)
    assert difference.largest_months > 0


@pytest.mark.parametrize(("mean", "largest", "allowed"), [(0.04, 0.5, True), (0.05, 0.1, False), (0.01, 0.51, False)])
def test_a_storage_difference_is_allowed_up_to_its_limits(mean: float, largest: float, allowed: bool) -> None:
    assert StorageDifference(10, mean, largest).allowed == allowed
