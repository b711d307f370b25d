"""Fits on predictions and references alone: a correction over age, and the calibration on a hospital's own images.

Nothing is taken over because it fits the images it was fitted to: a change of the months has to lower the mean
absolute error in cross-validation. A change that bends or tilts the scale has to do so by more than that gain's own
standard error; a plain offset, whose few images make that standard error large, by anything. Else the months stay as
they are, and the answer says so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .correction_boneage import MAX_SLOPE, MIN_SLOPE
from .errors import InputError
from .interval_boneage import INTERVAL_ALPHA, conformal_quantile, conformal_rank, interval_months, predicted_spread
from .metrics import error_metrics
from .sex import SEXES

Months = NDArray[np.float64]

FOLDS = 10

#: Fewest images for a local calibration, of each sex where the model uses sex, and for a slope.
MIN_LOCAL_IMAGES = 50
MIN_LOCAL_PER_SEX = 20
MIN_SLOPE_IMAGES = 100

# Knots of a correction over age that are tried.
_KNOTS = (2, 3, 5)
# The first and the last knot leave this share of the images outside: beyond, the offset is constant.
_TAIL = 0.02
# A correction keeps at least half of a difference between two predictions; more would be noise, not calibration.
_SMALLEST_STEP = 0.5
_MIN_CORRECTION_IMAGES = 100
# Errors below 1 month count as equal in the iteratively reweighted least squares for least absolute errors.
_L1_FLOOR_MONTHS = 1.0


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """What a change of the months brings on images that it was not fitted to.

    Attributes:
        n: images.
        mae_before_months, mae_after_months: mean absolute error without and with it.
        gain_months: the difference, positive if it helps.
        gain_se_months: standard error of the gain, from its differences image by image.
    """

    n: int
    mae_before_months: float
    mae_after_months: float
    gain_months: float
    gain_se_months: float

    @property
    def wins(self) -> bool:
        """Whether the gain is above its standard error."""
        return self.gain_months > self.gain_se_months

    def __str__(self) -> str:
        return (
            f"MAE by {FOLDS}-fold cross-validation {self.mae_before_months:.2f} -> {self.mae_after_months:.2f} "
            f"months, gain {self.gain_months:.2f} (standard error {self.gain_se_months:.2f})"
        )


def cross_validation(before: Months, after: Months, reference: Months) -> CrossValidation:
    """Compare two predictions (n,) of the same images; `after` from models that did not see the image."""
    old, new = np.abs(before - reference), np.abs(after - reference)
    spread = float(np.std(old - new, ddof=1)) if len(old) > 1 else math.inf
    return CrossValidation(
        n=len(reference),
        mae_before_months=float(old.mean()),
        mae_after_months=float(new.mean()),
        gain_months=float((old - new).mean()),
        gain_se_months=spread / math.sqrt(len(old)),
    )


def folds(n: int, *, group: NDArray[np.int64] | None = None, seed: int = 0) -> NDArray[np.int64]:
    """Fold 0 to 9 of each of n images: shuffled, each group dealt out evenly."""
    shuffled = np.random.default_rng(seed).permutation(n)
    if group is not None:
        shuffled = shuffled[np.argsort(group[shuffled], kind="stable")]
    fold = np.empty(n, dtype=np.int64)
    fold[shuffled] = np.arange(n) % FOLDS
    return fold


# --- over age -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AgeCorrectionFit:
    """Attributes:
    correction: `age_correction` of a config, or None if it does not win.
    gained: by cross-validation, the choice of the number of knots included.
    """

    correction: dict[str, Any] | None
    gained: CrossValidation


def fit_age_correction(predicted_months: ArrayLike, reference_months: ArrayLike, *, seed: int = 0) -> AgeCorrectionFit:
    """A monotone, piecewise linear correction of predicted ages, if it wins by cross-validation.

    The offset that is added to a predicted age is linear between 2, 3 or 5 knots at even quantiles of the predicted
    ages. It is fitted to least absolute errors (the MAE is what counts), by reweighted least squares, and then made
    monotone by isotonic regression, so that corrected ages keep at least half of every difference. The number of knots
    is chosen by cross-validation inside each fold of the cross-validation that is reported.

    Args:
        predicted_months, reference_months: shape (n,), months, of the selection half of validation.
        seed: of the folds.

    Raises:
        InputError: fewer than 100 images, or values as in [`boneage_hf.metrics.error_metrics`].
    """
    predicted, reference = _checked(predicted_months, reference_months)
    if len(predicted) < _MIN_CORRECTION_IMAGES:
        raise InputError(
            f"A correction over age needs at least {_MIN_CORRECTION_IMAGES} images, not {len(predicted)}: leave it "
            "out."
        )
    fold = folds(len(predicted), seed=seed)
    after = np.empty_like(predicted)
    for index in range(FOLDS):
        known = fold != index
        knots = _best_number_of_knots(predicted[known], reference[known], seed=seed + 1)
        fitted = _fit_offsets(predicted[known], reference[known], knots)
        after[~known] = apply_age_correction(predicted[~known], fitted)
    gained = cross_validation(predicted, after, reference)
    if not gained.wins:
        return AgeCorrectionFit(correction=None, gained=gained)
    knots = _best_number_of_knots(predicted, reference, seed=seed)
    return AgeCorrectionFit(correction=_fit_offsets(predicted, reference, knots), gained=gained)


def apply_age_correction(predicted_months: ArrayLike, correction: dict[str, Any]) -> Months:
    """What the model's forward pass does with an `age_correction`, in float64; shape (n,) -> (n,)"""
    predicted = np.asarray(predicted_months, dtype=np.float64)
    return predicted + np.interp(predicted, correction["knots_months"], correction["offsets_months"])


