"""The commands that write a calibrated checkpoint: by the one prediction loop, with provenance, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from make_tiny_checkpoint import CHECKPOINT, tiny_config, tiny_model, tiny_processor
from safetensors.torch import load_file

from boneage_hf import calibrated_checkpoints, evaluation
from boneage_hf.calibrated_checkpoints import calibrate_checkpoint, fit_interval_of_checkpoint
from boneage_hf.cli import main
from boneage_hf.data import fingerprint, load_prepared, load_split, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.evaluation import evaluate_checkpoint, predict_dataset
from boneage_hf.hub import checkpoint_revision, load_pipeline, save_checkpoint, storage_dtype
from boneage_hf.interval_boneage import fit_interval, fit_interval_shape
from boneage_hf.metrics import coverage_metrics, format_coverage
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.prepared import PreparedImages
from boneage_hf.recipes import Recipe
from boneage_hf.training import build_model

TINY = str(CHECKPOINT)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn hands: 51 for selection, 50 for calibration, 499 others."""
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(600, folder, size=64, progress=False)
    return folder


@pytest.fixture(scope="module")
def with_interval(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "checkpoint"
    fit_interval_of_checkpoint(TINY, phantoms, folder, progress=False)
    return folder


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the loop's predictions be references with an error of 5 months, read too low by what is given."""

    def install(low: float, tilt: float = 0.0) -> None:
        def predict(pipe: Any, rows: Any, **options: Any) -> pd.DataFrame:
            table = predict_dataset(pipe, rows, progress=False)
            rng = np.random.default_rng(len(table))
            months = table["reference_months"] * (1 - tilt) - low + rng.normal(0, 5, len(table))
            correction = pipe.model.config.age_correction
            if correction is not None:
                months = months + np.interp(months, correction["knots_months"], correction["offsets_months"])
            return table.assign(predicted_months=months)

        monkeypatch.setattr(calibrated_checkpoints, "predict_dataset", predict)

    return install


def provenance_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["provenance"]


# --- fit-interval ---------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_two_halves_of_validation(with_interval: Path, phantoms: Path) -> None:
    pipe = load_pipeline(TINY, device="cpu")
    halves = [
        predict_dataset(pipe, load_split(phantoms, name), progress=False) for name in ("selection", "calibration")
    ]
    columns = [(half["predicted_months"], half["reference_months"]) for half in halves]
    wanted = fit_interval(*columns[1], shape=fit_interval_shape(*columns[0]))
    found = load_pipeline(with_interval, device="cpu").model.config.interval
    assert found == wanted


def test_months_and_weights_stay_as_they_were(with_interval: Path, phantoms: Path) -> None:
    old, new = load_file(CHECKPOINT / WEIGHTS), load_file(with_interval / WEIGHTS)
    assert {name: value.dtype for name, value in old.items()} == {name: value.dtype for name, value in new.items()}
    assert all(torch.equal(old[name], new[name]) for name in old)
    rows = load_split(phantoms, "test")
    plain, fitted = (
        predict_dataset(load_pipeline(folder, device="cpu"), rows, progress=False) for folder in (TINY, with_interval)
    )
    assert plain["predicted_months"].tolist() == fitted["predicted_months"].tolist()


def test_the_provenance_names_labels_number_and_level(with_interval: Path, phantoms: Path) -> None:
    provenance = provenance_of(with_interval)
    rows = load_split(phantoms, "calibration")
    assert provenance["interval"]["fingerprint"] == fingerprint(rows["id"], rows["bone_age_months"])
    assert (provenance["interval"]["n"], provenance["interval"]["alpha"]) == (len(rows), 0.1)
    assert provenance["interval"]["base_revision"] == checkpoint_revision(load_pipeline(TINY))
    assert provenance["initial_weights"] == {"source": "random"}  # what was there before is there still


def test_an_interval_for_averaged_flips_makes_the_checkpoint_average_them(
    with_interval: Path, phantoms: Path, tmp_path: Path
) -> None:
    fit_interval_of_checkpoint(TINY, phantoms, tmp_path / "out", flip_average=True, progress=False)
    pipe, single = load_pipeline(str(tmp_path / "out"), device="cpu"), load_pipeline(str(with_interval), device="cpu")
    assert pipe.model.config.flip_average
    assert provenance_of(tmp_path / "out")["interval"]["flip_average"] is True
    assert pipe.model.config.interval != single.model.config.interval
    wanted = predict_dataset(single, load_split(phantoms, "test"), flip_average=True, progress=False)
    found = predict_dataset(pipe, load_split(phantoms, "test"), progress=False)
    assert found["predicted_months"].tolist() == pytest.approx(wanted["predicted_months"].tolist(), abs=1e-4)
    assert not single.model.config.flip_average


def test_another_interval_is_another_revision(with_interval: Path) -> None:
    pipe = load_pipeline(with_interval, device="cpu")
    fitted = checkpoint_revision(pipe)
    pipe.model.config.interval = None
    assert checkpoint_revision(pipe) == checkpoint_revision(load_pipeline(TINY)) != fitted


def test_an_evaluation_measures_the_coverage_of_the_interval(
    with_interval: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["evaluate", str(with_interval), str(phantoms), "--split", "test", "--out", str(out)]) == 0
    table, summary = pd.read_csv(out / "table.csv"), json.loads((out / "metrics.json").read_text())
    assert list(table.columns)[-2:] == ["interval_low_months", "interval_high_months"]
    assert summary["interval"] == coverage_metrics(table)
    assert set(summary["interval"]["by_sex"]) == {"female", "male"}
    assert format_coverage(summary["interval"]) in capsys.readouterr().out
    assert (out / "predictions.csv").read_text().splitlines()[0] == "id,predicted_months"


def test_the_table_and_the_pipeline_give_the_same_interval(with_interval: Path, phantoms: Path) -> None:
    pipe = load_pipeline(with_interval, device="cpu")
    rows = load_split(phantoms, "test").select(range(4))
    table = predict_dataset(pipe, rows, progress=False)
    answers = [pipe(row["image"], sex=("female", "male")[row["sex"]]) for row in rows]
    ends = np.array([answer["interval_months"] for answer in answers])
    np.testing.assert_allclose(ends, table[["interval_low_months", "interval_high_months"]], rtol=0, atol=1e-3)
    frame = pd.DataFrame({"image": [row["image"] for row in rows], "sex": [answer["sex"] for answer in answers]})
    np.testing.assert_allclose(
        pipe.predict_table(frame)[["interval_low_months", "interval_high_months"]], ends, rtol=0, atol=1e-3
    )


def test_a_model_without_interval_has_no_coverage(phantoms: Path, tmp_path: Path) -> None:
    assert evaluate_checkpoint(TINY, phantoms, split="test", out=tmp_path, progress=False)["interval"] is None


def test_a_correction_that_wins_is_kept_and_its_gain_is_told(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: Callable[..., None]
) -> None:
    monkeypatch.setattr("boneage_hf.calibration._MIN_CORRECTION_IMAGES", 30)
    readings(low=15.0)
    fitted = fit_interval_of_checkpoint(TINY, phantoms, tmp_path / "out", correct_age=True, progress=False)
    config: Any = load_pipeline(tmp_path / "out").model.config
    assert fitted.age_correction is not None
    assert config.age_correction == fitted.age_correction.correction
    assert np.mean(config.age_correction["offsets_months"]) == pytest.approx(15, abs=4)
    assert fitted.mean_width_months < 40  # of corrected months: an error of 15 would need 40 at least
    assert config.provenance["interval"]["age_correction"]["kept"] is True
    assert "kept" in str(fitted)
    with pytest.raises(InputError, match="has a correction over age already"):
        fit_interval_of_checkpoint(str(tmp_path / "out"), phantoms, tmp_path / "more", correct_age=True)


def test_a_correction_that_does_not_win_is_left_out_and_that_is_told(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: Callable[..., None]
) -> None:
    monkeypatch.setattr("boneage_hf.calibration._MIN_CORRECTION_IMAGES", 30)
    readings(low=0.0)
    fitted = fit_interval_of_checkpoint(TINY, phantoms, tmp_path / "out", correct_age=True, progress=False)
    assert load_pipeline(tmp_path / "out").model.config.age_correction is None
    assert provenance_of(tmp_path / "out")["interval"]["age_correction"]["kept"] is False
    assert "nothing gained" in str(fitted)


def test_a_data_set_that_is_split_otherwise_is_refused(phantoms: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    model = BoneAgeModel.from_pretrained(CHECKPOINT)
    model.config.provenance = {"selection_fingerprint": "0" * 64}
    save_checkpoint(model, tiny_processor(), trained)
    with pytest.raises(InputError, match="split otherwise"):
        fit_interval_of_checkpoint(str(trained), phantoms, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_too_few_calibration_images_are_refused_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_phantoms(48, tmp_path / "few", size=64, progress=False)
    assert main(["fit-interval", TINY, str(tmp_path / "few"), str(tmp_path / "out")]) == 2
    assert "error: A 90 % interval needs at least 9 images in each third" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- where it is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [fit_interval_of_checkpoint, calibrate_checkpoint])
def test_a_checkpoint_is_not_written_over_itself_or_over_something_else(
    write: Any, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*arguments: Any, **options: Any) -> None:
        raise AssertionError("predicted before the output was looked at")

    monkeypatch.setattr(calibrated_checkpoints, "predict_dataset", too_late)
    with pytest.raises(InputError, match="is the checkpoint itself"):
        write(TINY, phantoms, CHECKPOINT.parent / "." / "tiny")
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds something else"):
        write(TINY, phantoms, tmp_path)


def test_licence_and_travelling_code_of_a_checkpoint_come_along(
    phantoms: Path, tmp_path: Path, readings: Callable[..., None]
) -> None:
    readings(low=0.0)
    source, out = tmp_path / "source", tmp_path / "out"
    model = BoneAgeModel.from_pretrained(CHECKPOINT)
    model.config.provenance = {"data": {"kind": "rsna"}}
    save_checkpoint(model, tiny_processor(), source, with_code=True)
    fit_interval_of_checkpoint(str(source), phantoms, out, progress=False)
    assert (out / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in source.iterdir()}
    assert {"interval_boneage.py", "correction_boneage.py"} <= names


def test_weights_that_are_more_than_float16_stay_float32(tmp_path: Path) -> None:
    assert storage_dtype(BoneAgeModel.from_pretrained(CHECKPOINT)) == torch.float16
    fine = tiny_model()  # drawn in float32
    assert storage_dtype(fine) == torch.float32


# --- calibrate ------------------------------------------------------------------------------------------------------


def test_a_places_offset_ends_in_a_new_checkpoint_and_in_its_answers(
    phantoms: Path, tmp_path: Path, readings: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    readings(low=9.0)
    out = tmp_path / "out"
    assert main(["calibrate", TINY, str(phantoms), str(out), "--split", "selection"]) == 0
    printed = capsys.readouterr().out
    config: Any = load_pipeline(out).model.config
    offsets = config.local_calibration["offsets_months"]
    assert offsets == pytest.approx([9, 9], abs=3)
    assert config.interval["edges_months"] == []
    rows = load_split(phantoms, "selection")
    provenance = config.provenance["local_calibration"]
    assert provenance["fingerprint"] == fingerprint(rows["id"], rows["bone_age_months"])
    assert provenance["n"] == len(rows) == sum(provenance["n_by_sex"].values())
    assert f"{len(rows)} images: " in printed
    assert "slope: not fitted, that takes 100 images" in printed
    assert "true coverage is only known to lie between" in printed

    monthly = load_split(phantoms, "test")
    before, after = (
        evaluation.predict_dataset(load_pipeline(folder, device="cpu"), monthly, progress=False)
        for folder in (TINY, out)
    )
    wanted = before["predicted_months"] + np.where(before["sex"] == "female", *offsets)
    np.testing.assert_allclose(after["predicted_months"], wanted, rtol=0, atol=1e-3)


def test_all_images_are_used_unless_a_split_is_named(
    phantoms: Path, tmp_path: Path, readings: Callable[..., None]
) -> None:
    readings(low=0.0, tilt=0.2)
    calibrated = calibrate_checkpoint(TINY, phantoms, tmp_path / "out", progress=False)
    assert calibrated.fit.n == sum(len(rows) for rows in load_prepared(phantoms).values()) == 600
    assert calibrated.fit.slope_used
    assert "): used" in str(calibrated)


@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_the_offsets_that_are_printed_and_recorded_are_those_of_the_config(
    tilt: float, phantoms: Path, tmp_path: Path, readings: Callable[..., None]
) -> None:
    readings(low=9.0, tilt=tilt)
    calibrated = calibrate_checkpoint(TINY, phantoms, tmp_path / "out", progress=False)
    config: Any = load_pipeline(tmp_path / "out").model.config
    female, male = config.local_calibration["offsets_months"]
    recorded = config.provenance["local_calibration"]
    assert recorded["offsets_months"] == {"female": female, "male": male}
    assert recorded["used"] == {"offsets": True, "slope": tilt > 0}
    assert recorded["measured_offsets_months"] == calibrated.fit.measured_offsets_months
    centre = f" at a prediction of {config.local_calibration['centre_months']:.1f} months" if tilt else ""
    for name, offset in (("female", female), ("male", male)):
        measured = recorded["measured_offsets_months"][name]
        assert f"offset {name}: {offset:+.2f} months{centre} (measured {measured:+.2f}, " in str(calibrated)


def test_nothing_gained_is_said_and_the_months_stay(
    phantoms: Path, tmp_path: Path, readings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings(low=0.0)
    calibrated = calibrate_checkpoint(TINY, phantoms, tmp_path / "out", progress=False)
    if calibrated.fit.calibration is not None:
        pytest.fail("the drawn errors have an offset; choose another seed")
    config = load_pipeline(tmp_path / "out").model.config
    assert config.local_calibration is None
    assert config.interval == calibrated.fit.interval
    assert "nothing was gained: the months stay as they are" in str(calibrated)
    with pytest.raises(InputError, match="calibrated on local images already"):
        calibrate_checkpoint(str(tmp_path / "out"), phantoms, tmp_path / "more")
    with pytest.raises(InputError, match="calibrated on local images already"):
        fit_interval_of_checkpoint(str(tmp_path / "out"), phantoms, tmp_path / "more")


def test_too_few_images_are_refused_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_phantoms(48, tmp_path / "few", size=64, progress=False)
    assert main(["calibrate", TINY, str(tmp_path / "few"), str(tmp_path / "out")]) == 2
    assert "at least 50 labelled images, not 48" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_of_the_training_are_refused(phantoms: Path, tmp_path: Path) -> None:
    rows = load_split(phantoms, "train")
    config = tiny_config()
    config.provenance = {"train_fingerprint": fingerprint(rows["id"], rows["bone_age_months"])}
    save_checkpoint(BoneAgeModel(config), tiny_processor(), tmp_path / "trained")
    with pytest.raises(InputError, match="trained on"):
        calibrate_checkpoint(str(tmp_path / "trained"), phantoms, tmp_path / "out", progress=False)


@pytest.mark.parametrize("through", [(), ("initial_weights",), ("teacher",), ("initial_weights", "teacher")])
@pytest.mark.parametrize(
    ("split", "field", "use"),
    [
        ("train", "train_fingerprint", "trained on"),
        ("selection", "selection_fingerprint", "chosen by"),
        ("selection", "spread_fingerprint", "fitted to"),
        ("calibration", "fingerprint", "fitted to"),
    ],
)
def test_images_that_had_a_part_in_the_checkpoint_or_what_it_comes_from_are_refused(
    split: str,
    field: str,
    use: str,
    through: tuple[str, ...],
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_late(*arguments: Any, **options: Any) -> None:
        raise AssertionError("predicted before the images were looked at")

    monkeypatch.setattr(calibrated_checkpoints, "predict_dataset", too_late)
    rows = load_split(phantoms, split)
    labels = fingerprint(rows["id"], rows["bone_age_months"])
    own = field in ("train_fingerprint", "selection_fingerprint")
    provenance: dict[str, Any] = {field: labels} if own else {"interval": {field: labels}}
    for step in reversed(through):
        provenance = {step: {"source": "earlier", "provenance": provenance}, "train_fingerprint": "0" * 64}
    config = tiny_config()
    config.provenance = provenance
    save_checkpoint(BoneAgeModel(config), tiny_processor(), tmp_path / "seen")
    whole = "train" if split == "train" else "validation"
    for name in (split, whole, None):  # alone, in the half of a split, and among all images
        with pytest.raises(
            InputError, match=f"split {name or whole} holds the images that .* {use}, .*: calibrate on"
        ):
            calibrate_checkpoint(str(tmp_path / "seen"), phantoms, tmp_path / "out", split=name, progress=False)
    assert not (tmp_path / "out").exists()


def test_images_that_had_no_part_in_the_checkpoint_are_taken(
    phantoms: Path, tmp_path: Path, readings: Callable[..., None]
) -> None:
    readings(low=9.0)
    rows = load_split(phantoms, "selection")
    config = tiny_config()
    config.provenance = {
        "train_fingerprint": "0" * 64,
        "selection_fingerprint": fingerprint(rows["id"], rows["bone_age_months"]),
        "initial_weights": {"source": "random", "revision": None},
    }
    save_checkpoint(BoneAgeModel(config), tiny_processor(), tmp_path / "trained")
    calibrated = calibrate_checkpoint(
        str(tmp_path / "trained"), phantoms, tmp_path / "out", split="train", progress=False
    )
    assert calibrated.fit.n == len(load_split(phantoms, "train"))


# --- training goes on -----------------------------------------------------------------------------------------------


def test_a_training_from_a_calibrated_checkpoint_drops_what_was_fitted_to_its_answers(with_interval: Path) -> None:
    months = np.array([50.0, 90.0, 130.0, 170.0], np.float32)
    images = PreparedImages(np.zeros((4, 64, 64), np.uint8), np.zeros(4, np.int64), months, tuple("abcd"))
    recipe = Recipe(backbone="tiny", image_size=64, sex_input="embedding")
    model, initial = build_model(recipe, initial_weights=str(with_interval), train=images)
    assert model.config.interval is None
    assert initial["provenance"]["interval"]["n"] == 50
