import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import protocol as protocols
from benchmarks.measured import COLUMNS, MEASURES, MeasuredResult, add_measured_row, load_measured
from boneage_hf.errors import InputError
from boneage_hf.metrics import MEASURES as MEASURES_OF_THE_PACKAGE
from boneage_hf.metrics import error_metrics

DECIMAL = protocols.get_protocol("rsna-test-200-decimal")


def metrics_json(*, spread: float = 10.0, **changes: Any) -> dict[str, Any]:
    """What `boneage evaluate` writes, with errors of simulated readings."""
    generator = np.random.default_rng(0)
    reference = generator.uniform(20, 220, size=200)
    predicted = reference + generator.normal(1, spread, size=200)
    content: dict[str, Any] = {
        "checkpoint": "example/bone-age",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "protocol": "rsna-test-200-decimal",
        "split": "test",
        "n": 200,
        "metrics": error_metrics(predicted, reference, n_resamples=50),
        "data_fingerprint": DECIMAL.ground_truth_fingerprint,
        "predictions_sha256": "b" * 64,
        "package_version": "0.1.0",
        "commit": None,
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "flip_average": False,
        "date": "2026-01-31T12:00:00+00:00",
    }
    return content | changes


def test_the_table_has_every_measure_of_the_package() -> None:
    assert tuple(MEASURES) == MEASURES_OF_THE_PACKAGE


def test_an_added_row_is_read_back_with_its_numbers(tmp_path: Path) -> None:
    source, table = tmp_path / "metrics.json", tmp_path / "results" / "measured.csv"
    content = metrics_json()
    source.write_text(json.dumps(content), encoding="utf-8")
    added, replaced = add_measured_row(source, system="Example", path=table)
    assert not replaced
    (row,) = load_measured(table)
    assert (row.system, row.checkpoint, row.protocol, row.n) == ("Example", "example/bone-age", DECIMAL.name, 200)
    assert (row.status, row.commit, row.flip_average, row.date) == ("measured", "", False, content["date"])
    assert json.loads(row.versions) == content["versions"]
    for key in MEASURES:
        expected = [content["metrics"][key], *content["metrics"][f"{key}_ci95"]]
        assert list(row.values[key]) == pytest.approx(expected, abs=1e-4), key
    assert dataclasses.replace(added, values=row.values) == row


def test_the_same_system_under_the_same_protocol_is_replaced(tmp_path: Path) -> None:
    table = tmp_path / "measured.csv"
    add_measured_row(metrics_json(), system="Example", path=table)
    add_measured_row(metrics_json(), system="Other", path=table)
    _, replaced = add_measured_row(metrics_json(spread=5.0), system="Example", path=table)
    assert replaced
    rows = {row.system: row for row in load_measured(table)}
    assert set(rows) == {"Example", "Other"}
    assert (rows["Example"].values["mae_months"][0] or 0) < (rows["Other"].values["mae_months"][0] or 0)


def test_an_undefined_r2_is_an_empty_cell_and_stays_undefined(tmp_path: Path) -> None:
    content = metrics_json()
    content["metrics"] |= {"r2": None, "r2_ci95": [None, None]}
    add_measured_row(content, system="Example", path=tmp_path / "measured.csv")
    (row,) = load_measured(tmp_path / "measured.csv")
    assert row.values["r2"] == (None, None, None)


def test_a_table_that_does_not_exist_has_no_rows(tmp_path: Path) -> None:
    assert load_measured(tmp_path / "measured.csv") == ()