def _best_number_of_knots(predicted: Months, reference: Months, *, seed: int) -> int:
    fold = folds(len(predicted), seed=seed)
    errors = dict.fromkeys(_KNOTS, 0.0)
    for knots in _KNOTS:
        for index in range(FOLDS):
            known = fold != index
            fitted = _fit_offsets(predicted[known], reference[known], knots)
            errors[knots] += float(np.abs(apply_age_correction(predicted[~known], fitted) - reference[~known]).sum())
    return min(errors, key=lambda knots: errors[knots])


def _fit_offsets(predicted: Months, reference: Months, count: int) -> dict[str, Any]:
    from scipy.optimize import isotonic_regression

    knots = np.unique(np.round(np.quantile(predicted, np.linspace(_TAIL, 1 - _TAIL, count)), 4))
    if len(knots) < 2:
        raise InputError("The predictions hardly differ from each other, so no correction can follow them.")
    # Row i says how the offset at image i is mixed from the knots' offsets; shape (n, knots).
    mixing = np.stack([np.interp(predicted, knots, unit) for unit in np.eye(len(knots))], axis=1)
    wanted = reference - predicted
    weight = np.ones(len(predicted))
    for _ in range(15):
        weighted = mixing * weight[:, None]
        # Every knot lies among the images, so the normal equations have one solution.
        offsets = np.linalg.solve(weighted.T @ mixing, weighted.T @ wanted)
        weight = 1 / np.maximum(np.abs(wanted - mixing @ offsets), _L1_FLOOR_MONTHS)
    # Slopes of at least `_SMALLEST_STEP`: isotonic regression of what is left after that slope is taken out.
    base = _SMALLEST_STEP * knots
    rising = isotonic_regression(knots + offsets - base, weights=mixing.sum(axis=0) + 1e-9).x + base
    return {"knots_months": knots.tolist(), "offsets_months": np.round(rising - knots, 4).tolist()}


