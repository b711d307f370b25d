import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress

from boneage_hf import metrics
from boneage_hf.errors import InputError
from boneage_hf.metrics import (
    MEASURES,
    MISSING,
    bands_clearly_worse,
    bland_altman,
    by_group,
    coverage_metrics,
    equal_over_groups,
    error_metrics,
    error_over_age,
    format_coverage,
    format_groups,
    format_metrics,
    format_over_age,
    match_by_id,
    over_age,
    permutation_p_text,
    rare_ages,
)

PREDICTED = [100.0, 130.0, 66.0, 183.0, 30.0]
REFERENCE = [106.0, 120.0, 60.0, 180.0, 54.0]


def measures_by_plain_loop(predicted: list[float], reference: list[float]) -> dict[str, float | None]:
    """The formulas once more, one image at a time and without numpy."""
    errors = [p - r for p, r in zip(predicted, reference, strict=True)]
    n = len(errors)
    bias = sum(errors) / n
    mse = sum(e * e for e in errors) / n
    centre = sum(reference) / n
    total = sum((r - centre) ** 2 for r in reference)
    constant = len(set(reference)) == 1
    return {
        "mae_months": sum(abs(e) for e in errors) / n,
        "rmse_months": math.sqrt(mse),
        "mse_months2": mse,
        "median_absolute_error_months": statistics.median(abs(e) for e in errors),
        "mean_absolute_deviation_about_bias_months": sum(abs(e - bias) for e in errors) / n,
        "bias_months": bias,
        "r2": None if constant else 1 - n * mse / total,
        "within_6_months": sum(abs(e) <= 6 for e in errors) / n,
        "within_12_months": sum(abs(e) <= 12 for e in errors) / n,
        "within_24_months": sum(abs(e) <= 24 for e in errors) / n,
    }


def percentile_by_plain_loop(values: list[float], share: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def test_the_measures_of_five_images_are_those_worked_out_by_hand() -> None:
    found = error_metrics(PREDICTED, REFERENCE, n_resamples=0)
    # errors: -6, 10, 6, 3, -24; bias -2.2; deviations 3.8, 12.2, 8.2, 5.2, 21.8
    assert found["n"] == 5
    assert found["mae_months"] == pytest.approx(9.8)
    assert found["mse_months2"] == pytest.approx(151.4)
    assert found["rmse_months"] == pytest.approx(12.304471)
    assert found["median_absolute_error_months"] == 6
    assert found["bias_months"] == pytest.approx(-2.2)
    assert found["mean_absolute_deviation_about_bias_months"] == pytest.approx(10.24)
    assert found["r2"] == pytest.approx(1 - 757 / 10472)
    assert (found["within_6_months"], found["within_12_months"], found["within_24_months"]) == (0.6, 0.8, 1.0)


def test_the_vectorised_measures_and_intervals_equal_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    reference = generator.integers(5, 38, size=23) * 6.0
    predicted = reference + generator.normal(3, 11, size=23)
    found = error_metrics(predicted, reference, n_resamples=150, seed=7)

    expected = measures_by_plain_loop(predicted.tolist(), reference.tolist())
    draws = np.random.default_rng(7)
    samples = []
    for _ in range(150):
        drawn = draws.integers(0, 23, size=23)
        samples.append(measures_by_plain_loop(predicted[drawn].tolist(), reference[drawn].tolist()))
    for key in MEASURES:
        assert found[key] == pytest.approx(expected[key]), key
        values = [sample[key] for sample in samples]
        defined = [value for value in values if value is not None]
        ends = [percentile_by_plain_loop(defined, 0.025), percentile_by_plain_loop(defined, 0.975)]
        assert found[f"{key}_ci95"] == pytest.approx(ends), key


def test_the_intervals_do_not_depend_on_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = error_metrics(PREDICTED, REFERENCE, n_resamples=101)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 35)
    assert error_metrics(PREDICTED, REFERENCE, n_resamples=101) == whole


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    generator = np.random.default_rng(0)
    reference = generator.uniform(20, 220, size=60)
    predicted = reference + generator.normal(0, 10, size=60)
    first = error_metrics(predicted, reference, n_resamples=200, seed=1)
    assert error_metrics(predicted, reference, n_resamples=200, seed=1) == first
    assert error_metrics(predicted, reference, n_resamples=200, seed=2)["mae_months_ci95"] != first["mae_months_ci95"]


