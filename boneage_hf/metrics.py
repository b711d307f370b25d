"""How wrong predicted bone ages are: every measure by its formula, each with a bootstrap interval.

The literature calls two different things "MAD": the mean absolute difference, which is the MAE, and a deviation about
a centre, which leaves the bias out and is therefore never above the MAE about the best centre. No measure here is
called MAD; the names say what is computed. `BoneAgeMetric` in `evaluate_metric.py` wraps this module for the
`evaluate` library, whose import takes seconds and is not needed here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .errors import InputError
from .splits import AGE_BAND_MONTHS, MAX_BONE_AGE_MONTHS

#: Formulas of all measures, shown by `help(BoneAgeMetric)`.
DEFINITIONS = """
With the error of image i, e_i = predicted_i - reference_i, in months (positive: read as too old), over n images:

    mae_months                                = mean |e_i|          ("mean absolute difference" in RSNA papers)
    rmse_months                               = sqrt(mean e_i^2)
    mse_months2                               = mean e_i^2          (months squared)
    median_absolute_error_months              = median |e_i|
    mean_absolute_deviation_about_bias_months = mean |e_i - mean e|     (the spread that is left without the bias)
    bias_months                               = mean e_i
    r2                                        = 1 - sum e_i^2 / sum (reference_i - mean reference)^2
    within_6_months, within_12_months, within_24_months = share of images with |e_i| <= 6, 12, 24; from 0 to 1

`<key>_ci95` is `[low, high]`: the 2.5th and 97.5th percentile of the measure over `n_resamples` bootstrap samples of n
images drawn with replacement, prediction and reference together (Efron's percentile method), from a fixed seed. What
is undefined is None: r2 of constant references, and both ends of an interval from a single image. Samples whose own
references are constant are left out of the interval of r2.
"""

#: Keys of the measures, in the order in which they are printed.
MEASURES: tuple[str, ...] = (
    "mae_months",
    "rmse_months",
    "mse_months2",
    "median_absolute_error_months",
    "mean_absolute_deviation_about_bias_months",
    "bias_months",
    "r2",
    "within_6_months",
    "within_12_months",
    "within_24_months",
)

#: Two-sided level of every test: the usual convention.
ALPHA = 0.05

#: What [`over_age`] tests.
CLAIM_OVER_AGE = "equally good over the whole age range"

#: Children under and over these ages are rare in the data sets that models are trained on, so the error there is
#: given in any case. Both are limits of 24-month bands.
RARE_UNDER_MONTHS, RARE_FROM_MONTHS = 48, 192

#: What a person reads where a number is undefined or was never published.
MISSING = "\N{EN DASH}"

# Elements of one (samples, images) block: 2 million doubles are 16 MB per temporary array.
_BLOCK_ELEMENTS = 2_000_000

# No child is older than 25 years, and a median above 30 cannot be in years.
_OLDEST_IN_YEARS = 25
_MEDIAN_IN_MONTHS = 30


def error_metrics(
    predicted_months: ArrayLike, reference_months: ArrayLike, *, n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Measure predicted against reference bone ages; the formulas are in `DEFINITIONS`.

    Args:
        predicted_months: shape (n,), months.
        reference_months: shape (n,), months, in the same order.
        n_resamples: bootstrap samples for the intervals; 0 leaves all intervals undefined.
        seed: of the bootstrap; the same seed gives the same intervals on the same images.

    Returns:
        `{"n": int}`, every key of `MEASURES` as a float or None, and `<key>_ci95` as `[low, high]` of floats or None.
        Only plain Python numbers, so `json.dumps` takes it.

    Raises:
        InputError: if a side is empty, not one-dimensional, not numeric or not finite, if the lengths differ, or if
            the predictions are in years.
    """
    predicted, reference = _checked(predicted_months, reference_months)
    return _error_metrics(predicted, reference, n_resamples=_checked_resamples(n_resamples), seed=seed)


#: Columns that `coverage_metrics` reads.
COVERAGE_COLUMNS = ("predicted_months", "reference_months", "interval_low_months", "interval_high_months")


def coverage_metrics(table: pd.DataFrame) -> dict[str, Any]:
    """How often intervals hold the reference, and how wide they are.

    The reference is one clinical reading, so this is the coverage of such readings, not of a child's true bone age.

    Args:
        table: columns `COVERAGE_COLUMNS`, months, and optionally `sex`.

    Returns:
        `all`, and by name of the group `by_sex` (where the table has sexes), `by_predicted_tercile` and
        `by_reference_tercile` ("lowest", "middle", "highest" third of the table's own predictions or references); for
        each `n`, `covered`, `coverage` (share from 0 to 1, both ends count as inside), `coverage_ci95` (exact:
        Clopper-Pearson), `mean_width_months` and `median_width_months`. Conformal intervals promise a coverage by
        thirds of the prediction; by thirds of the reference they cover less at the ends of the age range.

    Raises:
        InputError: a column is missing or not finite, the table is empty, or an interval ends before it begins.
    """
    missing = [column for column in COVERAGE_COLUMNS if column not in table.columns]
    if missing:
        raise InputError(
            f"the table lacks the column {', '.join(missing)}; predict with a model that has an interval."
        )
    predicted, reference, low, high = (_column(table[column], f"{column} values") for column in COVERAGE_COLUMNS)
    if (high < low).any():
        raise InputError(
            f"{np.count_nonzero(high < low)} intervals end before they begin; exchange their two columns."
        )
    covered, width = (low <= reference) & (reference <= high), high - low

    def measured(member: NDArray[np.bool_]) -> dict[str, Any]:
        return _coverage(covered[member], width[member])

    def by_tercile(months: NDArray[np.float64]) -> dict[str, Any]:
        third = np.searchsorted(np.quantile(months, [1 / 3, 2 / 3]), months, side="right")
        names = ("lowest", "middle", "highest")
        return {name: measured(third == index) for index, name in enumerate(names) if (third == index).any()}

    found: dict[str, Any] = {"all": measured(np.ones(len(table), dtype=bool))}
    if "sex" in table.columns:
        sexes = table["sex"].to_numpy()
        found["by_sex"] = {str(sex): measured(sexes == sex) for sex in sorted(set(sexes))}
    return found | {"by_predicted_tercile": by_tercile(predicted), "by_reference_tercile": by_tercile(reference)}


def _coverage(covered: NDArray[np.bool_], width: NDArray[np.float64]) -> dict[str, Any]:
    from scipy.stats import binomtest

    n, hits = len(covered), int(covered.sum())
    ends = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="exact")
    return {
        "n": n,
        "covered": hits,
        "coverage": hits / n,
        "coverage_ci95": [float(ends.low), float(ends.high)],
        "mean_width_months": float(width.mean()),
        "median_width_months": float(np.median(width)),
    }