# --- a hospital's own images ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LocalCalibrationFit:
    """Attributes:
    calibration: `local_calibration` of a config, or None if nothing was gained: the months stay as they are.
    interval: `interval` of a config, around the months as they are after the calibration.
    n_by_sex: images of each sex that occurs.
    measured_offsets_months: mean of reference - prediction by sex, as measured; one entry "all" for a model that does
        not use sex. Where the slope is used, what is left of it beside the slope: at `centre_months` of `calibration`.
    offsets_months: the same, shrunk to the common one.
    common_offset_months: what they are shrunk to.
    kept_difference: share of a sex's own difference from the common offset that is kept, by sex.
    slope: fitted slope, or None with fewer than 100 images.
    offset_gained, slope_gained: by cross-validation, each against the months as they were.
    slope_used: whether the slope is part of `calibration`.
    interval_width_months, interval_width_ci95_months: mean width on these images, and its 2.5th and 97.5th percentile
        over bootstrap samples of the calibration images.
    coverage_ci95: between these two lies, with 95 % confidence, the share of exchangeable images whose reference is
        within an interval made from so few.
    """

    calibration: dict[str, Any] | None
    interval: dict[str, Any]
    n_by_sex: dict[str, int]
    measured_offsets_months: dict[str, float]
    offsets_months: dict[str, float]
    common_offset_months: float
    kept_difference: dict[str, float]
    slope: float | None
    offset_gained: CrossValidation
    slope_gained: CrossValidation | None
    slope_used: bool
    interval_width_months: float
    interval_width_ci95_months: tuple[float, float]
    coverage_ci95: tuple[float, float]

    @property
    def n(self) -> int:
        return self.offset_gained.n


def fit_local_calibration(
    predicted_months: ArrayLike,
    reference_months: ArrayLike,
    *,
    sex: Sequence[str],
    uses_sex: bool,
    shape: dict[str, Any] | None,
    seed: int = 0,
) -> LocalCalibrationFit:
    """Offsets, slope and interval from at least 50 labelled images of one place.

    Offsets: see [`shrunken_offsets`]. Slope, from 100 images: least squares of the reference, less its sex's offset,
    on the prediction, about the mean prediction. What is used, of (nothing, offsets, offsets and slope), is decided by
    10-fold cross-validation with the sexes dealt out evenly: offsets if they gain anything, the slope too if what it
    gains further is above that gain's standard error.

    The interval has one group and the quantile of the cross-validated scores |reference - prediction| / spread at the
    rank ceil((n + 1) 0.9) (Barber R. F. et al., Predictive inference with the jackknife+, Ann. Statist.
    2021;49(1):486-507, whose section on K-fold CV says why residuals of the fit itself would be too small; a bound is
    only proven for a slightly wider form, in practice the coverage is as named). Like every interval of this package
    it speaks of one clinical reading and of exchangeable images.

    `coverage_ci95` is that of split conformal prediction, where the coverage given the calibration images follows
    Beta(k, n + 1 - k) with the rank k (Vovk V., Conditional validity of inductive conformal predictors, Mach. Learn.
    2013;92:349-376).

    Args:
        predicted_months, reference_months: shape (n,), months.
        sex: n entries "female" or "male".
        uses_sex: whether the model uses sex, and so gets an offset per sex.
        shape: `knots_months` and `spread_months` of the model's own interval, or None: then the interval has the same
            width at all ages.
        seed: of the folds and the bootstrap.

    Raises:
        InputError: too few images (50; 20 of each sex for a model that uses sex), labels in years, predictions that do
            not follow the references.
    """
    predicted, reference = _checked(predicted_months, reference_months)
    group = _groups(sex, len(predicted), uses_sex=uses_sex)
    names = SEXES if uses_sex else ("all",)
    if reference.max() <= 25 and np.median(predicted) > 30:  # no child is older than 25 years
        raise InputError("The references look like years (all at most 25); give bone ages in months.")

    def offsets_only(known: NDArray[np.bool_]) -> _Fitted:
        found = shrunken_offsets((reference - predicted)[known], group[known])
        return _Fitted(found, slope=1.0, centre_months=float(predicted.mean()))

    def with_slope(known: NDArray[np.bool_]) -> _Fitted:
        slope = _slope(predicted[known], reference[known], group[known])
        centre = float(predicted[known].mean())
        flat = reference - centre - slope * (predicted - centre)
        return _Fitted(shrunken_offsets(flat[known], group[known]), slope=slope, centre_months=centre)

    fold = folds(len(predicted), group=group, seed=seed)

    def out_of_fold(fit: Callable[[NDArray[np.bool_]], _Fitted]) -> Months:
        answers = np.empty_like(predicted)
        for index in range(FOLDS):
            held = fold == index
            answers[held] = _apply_local(predicted[held], group[held], fit(~held).calibration)
        return answers

    everything = np.ones(len(predicted), dtype=bool)
    fitted, used = offsets_only(everything), False
    honest = predicted
    shifted = out_of_fold(offsets_only)
    offset_gained, slope_gained, slope, slope_used = cross_validation(predicted, shifted, reference), None, None, False
    if offset_gained.gain_months > 0:
        used, honest = True, shifted
    if len(predicted) >= MIN_SLOPE_IMAGES:
        slope = _slope(predicted, reference, group)
        if not MIN_SLOPE <= slope <= MAX_SLOPE:
            raise InputError(
                f"References rise by {slope:.2f} months for each month of the predictions, which is no matter of "
                "calibration: check that images and labels belong together and that labels are in months."
            )
        tilted = out_of_fold(with_slope)
        slope_gained = cross_validation(predicted, tilted, reference)
        if slope_gained.wins and cross_validation(honest, tilted, reference).wins:
            fitted, used, honest, slope_used = with_slope(everything), True, tilted, True
    interval, width, width_ci95 = _local_interval(honest, reference, shape=shape, seed=seed)
    offsets = fitted.offsets
    return LocalCalibrationFit(
        calibration=fitted.calibration if used else None,
        interval=interval,
        n_by_sex={name: list(sex).count(name) for name in SEXES if name in sex},
        measured_offsets_months=dict(zip(names, offsets.measured_months, strict=True)),
        offsets_months=dict(zip(names, offsets.offsets_months, strict=True)),
        common_offset_months=offsets.common_months,
        kept_difference=dict(zip(names, offsets.kept, strict=True)),
        slope=slope,
        offset_gained=offset_gained,
        slope_gained=slope_gained,
        slope_used=slope_used,
        interval_width_months=width,
        interval_width_ci95_months=width_ci95,
        coverage_ci95=coverage_given_calibration(len(predicted), INTERVAL_ALPHA),
    )


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """Mean differences by group, as `measured_months` and shrunk to `common_months` as `offsets_months`; `kept` is the
    share of each group's difference from the common one that is kept."""

    measured_months: list[float]
    offsets_months: list[float]
    common_months: float
    kept: list[float]