def test_the_interval_of_the_mae_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(11)
    truth = 10 * math.sqrt(2 / math.pi)
    covered = 0
    for repeat in range(200):
        reference = generator.uniform(20, 220, size=100)
        predicted = reference + generator.normal(0, 10, size=100)
        low, high = error_metrics(predicted, reference, n_resamples=200, seed=repeat)["mae_months_ci95"]
        covered += low <= truth <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_prediction_and_reference_are_resampled_together() -> None:
    reference = np.arange(24.0, 204.0, 6)
    found = error_metrics(reference + 5, reference, n_resamples=50)
    assert found["mae_months_ci95"] == [5.0, 5.0]
    assert found["mean_absolute_deviation_about_bias_months_ci95"] == [0.0, 0.0]


def test_the_result_is_plain_json() -> None:
    found = error_metrics(np.array(PREDICTED, dtype=np.float32), np.array(REFERENCE), n_resamples=10)
    assert json.loads(json.dumps(found)) == found


def test_one_image_has_measures_but_neither_r2_nor_intervals() -> None:
    found = error_metrics([100.0], [110.0])
    assert (found["mae_months"], found["bias_months"], found["r2"]) == (10.0, -10.0, None)
    assert all(found[f"{key}_ci95"] == [None, None] for key in MEASURES)


def test_constant_references_have_no_r2() -> None:
    # 0.1 + 0.2 style sums make the variance of equal floats slightly positive.
    found = error_metrics([100.3, 99.0, 102.0], [100.1, 100.1, 100.1], n_resamples=20)
    assert found["r2"] is None
    assert found["r2_ci95"] == [None, None]
    assert found["mae_months_ci95"][0] is not None


def test_bootstrap_samples_of_one_repeated_image_are_left_out_of_the_interval_of_r2() -> None:
    found = error_metrics([100.0, 131.0], [106.0, 129.0], n_resamples=100)
    assert found["r2_ci95"] == pytest.approx([found["r2"], found["r2"]])


def test_missing_values_are_printed_as_an_en_dash() -> None:
    lines = {line.split()[0]: line for line in format_metrics(error_metrics([100.0], [110.0])).splitlines()}
    assert lines["r2"].split()[1:] == [MISSING]
    assert lines["mae_months"].split()[1:] == ["10.00"]
    assert lines["within_12_months"].split()[1:] == ["100.0", "%"]
    assert format_metrics({"n": 3}).count(MISSING) == len(MEASURES)