def format_coverage(coverage: dict[str, Any]) -> str:
    """Return the coverage as aligned lines of text, one per group."""
    groups = {"all": coverage["all"]}
    for grouping in ("by_sex", "by_predicted_tercile", "by_reference_tercile"):
        label = {"by_predicted_tercile": " third, predicted", "by_reference_tercile": " third, reference"}
        groups |= {f"{name}{label.get(grouping, '')}": part for name, part in coverage.get(grouping, {}).items()}
    width = max(len(name) for name in groups)
    lines = []
    for name, part in groups.items():
        low, high = (100 * end for end in part["coverage_ci95"])
        lines.append(
            f"{name:<{width}}  n {part['n']:>5}  coverage {100 * part['coverage']:5.1f} %  "
            f"95 % [{low:.1f}, {high:.1f}]  mean width {part['mean_width_months']:.1f} months"
        )
    return "\n".join(lines)


def error_over_age(
    predicted_months: ArrayLike, reference_months: ArrayLike, *, n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Least-squares slope of the error (predicted - reference) over age: regression to the mean.

    The two slopes answer two questions. Over the *reference*, a negative slope says that the young are read as too
    old and the old as too young; readings that are themselves off make it negative even for the best possible model.
    Over the *prediction* the best possible model has a slope of 0, and only what differs from 0 there can be
    corrected.

    Args:
        predicted_months, reference_months: shape (n,), months.
        n_resamples, seed: of the bootstrap, as in `error_metrics`.

    Returns:
        `slope_over_reference` and `slope_over_predicted` in months of error per month of age, each with `_ci95`; None
        where the age does not vary.

    Raises:
        InputError: as `error_metrics`.
    """
    predicted, reference = _checked(predicted_months, reference_months)
    n_resamples = _checked_resamples(n_resamples)
    found: dict[str, Any] = {}
    for name, age in (("reference", reference), ("predicted", predicted)):
        slope = _slope((predicted - reference)[None], age[None])[0]
        found[f"slope_over_{name}"] = None if np.isnan(slope) else float(slope)
        draws = _draws(len(reference), n_resamples, seed)
        slopes = [_slope((predicted - reference)[drawn], age[drawn]) for drawn in draws]
        defined = np.concatenate([part[~np.isnan(part)] for part in slopes] or [np.empty(0)])
        ends = [None, None] if np.isnan(slope) or not len(defined) else np.percentile(defined, [2.5, 97.5]).tolist()
        found[f"slope_over_{name}_ci95"] = ends
    return found


def _slope(errors: NDArray[np.float64], age: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares slopes of b samples: (b, n) and (b, n) -> (b,), NaN where the ages of a sample are constant."""
    centred = age - age.mean(axis=1, keepdims=True)
    square = np.square(centred).sum(axis=1)
    constant = np.ptp(age, axis=1) == 0
    return np.where(constant, np.nan, (centred * errors).sum(axis=1) / np.where(constant, 1.0, square))


@dataclass(frozen=True, kw_only=True)
class EqualityTest:
    """Whether the absolute errors depend on the group.

    Attributes:
        n: images.
        groups: name -> (images, MAE in months).
        spread_months: largest - smallest MAE of a group.
        p_value: of the permutation test that the groups' absolute errors are exchangeable.
        permutations: random relabellings behind it.
    """

    n: int
    groups: dict[str, tuple[int, float]]
    spread_months: float
    p_value: float
    permutations: int


def equal_over_groups(
    errors: ArrayLike, groups: Sequence[str], *, permutations: int = 2000, seed: int = 0
) -> EqualityTest:
    """Test the claim that a system errs equally in all groups, by permuting the groups over the images.

    The statistic is that of a one-way analysis of variance, the sum over groups of n_g * (MAE_g - MAE)^2: a group of a
    few images weighs as much as it holds, which the largest difference of two groups would not heed. The
    p-value is (1 + permutations at least as large) / (1 + permutations) (Phipson B, Smyth GK, Stat Appl Genet Mol Biol
    2010;9:39). A large p-value does not show that the groups are equal.

    Args:
        errors: shape (n,), predicted - reference or its size, months.
        groups: n names.
        permutations, seed: of the random relabellings.

    Raises:
        InputError: nothing to test, another number of groups than errors, a value that is not finite, or one group.
    """
    absolute = np.abs(_column(errors, "errors"))
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(member) != len(absolute):
        raise InputError(f"there are {len(absolute)} errors but {len(member)} groups; give one per image.")
    if len(names) < 2:
        raise InputError("all images are in one group; equality needs two groups or more.")
    if permutations < 1:
        raise InputError(f"permutations is {permutations}; it must be 1 or more.")
    count = np.bincount(member)

    def between(labels: NDArray[np.int64]) -> float:
        means = np.bincount(labels, weights=absolute) / count
        return float((count * np.square(means - absolute.mean())).sum())

    observed = between(member)
    generator = np.random.default_rng(seed)
    # Equal statistics may differ in their last bits by the order of a sum.
    bar = observed * (1 - 1e-12)
    reached = sum(between(generator.permutation(member)) >= bar for _ in range(permutations))
    means = np.bincount(member, weights=absolute) / count
    return EqualityTest(
        n=len(absolute),
        groups={str(name): (int(k), float(mean)) for name, k, mean in zip(names, count, means, strict=True)},
        spread_months=float(means.max() - means.min()),
        p_value=(1 + reached) / (1 + permutations),
        permutations=permutations,
    )


def bland_altman(predicted_months: ArrayLike, reference_months: ArrayLike) -> dict[str, float]:
    """Bias and 95 % limits of agreement of predictions with references (Bland JM, Altman DG, Lancet 1986;i:307-10).

    Args:
        predicted_months, reference_months: shape (n,), n of 2 or more, months, in the same order.

    Returns:
        `bias_months`, `sd_months` (of the differences), `lower_limit_months`, `upper_limit_months` (bias -/+ 1.96 SD),
        and the half-widths of their 95 % intervals, `bias_margin_months` (t * SD / sqrt(n)) and
        `limit_margin_months` (t * SD * sqrt(3 / n), the paper's approximation).

    Raises:
        InputError: fewer than 2 images, or the lengths differ.
    """
    from scipy.stats import t as student

    predicted, reference = _column(predicted_months, "predictions"), _column(reference_months, "references")
    if len(predicted) != len(reference):
        raise InputError(
            f"there are {len(predicted)} predictions but {len(reference)} references; give one of each per image."
        )
    difference = predicted - reference
    n = len(difference)
    if n < 2:
        raise InputError("limits of agreement need two images or more.")
    bias, deviation = float(difference.mean()), float(difference.std(ddof=1))
    t = float(student.ppf(1 - ALPHA / 2, n - 1))
    return {
        "bias_months": bias,
        "sd_months": deviation,
        "lower_limit_months": bias - 1.96 * deviation,
        "upper_limit_months": bias + 1.96 * deviation,
        "bias_margin_months": t * deviation / math.sqrt(n),
        "limit_margin_months": t * deviation * math.sqrt(3 / n),
    }


def over_age(matched: pd.DataFrame) -> dict[str, Any]:
    """`bland_altman` and `equal_over_age`: "equally good over the whole age range" tested by 24-month bands.

    Args:
        matched: `predicted_months`, `reference_months`.

    Returns:
        `bland_altman` as of [`bland_altman`], or None for fewer than 2 images; `equal_over_age` with `claim`,
        `verdict` ("refuted" at the level `ALPHA`, or "not refuted at n = ..."), `test`, `p_value`, `permutations`,
        `spread_months` and `bands` (name -> `n`, `mae_months`), or None where all images are in one band.

    Raises:
        InputError: as `error_metrics`.
    """
    predicted, reference = matched["predicted_months"].to_numpy(), matched["reference_months"].to_numpy()
    bands = by_group(predicted, reference, n_resamples=0)
    bands = bands[bands["grouping"] == "age_band_months"]
    found: dict[str, Any] = {"bland_altman": None, "equal_over_age": None}
    if len(reference) >= 2:
        found["bland_altman"] = bland_altman(predicted, reference)
    if len(bands) < 2:
        return found
    starts = np.array([float(name.split("-")[0]) for name in bands["group"]])
    # `side="right"` - 1 is the band that begins at or below an age, which for the last one includes its end.
    member = np.searchsorted(starts, reference, side="right") - 1
    names = bands["group"].to_numpy()
    test = equal_over_groups(predicted - reference, [str(names[index]) for index in member])
    verdict = "refuted" if test.p_value <= ALPHA else f"not refuted at n = {test.n}"
    found["equal_over_age"] = {
        "claim": CLAIM_OVER_AGE,
        "verdict": verdict,
        "test": "permutation of 24-month bands, sum of squares of absolute errors between bands",
        "p_value": test.p_value,
        "permutations": test.permutations,
        "spread_months": test.spread_months,
        "bands": {
            str(name): {"n": test.groups[str(name)][0], "mae_months": test.groups[str(name)][1]} for name in names
        },
    }
    return found


def rare_ages(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float | None]]:
    """Images and MAE at the two ends of the age range.

    Args:
        groups: rows of [`by_group`] as mappings, with their 24-month bands.

    Returns:
        "under 48 months" and "192 months and over" -> (images, MAE in months, or None without images).
    """
    young: list[Mapping[str, Any]] = []
    old: list[Mapping[str, Any]] = []
    for band in groups:
        if band["grouping"] == "age_band_months":
            start, end = (float(limit) for limit in band["group"].split("-"))
            if end <= RARE_UNDER_MONTHS:
                young.append(band)
            elif start >= RARE_FROM_MONTHS:
                old.append(band)

    def together(bands: list[Mapping[str, Any]]) -> tuple[int, float | None]:
        n = sum(band["n"] for band in bands)
        return n, sum(band["n"] * band["mae_months"] for band in bands) / n if n else None

    return {
        f"under {RARE_UNDER_MONTHS} months": together(young),
        f"{RARE_FROM_MONTHS} months and over": together(old),
    }