@dataclass(frozen=True)
class _Fitted:
    """Offsets and the slope that they stand beside."""

    offsets: Offsets
    slope: float
    centre_months: float

    @property
    def calibration(self) -> dict[str, Any]:
        """`local_calibration` of a config."""
        return {
            "offsets_months": self.offsets.offsets_months,
            "slope": self.slope,
            "centre_months": self.centre_months,
        }


def shrunken_offsets(differences_months: Months, group: NDArray[np.int64]) -> Offsets:
    """Empirical-Bayes means of one or two groups, shrunk to the common one.

    Model: the mean d_g of the n_g differences of group g is N(theta_g, v_g) with v_g = s^2 / n_g (s^2: pooled variance
    within groups), and theta_g is N(mu, tau^2). Then

        tau^2   = max(0, ((d_1 - d_2)^2 - v_1 - v_2) / 2)          since E (d_1 - d_2)^2 = 2 tau^2 + v_1 + v_2
        mu      = sum d_g / (tau^2 + v_g) / sum 1 / (tau^2 + v_g)
        theta_g = mu + tau^2 / (tau^2 + v_g) (d_g - mu)

    (Morris C. N., Parametric Empirical Bayes Inference, JASA 1983;78(381):47-55, with the moment estimate of tau^2 as
    in DerSimonian R., Laird N., Control. Clin. Trials 1986;7:177-188.) With only two groups the estimate of tau^2 is
    poor: it is all or little, but never turns a difference round and never enlarges it.

    Args:
        differences_months: shape (n,), reference - prediction.
        group: shape (n,), 0 or 1; each group that exists up to the highest needs an image, and one of them two.
    """
    counts = np.bincount(group)
    means = np.bincount(group, weights=differences_months) / counts
    if len(means) == 1:
        mean = float(means[0])
        return Offsets(measured_months=[mean], offsets_months=[mean], common_months=mean, kept=[1.0])
    pooled = float(np.square(differences_months - means[group]).sum()) / (len(group) - len(means))
    variances = pooled / counts
    between = max(0.0, float((means[0] - means[1]) ** 2 - variances.sum()) / 2)
    if pooled == 0 and between == 0:
        kept, common = np.zeros(2), float(np.average(means, weights=counts))
    else:
        kept = np.asarray(between / (between + variances))
        common = float(np.average(means, weights=1 / (between + variances)))
    return Offsets(
        measured_months=means.tolist(),
        offsets_months=(common + kept * (means - common)).tolist(),
        common_months=common,
        kept=kept.tolist(),
    )


