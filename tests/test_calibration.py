"""Fits that are taken over only where they help on images that they were not fitted to."""

from typing import Any

import numpy as np
import pytest

from boneage_hf.calibration import (
    FOLDS,
    LocalCalibrationFit,
    apply_age_correction,
    coverage_given_calibration,
    cross_validation,
    fit_age_correction,
    fit_local_calibration,
    folds,
    shrunken_offsets,
)
from boneage_hf.correction_boneage import check_age_correction, check_local_calibration
from boneage_hf.errors import InputError
from boneage_hf.interval_boneage import check_interval, interval_months


def calibrated(n: int, seed: int, *, noise: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that nothing can correct: the reference is the prediction and noise."""
    rng = np.random.default_rng(seed)
    predicted = np.clip(rng.normal(127, 41, n), 10, 225)
    return predicted, predicted + rng.normal(0, noise, n)


def bent(predicted: np.ndarray) -> np.ndarray:
    """A reader who pulls both ends to the middle."""
    return predicted + 0.12 * (predicted - 127) + 2


SEXES = ["female", "male"]


def local_fit(
    n: int = 120,
    seed: int = 0,
    *,
    female: float = 6.0,
    male: float = 6.0,
    slope: float = 1.0,
    uses_sex: bool = True,
    shape: dict[str, Any] | None = None,
) -> LocalCalibrationFit:
    predicted, reference = calibrated(n, seed)
    sex = [SEXES[index % 2] for index in range(n)]
    reference = reference + np.where(np.array(sex) == "female", female, male) + (slope - 1) * (predicted - 127)
    return fit_local_calibration(predicted, reference, sex=sex, uses_sex=uses_sex, shape=shape)


# --- cross-validation -----------------------------------------------------------------------------------------------


def test_the_gain_is_the_mean_difference_of_absolute_errors_with_its_standard_error() -> None:
    gained = cross_validation(np.array([1.0, 5.0, 3.0]), np.array([2.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert (gained.mae_before_months, gained.mae_after_months) == pytest.approx((5 / 3, 1 / 3))
    assert gained.gain_months == pytest.approx(4 / 3)
    assert gained.gain_se_months == pytest.approx(np.std([1, 3, 0], ddof=1) / np.sqrt(3))


def test_every_image_is_left_out_once_and_the_sexes_are_dealt_out_evenly() -> None:
    group = np.array([0] * 25 + [1] * 60)
    fold = folds(85, group=group)
    for index in range(FOLDS):
        assert (fold[group == 0] == index).sum() in (2, 3)
        assert (fold[group == 1] == index).sum() == 6


# --- over age -------------------------------------------------------------------------------------------------------


def test_a_bent_scale_is_straightened() -> None:
    predicted, reference = calibrated(600, 0)
    fit = fit_age_correction(predicted, bent(reference))
    assert fit.correction is not None
    assert fit.gained.wins
    check_age_correction(fit.correction)
    others, truth = calibrated(2000, 1)
    after = np.abs(apply_age_correction(others, fit.correction) - bent(truth)).mean()
    before = np.abs(others - bent(truth)).mean()
    assert after < before - 0.5
    assert after == pytest.approx(fit.gained.mae_after_months, abs=0.6)
    assert before == pytest.approx(fit.gained.mae_before_months, abs=0.6)


def test_where_nothing_can_be_gained_the_correction_is_refused() -> None:
    fits = [fit_age_correction(*calibrated(300, seed)) for seed in range(4)]
    assert sum(fit.correction is not None for fit in fits) <= 1
    assert all(fit.gained.gain_months < 0.15 for fit in fits)


def test_a_correction_keeps_half_of_every_difference_whatever_it_is_fitted_to() -> None:
    rng = np.random.default_rng(2)
    predicted = rng.uniform(20, 200, 300)
    fit = fit_age_correction(predicted, 300 - predicted + rng.normal(0, 2, 300))  # turned round
    assert fit.correction is not None
    ages = np.linspace(0, 230, 2301)
    steps = np.diff(apply_age_correction(ages, fit.correction)) / 0.1
    assert steps.min() > 0.5 - 1e-3


def test_a_few_gross_labels_do_not_move_a_correction() -> None:
    predicted, reference = calibrated(400, 3)
    wrong = bent(reference)
    wrong[:8] = predicted[:8] + 150
    clean, spoilt = fit_age_correction(predicted, bent(reference)), fit_age_correction(predicted, wrong)
    assert clean.correction is not None
    assert spoilt.correction is not None
    ages = np.array([60.0, 127.0, 190.0])
    moved = apply_age_correction(ages, spoilt.correction) - apply_age_correction(ages, clean.correction)
    assert np.abs(moved).max() < 2  # a mean would move by 3


def test_a_correction_is_the_same_every_time() -> None:
    predicted, reference = calibrated(200, 4)
    assert fit_age_correction(predicted, bent(reference)) == fit_age_correction(predicted, bent(reference))


def test_few_images_are_refused_a_correction() -> None:
    with pytest.raises(InputError, match="at least 100 images, not 99"):
        fit_age_correction(*calibrated(99, 0))


# --- offsets --------------------------------------------------------------------------------------------------------


def test_offsets_are_shrunk_by_the_formula() -> None:
    rng = np.random.default_rng(5)
    group = np.repeat([0, 1], [30, 50])
    differences = rng.normal(np.where(group == 0, 6.0, 1.0), 7.0)
    first, second = differences[group == 0], differences[group == 1]
    d1, d2 = first.mean(), second.mean()
    s2 = (((first - d1) ** 2).sum() + ((second - d2) ** 2).sum()) / 78
    v1, v2 = s2 / 30, s2 / 50
    tau2 = max(0.0, ((d1 - d2) ** 2 - v1 - v2) / 2)
    mu = (d1 / (tau2 + v1) + d2 / (tau2 + v2)) / (1 / (tau2 + v1) + 1 / (tau2 + v2))
    found = shrunken_offsets(differences, group)
    assert tau2 > 0
    assert found.measured_months == pytest.approx([d1, d2])
    assert found.common_months == pytest.approx(mu)
    assert found.offsets_months == pytest.approx(
        [mu + tau2 / (tau2 + v1) * (d1 - mu), mu + tau2 / (tau2 + v2) * (d2 - mu)]
    )


def test_a_shrunken_offset_lies_between_the_measured_and_the_common_one() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        group = np.repeat([0, 1], [25, 25])
        found = shrunken_offsets(rng.normal(group * 2.0, 8.0), group)
        for measured, offset in zip(found.measured_months, found.offsets_months, strict=True):
            assert min(measured, found.common_months) <= offset + 1e-9
            assert offset - 1e-9 <= max(measured, found.common_months)


def test_sexes_that_differ_by_chance_share_one_offset() -> None:
    found = shrunken_offsets(np.array([1.0, 9.0, 5.0, 2.0, 9.0, 5.5]), np.array([0, 0, 0, 1, 1, 1]))
    assert found.kept == [0.0, 0.0]
    assert found.offsets_months == pytest.approx([found.common_months] * 2)


def test_shrinking_is_nearer_to_the_truth_than_measuring_when_sexes_hardly_differ() -> None:
    rng = np.random.default_rng(7)
    group = np.repeat([0, 1], [25, 25])
    truth = np.array([4.0, 3.0])
    raw, shrunk = [], []
    for _ in range(400):
        found = shrunken_offsets(rng.normal(truth[group], 8.0), group)
        raw.append(np.square(np.array(found.measured_months) - truth).mean())
        shrunk.append(np.square(np.array(found.offsets_months) - truth).mean())
    assert np.mean(shrunk) < 0.85 * np.mean(raw)


# --- a local calibration --------------------------------------------------------------------------------------------


def test_a_places_own_offset_is_found_and_what_it_gains_is_said() -> None:
    fit = local_fit()
    assert fit.calibration is not None
    check_local_calibration(fit.calibration, uses_sex=True)
    assert fit.calibration["offsets_months"] == pytest.approx([6, 6], abs=2)
    assert fit.calibration["slope"] == 1.0
    assert fit.offset_gained.gain_months > 1
    assert fit.n_by_sex == {"female": 60, "male": 60}


def test_sexes_that_differ_get_offsets_of_their_own() -> None:
    fit = local_fit(female=12.0, male=-2.0)
    assert fit.calibration is not None
    assert fit.calibration["offsets_months"] == pytest.approx([12, -2], abs=3)
    assert min(fit.kept_difference.values()) > 0.8


def test_a_model_without_sex_gets_one_offset() -> None:
    fit = local_fit(uses_sex=False, female=6.0, male=5.0)
    assert fit.calibration is not None
    check_local_calibration(fit.calibration, uses_sex=False)
    assert list(fit.offsets_months) == ["all"]


def test_a_calibration_that_gains_nothing_is_not_used() -> None:
    fits = [local_fit(60, seed, female=0.0, male=0.0) for seed in range(20)]
    idle = [fit for fit in fits if fit.calibration is None]
    assert len(idle) >= 12
    assert all(fit.offset_gained.gain_months <= 0 for fit in idle)
    assert all(fit.interval["quantiles"][0] > 0 for fit in idle)


def test_a_slope_is_used_where_it_wins() -> None:
    fit = local_fit(200, slope=1.25)
    assert fit.slope_used
    assert fit.calibration is not None
    assert fit.calibration["slope"] == pytest.approx(1.25, abs=0.05)
    assert sum(local_fit(200, seed).slope_used for seed in range(12)) <= 3


@pytest.mark.parametrize("slope", [1.0, 1.3])
def test_the_offsets_that_are_told_are_those_that_are_used(slope: float) -> None:
    rng = np.random.default_rng(0)
    sex = ["female"] * 60 + ["male"] * 60
    # Beside a slope, sexes of different age have other offsets than without it.
    predicted = np.concatenate([rng.normal(90, 25, 60), rng.normal(150, 25, 60)])
    reference = 124 + slope * (predicted - 120) + rng.normal(0, 6, 120)
    fit = fit_local_calibration(predicted, reference, sex=sex, uses_sex=True, shape=None)
    assert fit.calibration is not None
    assert fit.slope_used == (slope != 1.0)
    used = fit.calibration["offsets_months"]
    assert list(fit.offsets_months.values()) == used
    answers = fit.calibration["centre_months"] + fit.calibration["slope"] * (
        predicted - fit.calibration["centre_months"]
    )
    left = reference - answers
    measured = fit.measured_offsets_months
    assert list(measured.values()) == pytest.approx([left[:60].mean(), left[60:].mean()])
    common = fit.common_offset_months
    assert used == pytest.approx([common + fit.kept_difference[name] * (measured[name] - common) for name in SEXES])


def test_a_slope_that_is_not_used_leaves_differences_as_they_are() -> None:
    fits = [local_fit(120, seed) for seed in range(6)]
    idle = [fit for fit in fits if not fit.slope_used]
    assert idle
    assert all(fit.calibration is not None and fit.calibration["slope"] == 1.0 for fit in idle)


def test_a_slope_takes_100_images() -> None:
    assert (local_fit(99, slope=1.25).slope, local_fit(99, slope=1.25).slope_gained) == (None, None)
    assert local_fit(100, slope=1.25).slope == pytest.approx(1.25, abs=0.1)


def test_an_offset_between_the_sexes_is_not_taken_for_a_slope() -> None:
    predicted, reference = calibrated(200, 8)
    sex = np.where(predicted > np.median(predicted), "male", "female")
    shifted = reference + np.where(sex == "male", 10.0, -10.0)
    fit = fit_local_calibration(predicted, shifted, sex=list(sex), uses_sex=True, shape=None)
    assert fit.slope == pytest.approx(1.0, abs=0.08)


def test_the_interval_of_a_calibration_covers_other_images_of_the_place() -> None:
    shares = []
    for seed in range(40):
        fit = local_fit(80, seed, shape={"knots_months": [60.0, 180.0], "spread_months": [6.0, 7.0]})
        check_interval(fit.interval)
        assert fit.calibration is not None
        predicted, reference = calibrated(500, 1000 + seed)
        # Every offset was 6 and no slope is fitted to 80 images.
        low, high = interval_months(predicted + np.mean(fit.calibration["offsets_months"]), fit.interval)
        shares.append(((low <= reference + 6) & (reference + 6 <= high)).mean())
    # The standard deviation of one share is about 0.033, from Beta(73, 8).
    assert np.mean(shares) == pytest.approx(0.9, abs=0.02)
    low_end, high_end = coverage_given_calibration(80, 0.1)
    assert np.mean([low_end <= share <= high_end for share in shares]) >= 0.85


def test_the_interval_takes_the_spread_of_the_models_own() -> None:
    shape = {"knots_months": [60.0, 180.0], "spread_months": [6.0, 7.0]}
    assert local_fit(shape=shape).interval["spread_months"] == [6.0, 7.0]
    assert local_fit().interval["spread_months"] == [1.0]


def test_the_uncertainty_of_an_interval_shrinks_with_the_images() -> None:
    few, many = local_fit(60), local_fit(600)
    for fit in (few, many):
        low, high = fit.interval_width_ci95_months
        assert low < fit.interval_width_months < high
    assert np.diff(few.interval_width_ci95_months) > 1.5 * np.diff(many.interval_width_ci95_months)
    assert np.diff(few.coverage_ci95) > 2 * np.diff(many.coverage_ci95)


def test_the_coverage_given_the_calibration_images_follows_the_beta_distribution() -> None:
    rng = np.random.default_rng(9)
    # The coverage of the k-th smallest of n uniform scores is that score itself.
    covered = np.sort(rng.uniform(size=(20000, 50)), axis=1)[:, 45]
    assert coverage_given_calibration(50, 0.1) == pytest.approx(tuple(np.quantile(covered, [0.025, 0.975])), abs=0.01)


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(n: int = 60, *, sex: list[str] | None = None, uses_sex: bool = True, reference: Any = None) -> str:
    predicted, honest = calibrated(n, 0)
    given = [SEXES[index % 2] for index in range(n)] if sex is None else sex
    with pytest.raises(InputError) as refusal:
        fit_local_calibration(
            predicted, honest if reference is None else reference, sex=given, uses_sex=uses_sex, shape=None
        )
    return str(refusal.value)


def test_fewer_than_50_images_are_refused() -> None:
    assert "at least 50 labelled images, not 49" in refused(49)
    local_fit(50)


def test_fewer_than_20_of_a_sex_are_refused_where_the_model_uses_sex() -> None:
    sex = ["male"] * 19 + ["female"] * 41
    assert "there are 19 with sex male" in refused(sex=sex)
    predicted, reference = calibrated(60, 0)
    fit_local_calibration(predicted, reference, sex=sex, uses_sex=False, shape=None)


def test_an_unknown_sex_is_refused() -> None:
    assert '"female" or "male"' in refused(sex=["M", "F"] * 30)
    assert '"female" or "male"' in refused(sex=["male"] * 59)


def test_labels_in_years_are_refused() -> None:
    assert "look like years" in refused(reference=calibrated(60, 0)[1] / 12)


def test_labels_that_do_not_follow_the_predictions_are_refused() -> None:
    reference = np.random.default_rng(0).permutation(calibrated(120, 0)[1])
    assert "belong together" in refused(120, reference=reference)


def test_labels_that_are_the_predictions_are_refused() -> None:
    assert "equal their references" in refused(60, reference=calibrated(60, 0)[0])
