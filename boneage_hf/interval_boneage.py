"""Prediction intervals by split conformal prediction: a few numbers in the config, fitted on held-out predictions.

The interval around a predicted age p is `p -+ quantile[group of p] * spread(p)`, cut off at 0 months. The spread is
the typical absolute error at that predicted age, the groups are thirds of the predicted ages (Mondrian categories:
Vovk V., Gammerman A., Shafer G., Algorithmic Learning in a Random World, Springer 2005, ch. 4.5), and each group's
quantile is the ceil((n + 1) (1 - alpha))-th smallest of its n calibration scores |reference - p| / spread(p) (Lei J.
et al., Distribution-Free Predictive Inference for Regression, JASA 2018;113(523):1094-1111, section 2.2).

What the coverage means, and what not: of new images that are exchangeable with the calibration images (same
population, same equipment, same readers), at least 1 - alpha have within their interval **one clinical reading** of
the kind that the calibration labels are. It is a statement about all images of a group together, not about each
child; it covers the reader's error as well as the model's; and it promises nothing for images from elsewhere
(`boneage calibrate` is for these).

The spread depends on the predicted age alone. The disagreement between an image and its mirror image would be the
other natural predictor, but it doubles the cost of every answer, and an interval that is a function of the prediction
can be checked by anyone who has a file of predictions.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

#: Every interval of this package is a 90 % interval: command line, Space and cards call it so.
INTERVAL_ALPHA = 0.1

#: Fields of an interval in a config.
INTERVAL_FIELDS = ("alpha", "edges_months", "quantiles", "knots_months", "spread_months")

# A knot of the spread for each 50 images, at most 8: the mean of 50 absolute errors is known to about 11 %
# (the standard deviation of |e| is 0.76 of its mean if e is Gaussian).
_IMAGES_PER_KNOT = 50
_MAX_KNOTS = 8
# Part of the overall mean absolute error below which no local spread falls, lest a lucky neighbourhood blow up scores.
_SPREAD_FLOOR = 0.25


def interval_months(
    predicted_months: ArrayLike, interval: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of the interval for predicted ages.

    The coverage, at least `1 - alpha`, refers to one clinical reading and to images that are exchangeable with the
    calibration images; see the head of this module.

    Args:
        predicted_months: any shape, months.
        interval: `interval` of a [`BoneAgeConfig`], see [`check_interval`].

    Returns:
        Lower and upper ends in the shape of `predicted_months`, float64, months; 0 <= low <= high. NaN for NaN.
    """
    predicted = np.asarray(predicted_months, dtype=np.float64)
    half = np.asarray(interval["quantiles"])[interval_group(predicted, interval["edges_months"])]
    half = half * predicted_spread(predicted, interval)
    low = np.maximum(predicted - half, 0.0)
    return low, np.maximum(predicted + half, low)


def interval_group(predicted_months: ArrayLike, edges_months: Sequence[float]) -> NDArray[np.intp]:
    """Index of the group of each predicted age: 0 below the first edge, 1 from it on, and so forth."""
    return np.searchsorted(np.asarray(edges_months, dtype=np.float64), predicted_months, side="right")


def predicted_spread(predicted_months: ArrayLike, shape: dict[str, Any]) -> NDArray[np.float64]:
    """Typical absolute error at a predicted age, months: linear between the knots, constant outside of them."""
    return np.interp(np.asarray(predicted_months, dtype=np.float64), shape["knots_months"], shape["spread_months"])