def coverage_given_calibration(n: int, alpha: float) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the coverage of a split-conformal interval from n images: Beta(k, n + 1 - k)."""
    from scipy.stats import beta

    rank = conformal_rank(n, alpha)
    return float(beta.ppf(0.025, rank, n + 1 - rank)), float(beta.ppf(0.975, rank, n + 1 - rank))


def _slope(predicted: Months, reference: Months, group: NDArray[np.int64]) -> float:
    """Common least-squares slope within groups (analysis of covariance): an offset between them is no slope."""
    centred, wanted = predicted.copy(), reference.copy()
    for g in np.unique(group):
        centred[group == g] -= predicted[group == g].mean()
        wanted[group == g] -= reference[group == g].mean()
    square = float(centred @ centred)
    if square == 0:
        raise InputError("The predictions hardly differ from each other, so no slope can be fitted.")
    return float(centred @ wanted) / square


def _apply_local(predicted: Months, group: NDArray[np.int64], calibration: dict[str, Any]) -> Months:
    centre = calibration["centre_months"]
    return centre + calibration["slope"] * (predicted - centre) + np.asarray(calibration["offsets_months"])[group]


def _local_interval(
    honest: Months, reference: Months, *, shape: dict[str, Any] | None, seed: int
) -> tuple[dict[str, Any], float, tuple[float, float]]:
    """Interval from cross-validated answers; its mean width, and that width's bootstrap interval."""
    knots = {"knots_months": [float(np.median(honest))], "spread_months": [1.0]}
    if shape is not None:
        knots = {field: list(shape[field]) for field in knots}
    scores = np.abs(reference - honest) / predicted_spread(honest, knots)

    def made(chosen: Months) -> tuple[dict[str, Any], float]:
        quantile = conformal_quantile(chosen, INTERVAL_ALPHA)
        interval = {"alpha": INTERVAL_ALPHA, "edges_months": [], "quantiles": [quantile], **knots}
        low, high = interval_months(honest, interval)
        return interval, float((high - low).mean())

    interval, width = made(scores)
    if interval["quantiles"][0] == 0:
        raise InputError("Nearly all predictions equal their references: check where the references come from.")
    generator = np.random.default_rng(seed)
    widths = [made(generator.choice(scores, len(scores)))[1] for _ in range(1000)]
    low, high = np.percentile(widths, [2.5, 97.5])
    return interval, width, (float(low), float(high))


def _groups(sex: Sequence[str], n: int, *, uses_sex: bool) -> NDArray[np.int64]:
    unknown = sorted({str(value) for value in sex} - set(SEXES))
    if unknown or len(sex) != n:
        raise InputError('Each image needs its sex, exactly "female" or "male".')
    if n < MIN_LOCAL_IMAGES:
        raise InputError(
            f"A local calibration needs at least {MIN_LOCAL_IMAGES} labelled images, not {n}; with fewer it would fit "
            "noise."
        )
    if not uses_sex:
        return np.zeros(n, dtype=np.int64)
    for name in SEXES:
        if list(sex).count(name) < MIN_LOCAL_PER_SEX:
            raise InputError(
                f"This model uses sex, so a local calibration needs at least {MIN_LOCAL_PER_SEX} labelled images of "
                f"each; there are {list(sex).count(name)} with sex {name}."
            )
    return np.array([SEXES.index(value) for value in sex], dtype=np.int64)


def _checked(predicted_months: ArrayLike, reference_months: ArrayLike) -> tuple[Months, Months]:
    error_metrics(predicted_months, reference_months, n_resamples=0)  # refuses what cannot be measured
    return np.asarray(predicted_months, dtype=np.float64), np.asarray(reference_months, dtype=np.float64)
