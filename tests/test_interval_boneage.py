"""Split-conformal intervals: they cover what they promise on data that they were not fitted to, group by group."""

import math
from typing import Any

import numpy as np
import pytest

from boneage_hf.errors import InputError
from boneage_hf.interval_boneage import (
    INTERVAL_ALPHA,
    check_interval,
    conformal_quantile,
    conformal_rank,
    fit_interval,
    fit_interval_shape,
    interval_group,
    interval_months,
    predicted_spread,
)
from boneage_hf.report import INTERVAL_PERCENT

INTERVAL: dict[str, Any] = {
    "alpha": 0.1,
    "edges_months": [100.0, 150.0],
    "quantiles": [2.0, 1.5, 3.0],
    "knots_months": [50.0, 100.0, 180.0],
    "spread_months": [4.0, 8.0, 6.0],
}


def images(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and references of a reader whose error, heavy-tailed, is three times as large at the ends."""
    reference = np.clip(rng.normal(127, 41, n), 1, 228)
    scale = 4 + 8 * np.abs(reference - 120) / 100
    return reference + rng.laplace(0, scale / np.sqrt(2)), reference


def slow_interval(age: float, interval: dict[str, Any]) -> tuple[float, float]:
    """One age, by the text of the module."""
    group = sum(age >= edge for edge in interval["edges_months"])
    knots, spread = interval["knots_months"], interval["spread_months"]
    if age <= knots[0]:
        typical = spread[0]
    elif age >= knots[-1]:
        typical = spread[-1]
    else:
        right = next(index for index, knot in enumerate(knots) if age < knot)
        way = (age - knots[right - 1]) / (knots[right] - knots[right - 1])
        typical = spread[right - 1] + way * (spread[right] - spread[right - 1])
    half = interval["quantiles"][group] * typical
    low = max(0.0, age - half)
    return low, max(low, age + half)


# --- the interval of a prediction -----------------------------------------------------------------------------------


def test_the_vectorised_interval_equals_a_plain_one() -> None:
    ages = np.concatenate([np.linspace(-30, 260, 1161), [50.0, 100.0, 150.0, 180.0]])
    low, high = interval_months(ages, INTERVAL)
    wanted = np.array([slow_interval(float(age), INTERVAL) for age in ages])
    np.testing.assert_allclose(low, wanted[:, 0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(high, wanted[:, 1], rtol=0, atol=1e-9)


def test_an_interval_begins_at_0_or_later_and_ends_where_it_begins_or_later() -> None:
    low, high = interval_months(np.linspace(-100, 300, 4001), INTERVAL)
    assert (low >= 0).all()
    assert (high >= low).all()
    assert low.min() == 0


def test_an_interval_holds_its_prediction_unless_that_is_no_age() -> None:
    ages = np.linspace(0, 300, 3001)
    low, high = interval_months(ages, INTERVAL)
    assert ((low <= ages) & (ages <= high)).all()


def test_an_interval_keeps_the_shape_of_the_predictions() -> None:
    low, high = interval_months(np.full((2, 3), 90.0), INTERVAL)
    assert low.shape == high.shape == (2, 3)
    one_low, one_high = interval_months(90.0, INTERVAL)
    assert (float(one_low), float(one_high)) == pytest.approx((90 - 14.4, 90 + 14.4))


def test_a_prediction_that_is_no_number_has_no_interval() -> None:
    low, high = interval_months([math.nan, 90.0], INTERVAL)
    assert np.isnan([low[0], high[0]]).all()
    assert np.isfinite([low[1], high[1]]).all()


def test_a_prediction_on_an_edge_belongs_to_the_group_above() -> None:
    assert interval_group([99.9, 100.0, 149.9, 150.0], [100.0, 150.0]).tolist() == [0, 1, 1, 2]
    assert interval_group([1.0, 200.0], []).tolist() == [0, 0]


def test_the_interval_is_called_what_it_is() -> None:
    assert pytest.approx(100 * (1 - INTERVAL_ALPHA)) == INTERVAL_PERCENT


# --- the quantile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rank"), [(9, 9), (10, 10), (19, 18), (29, 27), (99, 90), (100, 91), (355, 321)])
def test_the_rank_is_n_plus_1_times_90_percent_rounded_up(n: int, rank: int) -> None:
    assert conformal_rank(n, 0.1) == rank


def test_the_quantile_is_the_score_of_that_rank() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    assert conformal_quantile(scores, 0.1) == 90.0


def test_too_few_scores_are_refused_and_the_fewest_give_the_largest() -> None:
    assert conformal_quantile(np.arange(9.0), 0.1) == 8.0
    with pytest.raises(InputError, match=r"at least 9 images in each third .* one third has 8"):
        conformal_quantile(np.arange(8.0), 0.1)


# --- the fit --------------------------------------------------------------------------------------------------------


def test_coverage_on_exchangeable_images_is_as_promised_in_every_third() -> None:
    rng = np.random.default_rng(2017)
    covered, seen = np.zeros(3), np.zeros(3)
    for _ in range(150):
        shape = fit_interval_shape(*images(rng, 300))
        interval = fit_interval(*images(rng, 150), shape=shape)
        predicted, reference = images(rng, 200)
        low, high = interval_months(predicted, interval)
        group = interval_group(predicted, interval["edges_months"])
        covered += np.bincount(group, weights=(low <= reference) & (reference <= high), minlength=3)
        seen += np.bincount(group, minlength=3)
    # From 0.9 to 0.9 + 1 / (50 + 1). The spread over 150 calibrations of 50 images is about 0.0035; four of these.
    assert (covered / seen > 0.9 - 0.014).all()
    assert (covered / seen < 0.92 + 0.014).all()


def test_another_level_is_met_too() -> None:
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(100):
        interval = fit_interval(*images(rng, 200), shape=fit_interval_shape(*images(rng, 300)), alpha=0.5)
        predicted, reference = images(rng, 200)
        low, high = interval_months(predicted, interval)
        shares.append(((low <= reference) & (reference <= high)).mean())
    assert 0.48 < np.mean(shares) < 0.54


def test_images_from_elsewhere_are_not_covered() -> None:
    rng = np.random.default_rng(4)
    interval = fit_interval(*images(rng, 900), shape=fit_interval_shape(*images(rng, 900)))
    predicted, reference = images(rng, 2000)
    low, high = interval_months(predicted + 8, interval)  # another place reads 8 months higher
    assert ((low <= reference) & (reference <= high)).mean() < 0.85


def test_the_spread_follows_the_errors() -> None:
    predicted, reference = images(np.random.default_rng(5), 4000)
    shape = fit_interval_shape(predicted, reference)
    assert len(shape["knots_months"]) == 8
    near, far = predicted_spread([120.0, 30.0], shape)
    assert 1.5 * near < far
    below = float((predicted < shape["edges_months"][0]).mean())
    assert below == pytest.approx(1 / 3, abs=1e-3)


def test_the_spread_is_the_mean_absolute_error_of_each_part_with_gross_errors_cut() -> None:
    predicted, reference = images(np.random.default_rng(6), 120)
    order = np.argsort(predicted)
    for part, knot, spread in zip(
        (order[:60], order[60:]), *list(fit_interval_shape(predicted, reference).values())[1:], strict=True
    ):
        errors = sorted(abs(predicted[part] - reference[part]))
        cut = float(np.quantile(errors, 0.95))
        assert spread == pytest.approx(sum(min(error, cut) for error in errors) / 60, abs=1e-4)
        assert knot == pytest.approx(np.median(predicted[part]), abs=1e-4)


def test_the_groups_have_quantiles_of_their_own_scores() -> None:
    shape = {"edges_months": [10.0, 20.0], "knots_months": [5.0], "spread_months": [2.0]}
    predicted = np.repeat([5.0, 15.0, 25.0], 9)
    errors = np.concatenate([np.arange(1.0, 10.0), 10 * np.arange(1.0, 10.0), -np.arange(1.0, 10.0) / 2])
    interval = fit_interval(predicted, predicted + errors, shape=shape)
    assert interval["quantiles"] == [4.5, 45.0, 2.25]


def test_a_fit_makes_what_a_config_takes() -> None:
    rng = np.random.default_rng(7)
    interval = fit_interval(*images(rng, 90), shape=fit_interval_shape(*images(rng, 90)))
    check_interval(interval)
    assert sum(len(value) for value in interval.values() if isinstance(value, list)) < 25


def test_the_shape_does_not_see_the_calibration_images() -> None:
    rng = np.random.default_rng(8)
    shape = fit_interval_shape(*images(rng, 300))
    interval = fit_interval(*images(rng, 300), shape=shape)
    assert {field: interval[field] for field in shape} == shape


# --- refusals -------------------------------------------------------------------------------------------------------


def test_predictions_that_hardly_differ_are_refused() -> None:
    with pytest.raises(InputError, match="hardly differ"):
        fit_interval_shape(np.full(60, 90.0), np.arange(60.0))


def test_predictions_that_are_never_off_are_refused() -> None:
    with pytest.raises(InputError, match="equal their references"):
        fit_interval_shape(np.arange(60.0), np.arange(60.0))


def test_a_third_without_enough_images_is_refused() -> None:
    shape = {"edges_months": [10.0, 20.0], "knots_months": [5.0], "spread_months": [2.0]}
    with pytest.raises(InputError, match="one third has 0"):
        fit_interval(np.full(40, 15.0), np.arange(40.0), shape=shape)


@pytest.mark.parametrize(
    ("predicted", "reference", "sentence"),
    [
        ([[1.0], [2.0]], [[1.0], [2.0]], "one number per image"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "one number per image"),
        ([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], "finite"),
        ([1.0, 2.0], [1.0, 2.5], "at least 3 images"),
    ],
)
def test_columns_that_do_not_fit_are_refused(predicted: Any, reference: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        fit_interval_shape(predicted, reference)
