"""The figures in README and model card are those of the committed evaluation of the packaged weights."""

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints_table import END, START, checkpoints_text, shipped_checkpoints
from benchmarks.measured import MEASURED_CSV, load_measured
from benchmarks.protocol import PROTOCOLS
from benchmarks.results_folder import RESULTS, check_rows, load_result
from boneage_hf.card import render_card
from boneage_hf.errors import InputError
from boneage_hf.hub import DEFAULT_CHECKPOINT, WEIGHTS_LICENCE, checkpoint_revision, load_pipeline

ROOT = Path(__file__).parent.parent


def evaluation_of(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return evaluation_of(DEFAULT_CHECKPOINT)


@pytest.mark.parametrize("checkpoint", shipped_checkpoints(), ids=lambda path: path.name)
def test_the_committed_evaluation_is_of_the_weights_beside_it(checkpoint: Path) -> None:
    assert evaluation_of(checkpoint)["revision"] == checkpoint_revision(load_pipeline(checkpoint))


@pytest.mark.parametrize("checkpoint", shipped_checkpoints(), ids=lambda path: path.name)
def test_the_committed_evaluation_is_on_the_labels_of_its_protocol(checkpoint: Path) -> None:
    measured = evaluation_of(checkpoint)
    assert measured["data_fingerprint"] == PROTOCOLS["reference-test-1024"].ground_truth_fingerprint
    assert (measured["protocol"], measured["n"]) == ("reference-test-1024", 1024)


def test_the_readme_prints_the_measured_error(measured: dict[str, Any]) -> None:
    metrics = measured["metrics"]
    low, high = metrics["mae_months_ci95"]
    row = f"| {metrics['mae_months']:.2f} | {low:.2f} to {high:.2f} | {metrics['rmse_months']:.2f} |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8")
    assert measured["revision"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("checkpoint", "path"),
    [
        *((checkpoint, checkpoint / "README.md") for checkpoint in shipped_checkpoints()),
        (DEFAULT_CHECKPOINT, ROOT / "model_card.md"),
    ],
    ids=lambda path: path.name,
)
def test_the_model_card_is_what_the_command_renders(checkpoint: Path, path: Path) -> None:
    name = "default" if checkpoint == DEFAULT_CHECKPOINT else f"checkpoints/{checkpoint.name}"
    stress = ROOT / "benchmarks" / "results" / f"{checkpoint.name}-stress"
    rendered = render_card(
        str(checkpoint),
        name=name,
        metrics_file=checkpoint / "metrics.json",
        stress_folder=stress if stress.is_dir() else None,
    )
    assert path.read_text(encoding="utf-8") == rendered


def test_the_readme_holds_the_table_of_checkpoints_that_the_command_prints() -> None:
    assert f"{START}\n{checkpoints_text()}\n{END}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("checkpoint", shipped_checkpoints(), ids=lambda path: path.name)
def test_the_benchmark_has_the_measured_row_of_the_weights(checkpoint: Path) -> None:
    measured = evaluation_of(checkpoint)
    with MEASURED_CSV.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["revision"] == measured["revision"]]
    assert [row["predictions_sha256"] for row in rows] == [measured["predictions_sha256"]]
    assert float(rows[0]["mae_months"]) == pytest.approx(measured["metrics"]["mae_months"], abs=0.005)


def test_a_measured_row_may_differ_from_its_run_by_the_rounding_of_both_and_no_more() -> None:
    run = load_result(RESULTS / "default-test-1024")
    (row,) = (row for row in load_measured() if row.predictions_sha256 == run.metrics["predictions_sha256"])
    low, high = run.metrics["metrics"]["median_absolute_error_months_ci95"]

    def moved(by: float) -> Any:
        value = row.values["median_absolute_error_months"][0]
        return dataclasses.replace(
            row, values={**row.values, "median_absolute_error_months": (value, low + by, high - by)}
        )

    check_rows([moved(9e-5)], [run])
    with pytest.raises(InputError, match="median_absolute_error_months is not that of"):
        check_rows([moved(2e-4)], [run])


@pytest.mark.parametrize("checkpoint", shipped_checkpoints(), ids=lambda path: path.name)
def test_weights_have_their_licence_and_no_code_beside_them(checkpoint: Path) -> None:
    assert (checkpoint / "LICENSE").read_bytes() == WEIGHTS_LICENCE.read_bytes()
    assert not list(checkpoint.glob("*.py"))


def test_the_licence_of_the_weights_is_true_of_every_network_that_it_lies_beside() -> None:
    """It once said that all had started from EfficientNet-Lite0, also where they had started from random weights."""
    text = WEIGHTS_LICENCE.read_text(encoding="utf-8")
    assert not re.search(r"efficientnet|lite0|vgg|imagenet|random", text, re.IGNORECASE)
    assert {"config.json", "README.md"} <= set(text.replace("'s", " ").replace(",", " ").split())


@pytest.mark.parametrize("checkpoint", shipped_checkpoints(), ids=lambda path: path.name)
def test_initial_weights_and_teacher_are_named_where_the_licence_says(checkpoint: Path) -> None:
    stage = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["provenance"]
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    while True:
        teacher, initial = stage.get("teacher"), stage["initial_weights"]
        assert teacher is None or f"`{teacher['source']}` (weights `{teacher['revision']}`, licence" in card
        if not initial.get("provenance"):
            break
        stage = initial["provenance"]
    assert f"from `{initial['source']}`" in card
    assert initial["source"] == "random" or f"licence {initial['licence']}" in card


@pytest.mark.parametrize("checkpoint", shipped_checkpoints(), ids=lambda path: path.name)
def test_agreement_and_claim_of_the_committed_evaluation_are_those_of_the_same_predictions(checkpoint: Path) -> None:
    measured, run = evaluation_of(checkpoint), evaluation_of(RESULTS / f"{checkpoint.name}-test-1024")
    assert measured["predictions_sha256"] == run["predictions_sha256"]
    for name in ("bland_altman", "equal_over_age"):
        assert measured[name] == run[name]


@pytest.mark.parametrize("name", ["vgg19-attention", "vgg19-attention-sex"])
def test_the_vgg19_checkpoints_share_one_folded_backbone_and_differ_in_sex(name: str) -> None:
    model = load_pipeline(ROOT / "checkpoints" / name).model
    assert (model.config.backbone, model.config.pooling) == ("vgg19", "attention")
    assert model.config.uses_sex is name.endswith("-sex")
    other = load_pipeline(ROOT / "checkpoints" / "vgg19-attention").model
    for mine, theirs in zip(model.backbone.parameters(), other.backbone.parameters(), strict=True):
        assert mine.equal(theirs)


def test_the_packaged_weights_are_stored_as_float16_within_their_size() -> None:
    assert (DEFAULT_CHECKPOINT / "model.safetensors").stat().st_size < 20_000_000