def with_measure(key: str, value: object) -> dict[str, Any]:
    content = metrics_json()
    content["metrics"][key] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (metrics_json(protocol="rsna-test-200-decimals"), 'did you mean "rsna-test-200-decimal"?'),
        (metrics_json(n=199), "metrics.json says n is 199 and 200"),
        (metrics_json(protocol="rsna-val-1425"), "n is 200, rsna-val-1425 has 1425 images"),
        (metrics_json(protocol="rsna-test-200-integer"), "the labels have the fingerprint 6804a6b6e661..."),
        (metrics_json(split="calibration"), 'the split "calibration" was used to make the checkpoint'),
        (metrics_json(split="train"), 'the split "train" was used to make the checkpoint'),
        (metrics_json(checkpoint="/data/run7/checkpoint"), "give its public name with --checkpoint"),
        (metrics_json(checkpoint="./run7"), "give its public name with --checkpoint"),
        (metrics_json(predictions_sha256="b" * 63), "predictions_sha256 is no sha256"),
        (metrics_json(predictions_sha256=None), "has no predictions_sha256"),
        (metrics_json(flip_average=None), "does not say flip_average true or false"),
        (metrics_json(metrics=None), "has no metrics"),
        (metrics_json(versions="2.13"), "versions that are no table"),
        (metrics_json(date="yesterday"), 'date is "yesterday"'),
        (with_measure("mae_months", 99.0), "|bias| <= MAE <= RMSE does not hold"),
        (with_measure("mae_months", None), "mae_months is missing"),
        (with_measure("mae_months", float("nan")), 'mae_months is "nan"; it must be a finite number'),
        (with_measure("mse_months2", 1.0), "the MSE is not the square of the RMSE"),
        (with_measure("within_6_months", 0.99), "do not rise from 0 to 1"),
        (with_measure("bias_months_ci95", [3.0, 1.0]), "the interval of bias_months has no order"),
        (with_measure("bias_months_ci95", None), "lacks bias_months or bias_months_ci95"),
    ],
)
def test_an_unusable_evaluation_is_refused_and_the_table_stays(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    table = tmp_path / "measured.csv"
    add_measured_row(metrics_json(), system="Example", path=table)
    before = table.read_bytes()
    with pytest.raises(InputError, match=re.escape(message)):
        add_measured_row(content, system="Example", path=table)
    assert table.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["measured.csv"]


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("n = 200", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        add_measured_row(tmp_path / "metrics.json", system="Example", path=tmp_path / "measured.csv")


def test_a_public_name_replaces_the_directory_of_a_checkpoint(tmp_path: Path) -> None:
    content = metrics_json(checkpoint="/data/run7/checkpoint")
    row, _ = add_measured_row(content, system="A", checkpoint="example/bone-age", path=tmp_path / "measured.csv")
    assert row.checkpoint == "example/bone-age"


def test_a_broken_measured_row_is_refused_by_name(tmp_path: Path) -> None:
    table = tmp_path / "measured.csv"
    add_measured_row(metrics_json(), system="Example", path=table)
    table.write_text(table.read_text(encoding="utf-8").replace(",measured\n", ",confirmed\n"), encoding="utf-8")
    with pytest.raises(InputError, match=r'measured\.csv line 2 \(Example, rsna-test-200-decimal\): status is "conf'):
        load_measured(table)


def test_a_measured_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "measured.csv"
    add_measured_row(metrics_json(), system="Example", path=table)
    header, row = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([header, row, row]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 3 \(Example, .* is there twice"):
        load_measured(table)


def row_of(system: str, mae_spread: float, folder: Path, **changes: Any) -> MeasuredResult:
    content = metrics_json(spread=mae_spread, **changes)
    row, _ = add_measured_row(content, system=system, path=folder / "measured.csv")
    return row


def test_a_fingerprint_of_the_ground_truth_of_its_own_goes_before_that_of_the_data(tmp_path: Path) -> None:
    row = row_of(
        "A", 9.0, tmp_path, data_fingerprint="a" * 64, ground_truth_fingerprint=DECIMAL.ground_truth_fingerprint
    )
    assert (row.data_fingerprint, row.same_ground_truth) == ("a" * 64, True)


def test_a_protocol_named_by_hand_is_still_held_against_the_fingerprint(tmp_path: Path) -> None:
    content, table = metrics_json(protocol="reference-test-200"), tmp_path / "measured.csv"
    row, _ = add_measured_row(content, system="A", protocol=DECIMAL.name, path=table)
    assert row.same_ground_truth
    with pytest.raises(InputError, match="the labels have the fingerprint"):
        add_measured_row(content, system="A", protocol="rsna-test-200-integer", path=table)


def test_a_row_of_a_protocol_whose_labels_are_not_known_cannot_be_ranked(tmp_path: Path) -> None:
    assert not row_of("A", 9.0, tmp_path, protocol="rsna-test-200").same_ground_truth


def test_the_columns_that_readers_of_the_table_rely_on_exist() -> None:
    needed = {"system", "checkpoint", "mae_months", "mae_low", "mae_high", "rmse_months", "rmse_low", "mse_months2"}
    assert needed <= set(COLUMNS)
    assert len(set(COLUMNS)) == len(COLUMNS)


def test_a_share_is_kept_with_the_digits_that_a_percentage_with_one_decimal_needs(tmp_path: Path) -> None:
    content = metrics_json()
    content["metrics"]["within_12_months_ci95"] = [0.5, 0.5615234375]
    add_measured_row(content, system="Example", path=tmp_path / "measured.csv")
    (row,) = load_measured(tmp_path / "measured.csv")
    assert f"{100 * (row.values['within_12_months'][2] or 0):.1f}" == "56.2"