@pytest.mark.parametrize(
    ("predicted", "reference", "message"),
    [
        ([], [], "there are no predictions; give at least one image"),
        ([100.0, 90.0], [100.0], "2 predictions but 1 references; give one of each"),
        ([100.0, math.nan], [100.0, 90.0], "1 of 2 predictions are NaN or infinite; find out why"),
        ([100.0, 90.0], [math.inf, 90.0], "1 of 2 references are NaN or infinite"),
        (["a"], [100.0], "the predictions are not all numbers"),
        ([None, 90.0], [100.0, 90.0], "NaN or infinite"),
        ([[100.0], [90.0]], [100.0, 90.0], r"the predictions have shape \(2, 1\); flatten them"),
        ([10.0, 11.5], [120.0, 139.0], "look like years .* multiply them by 12"),
    ],
)
def test_unusable_input_is_refused_with_its_cure(predicted: Any, reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        error_metrics(predicted, reference)


def test_a_bad_but_real_prediction_in_months_is_not_taken_for_years() -> None:
    assert error_metrics([20.0], [40.0])["mae_months"] == 20.0
    assert error_metrics([0.0, 0.0], [120.0, 130.0])["mae_months"] == 125.0


def test_one_odd_prediction_does_not_hide_that_the_others_are_years() -> None:
    with pytest.raises(InputError, match="look like years"):
        error_metrics([10.0, 11.5, 100.0], [120.0, 139.0, 96.0])


def test_ages_of_infants_are_not_taken_for_years() -> None:
    assert error_metrics([10.0, 12.0], [11.0, 14.0])["mae_months"] == 1.5


def test_a_negative_number_of_resamples_is_refused() -> None:
    with pytest.raises(InputError, match="n_resamples is -1"):
        error_metrics(PREDICTED, REFERENCE, n_resamples=-1)


def test_groups_are_measured_by_sex_and_by_band_of_the_reference_age() -> None:
    sex = ["female", "male", "female", "male", "male"]
    table = by_group(PREDICTED, REFERENCE, sex=sex, n_resamples=20)
    assert list(table["grouping"].unique()) == ["all", "sex", "age_band_months"]
    counts = dict(zip(table["group"], table["n"], strict=True))
    assert counts == {
        "all": 5,
        "female": 2,
        "male": 3,
        "48-72": 2,
        "96-120": 1,
        "120-144": 1,
        "168-192": 1,
    }
    rows = table.set_index("group")
    male = error_metrics([130.0, 183.0, 30.0], [120.0, 180.0, 54.0], n_resamples=20)
    assert rows.loc["male", "mae_months"] == male["mae_months"]
    assert [rows.loc["male", "rmse_months_low"], rows.loc["male", "rmse_months_high"]] == male["rmse_months_ci95"]
    assert rows["r2"].isna()["96-120"]
    assert rows.loc["48-72", "bias_months"] == -9.0
    assert set(table.columns[3:]) == {f"{key}{end}" for key in MEASURES for end in ("", "_low", "_high")}


def test_the_last_age_band_includes_240_months() -> None:
    table = by_group([230.0, 230.0, 210.0], [216.0, 240.0, 215.9], n_resamples=0)
    assert dict(zip(table["group"], table["n"], strict=True)) == {"all": 3, "192-216": 1, "216-240": 2}


def test_without_sex_there_are_no_rows_by_sex() -> None:
    assert "sex" not in set(by_group(PREDICTED, REFERENCE, n_resamples=0)["grouping"])


@pytest.mark.parametrize(
    ("sex", "message"),
    [
        (["female"], "5 images but 1 sexes"),
        (["female", "F", "male", "male", "male"], 'exactly "female" or "male", not F'),
    ],
)
def test_groups_with_unusable_sex_are_refused(sex: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        by_group(PREDICTED, REFERENCE, sex=sex)


def test_tables_are_matched_by_id_in_the_order_of_the_references() -> None:
    predictions = pd.DataFrame({"id": ["3", "1", "2"], "predicted_months": [30.0, 10.0, 20.0]})
    references = pd.DataFrame({"id": [1, 2, 3], "reference_months": [11.0, 21.0, 31.0], "sex": ["male"] * 3})
    matched = match_by_id(predictions, references)
    assert list(matched["id"]) == ["1", "2", "3"]
    assert list(matched["predicted_months"]) == [10.0, 20.0, 30.0]
    assert list(matched["sex"]) == ["male"] * 3


@pytest.mark.parametrize(
    ("predicted_ids", "reference_ids", "message"),
    [
        (["1"], ["1", "2"], r"1 of 2 images have no prediction \(2\); predict them too"),
        (["1", "9"], ["1"], r"1 predictions have no reference \(9\); take them out"),
        (["1", "1"], ["1"], "the table of predictions repeats the id 1"),
        (["1"], ["1", "1"], "the table of references repeats the id 1"),
    ],
)
def test_ids_that_do_not_pair_are_refused(predicted_ids: list[str], reference_ids: list[str], message: str) -> None:
    predictions = pd.DataFrame({"id": predicted_ids, "predicted_months": 100.0})
    references = pd.DataFrame({"id": reference_ids, "reference_months": 100.0})
    with pytest.raises(InputError, match=message):
        match_by_id(predictions, references)


def test_a_table_without_its_column_is_refused() -> None:
    with pytest.raises(InputError, match="predictions lacks the column predicted_months"):
        match_by_id(pd.DataFrame({"id": ["1"]}), pd.DataFrame({"id": ["1"], "reference_months": [1.0]}))


def test_importing_the_metrics_does_not_import_evaluate_or_torch() -> None:
    code = "import sys, boneage_hf.metrics; print(sorted({'evaluate', 'torch'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def bone_age_error(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("evaluate")
    from boneage_hf.evaluate_metric import BoneAgeMetric

    return BoneAgeMetric(cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def test_the_evaluate_metric_returns_the_same_numbers(bone_age_error: Any) -> None:
    found = bone_age_error.compute(predictions=PREDICTED, references=REFERENCE, n_resamples=30, seed=5)
    assert found == error_metrics(PREDICTED, REFERENCE, n_resamples=30, seed=5)


def test_the_evaluate_metric_takes_batches(bone_age_error: Any) -> None:
    bone_age_error.add_batch(predictions=PREDICTED[:2], references=REFERENCE[:2])
    bone_age_error.add_batch(predictions=PREDICTED[2:], references=REFERENCE[2:])
    assert bone_age_error.compute() == error_metrics(PREDICTED, REFERENCE)


def test_the_evaluate_metric_works_on_after_refusing_years(bone_age_error: Any) -> None:
    with pytest.raises(InputError, match="multiply them by 12"):
        bone_age_error.compute(predictions=[10.0, 11.5], references=[120.0, 139.0])
    assert bone_age_error.compute(predictions=[110.0], references=[120.0])["mae_months"] == 10.0


def test_every_measure_is_defined_in_the_help_of_the_evaluate_metric(bone_age_error: Any) -> None:
    text = str(type(bone_age_error).__doc__)
    assert all(f"{key} " in text or f"{key}, " in text for key in MEASURES)


# --- intervals ------------------------------------------------------------------------------------------------------


def interval_table(n: int = 300, *, seed: int = 0, half: float = 10.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    reference = rng.uniform(10, 220, n)
    predicted = reference + rng.normal(0, 6, n)
    return pd.DataFrame(
        {
            "predicted_months": predicted,
            "reference_months": reference,
            "sex": rng.choice(["female", "male"], n),
            "interval_low_months": np.maximum(predicted - half, 0),
            "interval_high_months": predicted + half * (1 + predicted / 200),
        }
    )


def slow_coverage(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One group, by the text of the docstring; the exact interval by bisection on binomial tails."""
    n = len(rows)
    covered = sum(row["interval_low_months"] <= row["reference_months"] <= row["interval_high_months"] for row in rows)

    def tail(p: float, hits: range) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in hits)

    def solve(rises: Callable[[float], float]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rises(middle) < 0 else (low, middle)
        return low

    ends = [
        0.0 if covered == 0 else solve(lambda p: tail(p, range(covered, n + 1)) - 0.025),
        1.0 if covered == n else solve(lambda p: 0.025 - tail(p, range(covered + 1))),
    ]
    widths = [row["interval_high_months"] - row["interval_low_months"] for row in rows]
    return {
        "n": n,
        "covered": covered,
        "coverage": covered / n,
        "coverage_ci95": pytest.approx(ends, abs=1e-6),
        "mean_width_months": pytest.approx(sum(widths) / n),
        "median_width_months": pytest.approx(float(np.median(widths))),
    }


def test_the_coverage_of_every_group_equals_a_plain_count() -> None:
    table = interval_table(90)
    found = coverage_metrics(table)
    rows: list[dict[str, Any]] = [dict(zip(table.columns, row, strict=True)) for row in table.to_numpy().tolist()]
    assert found["all"] == slow_coverage(rows)
    for sex in ("female", "male"):
        assert found["by_sex"][sex] == slow_coverage([row for row in rows if row["sex"] == sex])
    for key, column in (
        ("by_predicted_tercile", "predicted_months"),
        ("by_reference_tercile", "reference_months"),
    ):
        ordered = sorted(rows, key=lambda row: row[column])
        for name, part in zip(("lowest", "middle", "highest"), (0, 1, 2), strict=True):
            assert found[key][name] == slow_coverage(ordered[30 * part : 30 * (part + 1)])


def test_a_reference_on_the_end_of_an_interval_is_covered() -> None:
    table = pd.DataFrame(
        {"predicted_months": [5.0, 5.0], "reference_months": [2.0, 8.0], "interval_low_months": [2.0, 2.0]}
    ).assign(interval_high_months=8.0)
    found = coverage_metrics(table)
    assert (found["all"]["covered"], found["all"]["mean_width_months"]) == (2, 6.0)
    assert "by_sex" not in found


def test_coverage_is_plain_numbers() -> None:
    found = coverage_metrics(interval_table())
    assert json.loads(json.dumps(found)) == found


def test_a_table_without_intervals_is_refused_coverage() -> None:
    with pytest.raises(InputError, match="interval_high_months"):
        coverage_metrics(interval_table().drop(columns="interval_high_months"))


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [("interval_low_months", 1e4, "end before they begin"), ("interval_high_months", math.nan, "NaN or infinite")],
)
def test_an_interval_that_is_none_is_refused(column: str, value: float, sentence: str) -> None:
    table = interval_table()
    table.loc[3, column] = value
    with pytest.raises(InputError, match=sentence):
        coverage_metrics(table)


def test_every_group_has_a_line_with_coverage_and_width() -> None:
    table = interval_table()
    lines = format_coverage(coverage_metrics(table)).splitlines()
    assert [line.split("  n ")[0].strip() for line in lines] == [
        *("all", "female", "male"),
        *(
            f"{third} third, {what}"
            for what in ("predicted", "reference")
            for third in ("lowest", "middle", "highest")
        ),
    ]
    covered = (table.interval_low_months <= table.reference_months) & (
        table.reference_months <= table.interval_high_months
    )
    assert f"{100 * covered.mean():.1f} %" in lines[0]
    assert f"{(table.interval_high_months - table.interval_low_months).mean():.1f} months" in lines[0]


# --- the error over age ---------------------------------------------------------------------------------------------


def test_the_slopes_equal_those_of_a_library() -> None:
    table = interval_table()
    found = error_over_age(table.predicted_months, table.reference_months, n_resamples=0)
    errors = table.predicted_months - table.reference_months
    for name in ("reference", "predicted"):
        assert found[f"slope_over_{name}"] == pytest.approx(linregress(table[f"{name}_months"], errors).slope)
        assert found[f"slope_over_{name}_ci95"] == [None, None]


def test_regression_to_the_mean_is_seen_over_the_reference_with_its_interval() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(127, 40, 600)
    found = error_over_age(127 + 0.85 * (reference - 127) + rng.normal(0, 6, 600), reference)
    assert found["slope_over_reference"] == pytest.approx(-0.15, abs=0.03)
    low, high = found["slope_over_reference_ci95"]
    assert low < -0.15 < high < -0.1


def test_noise_of_the_reference_alone_makes_no_slope_over_the_prediction() -> None:
    rng = np.random.default_rng(2)
    best = rng.normal(127, 30, 2000)
    found = error_over_age(best, best + rng.normal(0, 10, 2000), n_resamples=500)
    assert found["slope_over_reference"] < -0.05
    low, high = found["slope_over_predicted_ci95"]
    assert low < 0 < high


def test_a_constant_age_has_no_slope() -> None:
    found = error_over_age([100.0, 100.0, 100.0], [90.0, 95.0, 110.0])
    assert (found["slope_over_predicted"], found["slope_over_predicted_ci95"]) == (None, [None, None])
    assert found["slope_over_reference"] == pytest.approx(-1.0)


# --- agreement, and the claim about all ages ------------------------------------------------------------------------


def drawn_errors(n: int, *, scale: float = 10.0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, n)


def test_equality_over_groups_is_exact_on_few_images() -> None:
    errors, groups = np.array([1.0, 2, 9, 10, 11.5, 3]), ["a", "a", "b", "b", "b", "a"]
    absolute = np.abs(errors)

    def between(labels: list[str]) -> float:
        found = 0.0
        for name in ("a", "b"):
            members = [value for value, label in zip(absolute, labels, strict=True) if label == name]
            found += len(members) * (sum(members) / len(members) - absolute.mean()) ** 2
        return found

    everyone = [between(list(labels)) for labels in itertools.permutations(groups)]
    exact = np.mean([value >= between(groups) - 1e-9 for value in everyone])
    found = equal_over_groups(errors, groups, permutations=4000, seed=0)
    assert found.p_value == pytest.approx(exact, abs=0.02)
    assert found.groups == {"a": (3, pytest.approx(2.0)), "b": (3, pytest.approx(30.5 / 3))}
    assert found.spread_months == pytest.approx(30.5 / 3 - 2)


def test_equal_groups_are_called_unequal_no_more_often_than_the_level_allows() -> None:
    groups = ["0-24"] * 5 + ["24-48"] * 30 + ["48-72"] * 15
    called = [equal_over_groups(drawn_errors(50, seed=s), groups, permutations=99).p_value <= 0.05 for s in range(200)]
    assert np.mean(called) <= 0.09


def test_groups_of_unequal_error_are_found() -> None:
    errors = np.concatenate([drawn_errors(60, scale=5), drawn_errors(60, scale=15, seed=2)])
    assert equal_over_groups(errors, ["young"] * 60 + ["old"] * 60, permutations=500).p_value < 0.01


def test_one_group_and_a_group_too_many_are_refused() -> None:
    with pytest.raises(InputError, match="two groups"):
        equal_over_groups([1.0, 2.0], ["a", "a"])
    with pytest.raises(InputError, match="one per image"):
        equal_over_groups([1.0, 2.0], ["a"])
    with pytest.raises(InputError, match="permutations is 0"):
        equal_over_groups([1.0, 2.0], ["a", "b"], permutations=0)
    with pytest.raises(InputError, match="NaN"):
        equal_over_groups([1.0, math.nan], ["a", "b"])


def test_the_claim_over_age_puts_every_image_into_its_band() -> None:
    reference = np.array([10.0, 23.9, 24.0, 60.0, 239.0, 240.0])
    late = np.array([1.0, 3, 5, 7, 9, 11])
    matched = pd.DataFrame({"reference_months": reference, "predicted_months": reference + late})
    claim = over_age(matched)["equal_over_age"]
    assert claim["bands"] == {
        "0-24": {"n": 2, "mae_months": pytest.approx(2)},
        "24-48": {"n": 1, "mae_months": pytest.approx(5)},
        "48-72": {"n": 1, "mae_months": pytest.approx(7)},
        "216-240": {"n": 2, "mae_months": pytest.approx(10)},
    }
    assert claim["spread_months"] == pytest.approx(8)


def test_one_image_has_no_limits_of_agreement_and_no_bands_to_compare() -> None:
    one = pd.DataFrame({"reference_months": [100.0], "predicted_months": [90.0]})
    assert over_age(one) == {"bland_altman": None, "equal_over_age": None}


def test_the_claim_over_age_is_refuted_only_where_the_bands_differ() -> None:
    reference = np.repeat([12.0, 60.0, 130.0, 200.0], 40)
    alike, unlike = drawn_errors(160), drawn_errors(160) * np.repeat([1, 1, 1, 4], 40)
    verdicts = [
        over_age(pd.DataFrame({"reference_months": reference, "predicted_months": reference + errors}))[
            "equal_over_age"
        ]["verdict"]
        for errors in (alike, unlike)
    ]
    assert verdicts == ["not refuted at n = 160", "refuted"]


def test_limits_of_agreement_are_those_worked_out_by_hand() -> None:
    found = bland_altman([101.0, 104.0, 100.0, 107.0], [100.0, 100.0, 100.0, 100.0])
    # differences 1, 4, 0, 7: mean 3, variance 30 / 3; the 97.5 % quantile of Student's t with 3 degrees is 3.182446
    assert (found["bias_months"], found["sd_months"]) == (3.0, pytest.approx(math.sqrt(10)))
    assert found["lower_limit_months"] == pytest.approx(3 - 1.96 * math.sqrt(10))
    assert found["upper_limit_months"] == pytest.approx(3 + 1.96 * math.sqrt(10))
    assert found["bias_margin_months"] == pytest.approx(3.182446 * math.sqrt(10 / 4))
    assert found["limit_margin_months"] == pytest.approx(3.182446 * math.sqrt(10 * 3 / 4))


@pytest.mark.parametrize(
    ("predicted", "message"), [([100.0], "2 references"), ([], "no predictions"), ([math.nan, 1.0], "NaN")]
)
def test_limits_of_agreement_of_what_does_not_pair_are_refused(predicted: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bland_altman(predicted, [100.0, 90.0])


def test_limits_of_agreement_need_two_images() -> None:
    with pytest.raises(InputError, match="two images or more"):
        bland_altman([100.0], [90.0])


def grouped(predicted: np.ndarray, reference: np.ndarray, *, n_resamples: int = 200) -> list[dict[str, Any]]:
    """Groups as `metrics.json` holds them."""
    table = by_group(predicted, reference, sex=["female"] * len(reference), n_resamples=n_resamples)
    return [
        {str(key): value for key, value in row.items()}
        for row in table.astype(object).where(table.notna(), None).to_dict(orient="records")
    ]


def test_the_error_at_both_ends_of_the_age_range_is_that_of_their_images() -> None:
    reference = np.array([10.0, 23.0, 30.0, 47.9, 48.0, 191.9, 192.0, 215.0, 240.0])
    late = np.array([1.0, 2, 4, 9, 50, 60, 5, 6, 10])
    ends = rare_ages(grouped(reference + late, reference))
    assert ends == {"under 48 months": (4, pytest.approx(4)), "192 months and over": (3, pytest.approx(7))}


def test_an_end_of_the_age_range_without_images_has_no_error() -> None:
    reference = np.array([100.0, 110.0, 200.0])
    groups = grouped(reference + 3, reference)
    assert rare_ages(groups) == {"under 48 months": (0, None), "192 months and over": (1, pytest.approx(3))}
    assert f"under 48 months      n     0  MAE     {MISSING}" in format_groups(groups)


def test_only_bands_whose_whole_interval_lies_above_the_overall_error_are_called_worse() -> None:
    reference = np.repeat([60.0, 130.0, 200.0, 220.0], [40, 40, 40, 1])
    errors = np.concatenate([np.full(40, 5.0), np.tile([1.0, 23], 20), np.full(40, 20.0), [90.0]])
    groups = grouped(reference + errors, reference)
    overall = groups[0]["mae_months"]
    # 120-144 is above on average, by chance; the one image of 216-240 has no interval
    assert [row["mae_months"] > overall for row in groups[2:]] == [False, False, True, True]
    assert [row["group"] for row in bands_clearly_worse(groups)] == ["192-216"]


def test_every_group_has_a_line_with_error_and_bias() -> None:
    reference = np.array([20.0, 60.0, 61.0, 200.0])
    lines = format_groups(grouped(reference + np.array([3.0, -6, -2, -9]), reference)).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("all", "female", "0-24 months", "48-72 months", "192-216 months"),
        *("under 48 months", "192 months and over", "bands clearly worse than all images: none"),
    ]
    assert "n     2  MAE  4.00  95 % [2.00, 6.00]" in lines[3]
    assert "bias  -4.00  95 % [-6.00, -2.00]" in lines[3]
    assert lines[2].split("  ")[-1] == MISSING


def test_the_dependence_on_age_is_printed_with_slope_limits_and_verdict() -> None:
    table = interval_table()
    summary = {
        "error_over_age": error_over_age(table.predicted_months, table.reference_months, n_resamples=50),
        **over_age(table),
    }
    lines = format_over_age(summary).splitlines()
    slope, (low, high) = (summary["error_over_age"][f"slope_over_predicted{end}"] for end in ("", "_ci95"))
    assert lines[1] == (
        f"slope of the error over the predicted age, months per month: {slope:+.3f}  95 % [{low:+.3f}, {high:+.3f}]"
    )
    limits, claim = summary["bland_altman"], summary["equal_over_age"]
    assert f"{limits['lower_limit_months']:+.1f} to {limits['upper_limit_months']:+.1f} months" in lines[2]
    assert lines[3].startswith(f'"equally good over the whole age range": {claim["verdict"]} (permutation test')
    assert f"p {permutation_p_text(claim)}" in lines[3]


def test_what_was_not_measured_over_age_is_said() -> None:
    lines = format_over_age({}).splitlines()
    assert [line.split(": ")[-1] for line in lines] == [MISSING, MISSING, MISSING, "not measured"]
