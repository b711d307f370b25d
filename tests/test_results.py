"""The figures in README and model card are those of the committed evaluation of the packaged weights."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints_table import END, START, checkpoints_text
from benchmarks.measured import MEASURED_CSV
from benchmarks.protocol import PROTOCOLS
from boneage_hf.card import render_card
from boneage_hf.hub import DEFAULT_CHECKPOINT, WEIGHTS_LICENCE, checkpoint_revision, load_pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEFAULT_CHECKPOINT / "metrics.json").read_text(encoding="utf-8"))
    return content


def test_the_committed_evaluation_is_of_the_packaged_weights(measured: dict[str, Any]) -> None:
    assert measured["revision"] == checkpoint_revision(load_pipeline())


def test_the_committed_evaluation_is_on_the_labels_of_its_protocol(measured: dict[str, Any]) -> None:
    assert measured["data_fingerprint"] == PROTOCOLS["reference-test-1024"].ground_truth_fingerprint
    assert (measured["protocol"], measured["n"]) == ("reference-test-1024", 1024)


def test_the_readme_prints_the_measured_error(measured: dict[str, Any]) -> None:
    metrics = measured["metrics"]
    low, high = metrics["mae_months_ci95"]
    row = f"| {metrics['mae_months']:.2f} | {low:.2f} to {high:.2f} | {metrics['rmse_months']:.2f} |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8")
    assert measured["revision"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [ROOT / "model_card.md", DEFAULT_CHECKPOINT / "README.md"], ids=["top", "package"])
def test_the_model_card_is_what_the_command_renders(path: Path) -> None:
    rendered = render_card(
        "default",
        name="default",
        metrics_file=DEFAULT_CHECKPOINT / "metrics.json",
        stress_folder=ROOT / "benchmarks" / "results" / "default-stress",
    )
    assert path.read_text(encoding="utf-8") == rendered


def test_the_readme_holds_the_table_of_checkpoints_that_the_command_prints() -> None:
    assert f"{START}\n{checkpoints_text()}\n{END}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_benchmark_has_the_measured_row_of_the_packaged_weights(measured: dict[str, Any]) -> None:
    with MEASURED_CSV.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["revision"] == measured["revision"]]
    assert [row["predictions_sha256"] for row in rows] == [measured["predictions_sha256"]]
    assert float(rows[0]["mae_months"]) == pytest.approx(measured["metrics"]["mae_months"], abs=0.005)


def test_the_packaged_weights_have_their_licence_and_no_code_beside_them() -> None:
    assert WEIGHTS_LICENCE.is_file()
    assert not list(DEFAULT_CHECKPOINT.glob("*.py"))


def test_the_packaged_weights_are_stored_as_float16_within_their_size() -> None:
    assert (DEFAULT_CHECKPOINT / "model.safetensors").stat().st_size < 20_000_000