def fit_interval_shape(predicted_months: ArrayLike, reference_months: ArrayLike) -> dict[str, list[float]]:
    """Fit what must not depend on the calibration scores: the edges of the thirds, and the spread.

    The predicted ages are cut into up to 8 parts of equal count (at least 50 images in each, or one part). A knot lies
    at a part's median; its spread is the part's mean absolute error, each error counted at most at the part's 95th
    percentile so that a single gross one has little say, and at least a quarter of that over all images.

    Args:
        predicted_months, reference_months: shape (n,), months, of images that are not used in [`fit_interval`]: then
            its guarantee is exact.

    Returns:
        `edges_months` (2), `knots_months` and `spread_months` (1 to 8 each), for [`fit_interval`].

    Raises:
        InputError: too few images, predictions that hardly differ, or errors that are all zero.
    """
    predicted, reference = _pair(predicted_months, reference_months)
    if len(predicted) < 3:
        raise InputError(f"The spread of the errors needs at least 3 images, not {len(predicted)}.")
    edges = [round(float(edge), 4) for edge in np.quantile(predicted, [1 / 3, 2 / 3])]
    errors = np.abs(reference - predicted)
    overall = float(errors.mean())
    if overall == 0:
        raise InputError("All predictions equal their references, which no reading does: check where both come from.")
    knots: list[float] = []
    spread: list[float] = []
    parts = min(_MAX_KNOTS, max(1, len(predicted) // _IMAGES_PER_KNOT))
    for part in np.array_split(np.argsort(predicted, kind="stable"), parts):
        knots.append(round(float(np.median(predicted[part])), 4))
        local = float(np.minimum(errors[part], np.quantile(errors[part], 0.95)).mean())
        spread.append(round(max(local, _SPREAD_FLOOR * overall), 4))
    if edges[0] >= edges[1] or any(late <= early for early, late in pairwise(knots)):
        raise InputError("The predictions hardly differ from each other, so no interval can follow them.")
    return {"edges_months": edges, "knots_months": knots, "spread_months": spread}


def fit_interval(
    predicted_months: ArrayLike,
    reference_months: ArrayLike,
    *,
    shape: dict[str, list[float]],
    alpha: float = INTERVAL_ALPHA,
) -> dict[str, Any]:
    """Split-conformal calibration: the quantile of the scores in each group of predicted ages.

    For images exchangeable with these, the interval holds one clinical reading of a group's image with a probability
    of at least `1 - alpha`, and at most `1 - alpha + 1 / (n + 1)` with n calibration images in its group.

    Args:
        predicted_months, reference_months: shape (n,), months, of images that neither trained nor selected the model.
        shape: from [`fit_interval_shape`] on other images, or with other `edges_months` (none: one group).
        alpha: share that may lie outside.

    Returns:
        `interval` of a [`BoneAgeConfig`].

    Raises:
        InputError: a group has fewer images than its quantile needs (9 at 90 %).
    """
    predicted, reference = _pair(predicted_months, reference_months)
    scores = np.abs(reference - predicted) / predicted_spread(predicted, shape)
    group = interval_group(predicted, shape["edges_months"])
    quantiles = [conformal_quantile(scores[group == g], alpha) for g in range(len(shape["edges_months"]) + 1)]
    return {"alpha": alpha, "quantiles": quantiles, **{field: list(values) for field, values in shape.items()}}


def conformal_quantile(scores: NDArray[np.float64], alpha: float) -> float:
    """The ceil((n + 1) (1 - alpha))-th smallest of n scores.

    Raises:
        InputError: the rank is above n, so that only an infinite interval would do.
    """
    rank = conformal_rank(len(scores), alpha)
    if rank > len(scores):
        raise InputError(
            f"A {100 * (1 - alpha):g} % interval needs at least {math.ceil(1 / alpha - 1 - 1e-9)} images in each "
            f"third of the predicted ages, and one third has {len(scores)}: calibrate on more images."
        )
    return float(np.sort(scores)[rank - 1])


def conformal_rank(n: int, alpha: float) -> int:
    """ceil((n + 1) (1 - alpha)), unmoved by rounding: (9 + 1) * (1 - 0.1) is 9."""
    return math.ceil(round((n + 1) * (1 - alpha), 9))


def check_interval(interval: dict[str, Any]) -> None:
    """Refuse what is no interval: `alpha` (0.1), `edges_months` (0 to 2, rising), `quantiles` (one more than edges,
    above 0), `knots_months` (1 or more, rising) and `spread_months` (as many, above 0); all finite.

    Raises:
        InputError: names the field that is wrong.
    """
    check_fields(interval, "interval", INTERVAL_FIELDS)
    if interval["alpha"] != INTERVAL_ALPHA:
        raise InputError(
            f"interval: alpha must be {INTERVAL_ALPHA}, because every answer calls it a 90 % interval; fit it again."
        )
    edges = check_numbers(interval["edges_months"], "interval: edges_months", rising=True)
    quantiles = check_numbers(interval["quantiles"], "interval: quantiles", above_zero=True)
    knots = check_numbers(interval["knots_months"], "interval: knots_months", rising=True)
    spread = check_numbers(interval["spread_months"], "interval: spread_months", above_zero=True)
    if len(edges) > 2 or len(quantiles) != len(edges) + 1:
        raise InputError(
            f"interval: up to 2 edges_months and one more of quantiles belong together, not {len(edges)} and "
            f"{len(quantiles)}; fit it again."
        )
    if not knots or len(knots) != len(spread):
        raise InputError(
            f"interval: knots_months and spread_months must be as many, at least 1, not {len(knots)} and "
            f"{len(spread)}; fit it again."
        )


def check_fields(value: Any, name: str, fields: Sequence[str]) -> None:
    """Raises InputError unless `value` is a dict with exactly these fields."""
    if not isinstance(value, dict) or set(value) != set(fields):
        raise InputError(f"{name} must be a table with exactly the fields {', '.join(fields)}; fit it again.")


def check_numbers(
    values: Any, name: str, *, rising: bool = False, above_zero: bool = False
) -> list[float] | tuple[float, ...]:
    """Raises InputError unless `values` is a list of finite numbers with these properties."""
    usual = isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
    if not usual:
        raise InputError(f"{name} must be a list of finite numbers, not {values!r}; fit it again.")
    if above_zero and any(value <= 0 for value in values):
        raise InputError(f"{name} must be above 0, not {values!r}; fit it again.")
    if rising and any(late <= early for early, late in pairwise(values)):
        raise InputError(f"{name} must rise, not {values!r}; fit it again.")
    return values


def _pair(predicted_months: ArrayLike, reference_months: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predicted = np.asarray(predicted_months, dtype=np.float64)
    reference = np.asarray(reference_months, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != reference.shape:
        raise InputError("Predictions and references must be one number per image, in the same order.")
    if not (np.isfinite(predicted).all() and np.isfinite(reference).all()):
        raise InputError("Predictions and references must be finite numbers; find out which image has none.")
    return predicted, reference