def bands_clearly_worse(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The 24-month bands among rows of [`by_group`] whose whole 95 % interval of the MAE lies above the MAE of all
    images; a band without an interval is never among them."""
    overall = next((row["mae_months"] for row in groups if row["grouping"] == "all"), None)
    bands = [row for row in groups if row["grouping"] == "age_band_months" and row["mae_months_low"] is not None]
    return [] if overall is None else [row for row in bands if row["mae_months_low"] > overall]


def format_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return MAE and bias of each group as aligned lines of text, and the MAE at both ends of the age range.

    Args:
        groups: rows of [`by_group`] as mappings, NaN as None.
    """
    names = [f"{row['group']} months" if row["grouping"] == "age_band_months" else str(row["group"]) for row in groups]
    ends = rare_ages(groups)
    width = max(len(name) for name in (*names, *ends))

    def between(row: Mapping[str, Any], key: str, sign: str) -> str:
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return MISSING if low is None or high is None else f"95 % [{low:{sign}.2f}, {high:{sign}.2f}]"

    lines = [
        f"{name:<{width}}  n {row['n']:>5}  MAE {row['mae_months']:5.2f}  {between(row, 'mae_months', ''):<21}  "
        f"bias {row['bias_months']:+6.2f}  {between(row, 'bias_months', '+')}"
        for name, row in zip(names, groups, strict=True)
    ]
    lines += [
        f"{name:<{width}}  n {n:>5}  MAE {MISSING:>5}" if mae is None else f"{name:<{width}}  n {n:>5}  MAE {mae:5.2f}"
        for name, (n, mae) in ends.items()
    ]
    worse = ", ".join(str(row["group"]) for row in bands_clearly_worse(groups))
    return "\n".join([*lines, f"bands clearly worse than all images: {worse or 'none'}"])


def format_over_age(summary: Mapping[str, Any]) -> str:
    """Return slopes of the error over age, limits of agreement and the claim about all ages as lines of text.

    Args:
        summary: `error_over_age`, `bland_altman` and `equal_over_age`, as [`error_over_age`] and [`over_age`] return
            them; what is None or absent is printed as an en dash or "not measured".
    """
    lines = []
    for name in ("reference", "predicted"):
        slopes = summary.get("error_over_age") or {}
        value, (low, high) = slopes.get(f"slope_over_{name}"), slopes.get(f"slope_over_{name}_ci95") or (None, None)
        said = MISSING if value is None else f"{value:+.3f}"
        said += "" if low is None or high is None else f"  95 % [{low:+.3f}, {high:+.3f}]"
        lines.append(f"slope of the error over the {name} age, months per month: {said}")
    limits = summary.get("bland_altman")
    agreement = (
        MISSING
        if limits is None
        else f"{limits['lower_limit_months']:+.1f} to {limits['upper_limit_months']:+.1f} months "
        f"(-/+ {limits['limit_margin_months']:.1f})"
    )
    claim = f'"{CLAIM_OVER_AGE}": {format_claim(summary)}'
    return "\n".join([*lines, f"95 % limits of agreement: {agreement}", claim])


def permutation_p_text(claim: Mapping[str, Any]) -> str:
    """ "= 0.0123", or that it is the smallest p-value that so many permutations can give.

    Args:
        claim: `p_value` and, where it is known, `permutations`; as `equal_over_age` of [`over_age`].
    """
    n = claim.get("permutations")
    if n is None or claim["p_value"] > 1.001 / (1 + n):
        return f"= {claim['p_value']:.4f}"
    return f"<= {claim['p_value']:.4f}, the smallest that {n:,} permutations can give"


def format_claim(summary: Mapping[str, Any]) -> str:
    """The verdict on the claim about all ages with its p-value and the spread behind it, or "not measured".

    Args:
        summary: may hold `equal_over_age` as of [`over_age`].
    """
    found = summary.get("equal_over_age")
    if found is None:
        return "not measured"
    return (
        f"{found['verdict']} (permutation test over 24-month bands, p {permutation_p_text(found)}; the MAEs of the "
        f"bands differ by up to {found['spread_months']:.1f} months)"
    )


def match_by_id(predictions: pd.DataFrame, references: pd.DataFrame) -> pd.DataFrame:
    """Join predictions to references by `id`, and refuse what does not pair one to one.

    Args:
        predictions: columns `id` and `predicted_months`.
        references: columns `id` and `reference_months`; further columns such as `sex` are kept.

    Returns:
        One row per image in the order of `references`. Ids are compared as text, so 1377 and "1377" are one image.

    Raises:
        InputError: if a column is missing, an id is repeated, or an id is on one side only.
    """
    for name, table, columns in (
        ("predictions", predictions, ["id", "predicted_months"]),
        ("references", references, ["id", "reference_months"]),
    ):
        missing = [column for column in columns if column not in table.columns]
        if missing:
            raise InputError(f"the table of {name} lacks the column {', '.join(missing)}; it needs {columns}.")
        repeated = table["id"].astype(str)[table["id"].astype(str).duplicated()].unique()
        if len(repeated):
            raise InputError(f"the table of {name} repeats the id {_some(repeated)}; keep one row per image.")
    left = references.assign(id=references["id"].astype(str))
    right = predictions[["id", "predicted_months"]].assign(id=predictions["id"].astype(str))
    without_prediction = sorted(set(left["id"]) - set(right["id"]))
    if without_prediction:
        raise InputError(
            f"{len(without_prediction)} of {len(left)} images have no prediction ({_some(without_prediction)}); "
            "predict them too, or a score over the rest would pass for one over all."
        )
    without_reference = sorted(set(right["id"]) - set(left["id"]))
    if without_reference:
        raise InputError(
            f"{len(without_reference)} predictions have no reference ({_some(without_reference)}); "
            "take them out, or evaluate on the split they belong to."
        )
    columns = [column for column in left.columns if column != "predicted_months"]
    return left[columns].merge(right, on="id", how="left", validate="one_to_one")


def by_group(
    predicted_months: ArrayLike,
    reference_months: ArrayLike,
    *,
    sex: Sequence[str] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure all images, each sex, and each 24-month band of the reference bone age.

    Args:
        predicted_months, reference_months: shape (n,), months.
        sex: n entries "female" or "male"; without it there are no rows by sex.
        n_resamples, seed: as in `error_metrics`.

    Returns:
        One row per group that has images: `grouping` ("all", "sex", "age_band_months"), `group` ("all", "female",
        "male", "96-120" for at least 96 and under 120), `n`, the keys of `MEASURES`, and `<key>_low`, `<key>_high`;
        undefined values are NaN.

    Raises:
        InputError: as `error_metrics`; also if `sex` has another length or another value.
    """
    predicted, reference = _checked(predicted_months, reference_months)
    n_resamples = _checked_resamples(n_resamples)
    groups: list[tuple[str, str, NDArray[np.bool_]]] = [("all", "all", np.ones(len(reference), dtype=bool))]
    if sex is not None:
        sexes = np.asarray(sex, dtype=object)
        if sexes.shape != reference.shape:
            raise InputError(f"there are {len(reference)} images but {sexes.size} sexes; give one per image.")
        unknown = sorted({str(value) for value in sexes} - {"female", "male"})
        if unknown:
            raise InputError(f'sex must be exactly "female" or "male", not {_some(unknown)}; it is never guessed.')
        groups += [("sex", name, sexes == name) for name in ("female", "male")]
    # As in `splits.py`: the last band, 216 to 240 months, includes its upper end.
    band = np.where(reference == MAX_BONE_AGE_MONTHS, reference - 1, reference) // AGE_BAND_MONTHS
    for index in np.unique(band):
        label = f"{index * AGE_BAND_MONTHS:.0f}-{(index + 1) * AGE_BAND_MONTHS:.0f}"
        groups.append(("age_band_months", label, band == index))

    rows: list[dict[str, Any]] = []
    for grouping, group, member in groups:
        if not member.any():
            continue
        found = _error_metrics(predicted[member], reference[member], n_resamples=n_resamples, seed=seed)
        row: dict[str, Any] = {"grouping": grouping, "group": group, "n": found["n"]}
        for key in MEASURES:
            low, high = found[f"{key}_ci95"]
            row |= {key: found[key], f"{key}_low": low, f"{key}_high": high}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype(dict.fromkeys(table.columns[3:], float))


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the measures as aligned lines of text; what is undefined or absent is printed as an en dash."""

    def printed(value: float | None, share: bool) -> str:
        if value is None:
            return MISSING
        return f"{100 * value:.1f} %" if share else f"{value:.2f}"

    width = max(len(key) for key in MEASURES)
    lines = [f"{'n':<{width}}  {metrics['n']:>9}"]
    for key in MEASURES:
        share = key.startswith("within_")
        low, high = metrics.get(f"{key}_ci95") or (None, None)
        interval = f"  95 % [{printed(low, share)}, {printed(high, share)}]" if low is not None else ""
        lines.append(f"{key:<{width}}  {printed(metrics.get(key), share):>9}{interval}")
    return "\n".join(lines)


def _error_metrics(
    predicted: NDArray[np.float64], reference: NDArray[np.float64], *, n_resamples: int, seed: int
) -> dict[str, Any]:
    n = len(reference)
    errors = predicted - reference
    point = _measure(errors[None], reference[None])
    # One image has no spread to resample: an interval of width zero would claim certainty.
    samples = _bootstrap(errors, reference, n_resamples, seed) if n > 1 and n_resamples > 0 else None
    found: dict[str, Any] = {"n": n}
    for key in MEASURES:
        value = float(point[key][0])
        found[key] = None if np.isnan(value) else value
        defined = samples[key][~np.isnan(samples[key])] if samples is not None else np.empty(0)
        if found[key] is None or not len(defined):
            found[f"{key}_ci95"] = [None, None]
        else:
            found[f"{key}_ci95"] = [float(end) for end in np.percentile(defined, [2.5, 97.5])]
    return found


def _measure(errors: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """All measures of b samples at once: (b, n) errors and references -> (b,) per key, NaN where undefined."""
    absolute = np.abs(errors)
    bias = errors.mean(axis=1)
    mse = np.square(errors).mean(axis=1)
    variance = reference.var(axis=1)
    # Not `variance == 0`: the variance of equal floats is not always exactly 0.
    constant = np.ptp(reference, axis=1) == 0
    r2 = np.where(constant, np.nan, 1 - mse / np.where(constant, 1.0, variance))
    return {
        "mae_months": absolute.mean(axis=1),
        "rmse_months": np.sqrt(mse),
        "mse_months2": mse,
        "median_absolute_error_months": np.median(absolute, axis=1),
        "mean_absolute_deviation_about_bias_months": np.abs(errors - bias[:, None]).mean(axis=1),
        "bias_months": bias,
        "r2": r2,
        "within_6_months": (absolute <= 6).mean(axis=1),
        "within_12_months": (absolute <= 12).mean(axis=1),
        "within_24_months": (absolute <= 24).mean(axis=1),
    }


def _bootstrap(
    errors: NDArray[np.float64], reference: NDArray[np.float64], n_resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    blocks = [_measure(errors[drawn], reference[drawn]) for drawn in _draws(len(errors), n_resamples, seed)]
    return {key: np.concatenate([part[key] for part in blocks]) for key in MEASURES}


def _draws(n: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Bootstrap samples as indices (b, n), in blocks that fit into memory."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // n)
    for start in range(0, n_resamples, block):
        yield generator.integers(0, n, size=(min(block, n_resamples - start), n))


def _checked(
    predicted_months: ArrayLike, reference_months: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predicted = _column(predicted_months, "predictions")
    reference = _column(reference_months, "references")
    if len(predicted) != len(reference):
        raise InputError(
            f"there are {len(predicted)} predictions but {len(reference)} references; give one of each per image, "
            "in the same order."
        )
    # Medians: one odd prediction must not hide the unit of all others.
    in_years = np.median(predicted) <= _OLDEST_IN_YEARS and np.median(reference) > _MEDIAN_IN_MONTHS
    # A poor model may really say 20 months for a child of 40: years are meant only if months fit better after * 12.
    if in_years and np.median(np.abs(12 * predicted - reference)) < np.median(np.abs(predicted - reference)):
        raise InputError(
            f"the predictions look like years (half of them at most {_OLDEST_IN_YEARS}, references around "
            f"{np.median(reference):.0f} months); multiply them by 12."
        )
    return predicted, reference


def _column(values: ArrayLike, name: str) -> NDArray[np.float64]:
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"the {name} are not all numbers; give one bone age in months per image.") from None
    # (n, 1) against (n,) would broadcast to n x n errors without a word.
    if column.ndim != 1:
        raise InputError(f"the {name} have shape {column.shape}; flatten them to one number per image.")
    if not len(column):
        raise InputError(f"there are no {name}; give at least one image.")
    if not np.isfinite(column).all():
        raise InputError(
            f"{np.count_nonzero(~np.isfinite(column))} of {len(column)} {name} are NaN or infinite; find out why, "
            "or take those images out of both sides and say so."
        )
    return column


def _checked_resamples(n_resamples: int) -> int:
    if n_resamples < 0:
        raise InputError(f"n_resamples is {n_resamples}; it must be 0 (no intervals) or more.")
    return n_resamples


def _some(values: Sequence[Any] | NDArray[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:3])
    return shown if len(values) <= 3 else f"{shown}, ..."
